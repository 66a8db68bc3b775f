"""The compiled step: one program per shape, compiled before the first request, its cache updated in place."""

import functools
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxmoe.axes import Hidden
from jaxmoe.engine.batch import Batch, Packing, Sampling, StepShape
from jaxmoe.engine.model import Progress, no_progress
from jaxmoe.engine.programs import Program, build, summary
from jaxmoe.models.config import ModelConfig
from jaxmoe.models.decoder import RANK_ROWS, Decoder, Execution, merge
from jaxmoe.models.kv_cache import CacheShapes, KVCache, PagedContext
from jaxmoe.moe.placement import Placement
from jaxmoe.moe.statistics import count_loads
from jaxmoe.ops.linear import Kernels
from jaxmoe.ops.sampling import sample
from jaxmoe.sharding.mesh import RANKS

log = logging.getLogger(__name__)

PACKED = P(RANKS, None)
COMPILE_THREADS = 2
SAMPLING_DTYPES: Any = Sampling(jnp.float32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
# A step program is small: splitting its code into 32 modules for parallel generation costs a CPU a fifth more time.
CPU_OPTIONS: dict[str, Any] = {"xla_cpu_parallel_codegen_split_count": 1}


class Routed(NamedTuple):
    """What the mixtures of a step did.

    counts: what each rank sent where (`moe.statistics.count_loads`). experts: of every row, if they are recorded.
    """

    counts: Int[Array, "R L counts"]
    experts: Int[Array, "L R N K"] | None


@runtime_checkable
class Steppable(Protocol):
    """What there must be of a model to compile its steps: a `Model`, or shapes with shardings in its arrays' place."""

    config: ModelConfig
    mesh: jax.sharding.Mesh
    abstract: Decoder
    execution: Execution
    params: Any
    placement: Any

    @property
    def num_ranks(self) -> int: ...


class Executables:
    """Step programs by shape. `late_compiles` counts those that warm-up did not foresee: 0 in good health.

    A step is two programs: the forward pass, one for each shape, and sampling, one for each number of sequences; apart,
    because sampling is a third of the code and does not depend on how much context there is.
    Without a warm-up each program is compiled when it is first needed.

    programs: what was compiled, in the order in which it was done.
    """

    def __init__(self, model: Steppable, cache: KVCache | CacheShapes, packing: Packing) -> None:
        self._model = model
        self._packing = packing
        self._cache_shape = jax.tree.map(_abstract, cache)
        self._forward: dict[StepShape, Any] = {}
        self._sample: dict[int, Any] = {}
        self._options = CPU_OPTIONS if model.mesh.devices.flat[0].platform == "cpu" else None
        self._warm = False
        self._warm_up_seconds = 0.0
        self.late_compiles = 0
        self.programs: list[Program] = []

    def warm_up(self, shapes: Iterable[StepShape], progress: Progress = no_progress) -> None:
        """Compiles every shape, several at once."""
        began = time.monotonic()
        shapes = list(shapes)
        batches = sorted({shape.batch for shape in shapes})
        with ThreadPoolExecutor(COMPILE_THREADS) as pool:
            forward = {pool.submit(self.compile, shape): shape for shape in shapes}
            sampling = {pool.submit(self.compile_sampling, batch): batch for batch in batches}
            for done, job in enumerate(as_completed([*forward, *sampling]), 1):
                if job in forward:
                    self._forward[forward[job]] = job.result()
                else:
                    self._sample[sampling[job]] = job.result()
                progress("compiling", done, len(forward) + len(sampling))
        self._warm = True
        self._warm_up_seconds = time.monotonic() - began

    def describe(self) -> str:
        """One line for a log: what the warm-up compiled and what it cost; "" without one."""
        return summary(self.programs, self._warm_up_seconds) if self._warm else ""

    def __call__(
        self, shape: StepShape, cache: KVCache, packed: Int[np.ndarray, "R words"]
    ) -> tuple[KVCache, Int[Array, "R B two"], Routed | None]:
        """Runs a step: the cache, updated in place, and each sequence's token with the bits of its log-probability.

        Last, what the mixtures did; None without mixtures.
        The host array goes in as it is: the call's own transfer takes a tenth of the time of `jax.device_put`.
        """
        if shape not in self._forward:
            self._count_late(str(shape))
            self._forward[shape] = self.compile(shape)
        if shape.batch not in self._sample:
            self._count_late(f"sampling batch={shape.batch}")
            self._sample[shape.batch] = self.compile_sampling(shape.batch)
        step = self._forward[shape]
        cache, logits, sampling, routed = step(self._model.params, self._model.placement, cache, packed)
        return cache, self._sample[shape.batch](logits, sampling), routed

    def compile(self, shape: StepShape) -> Any:
        """The forward program (`jax.stages.Compiled`) of one shape."""
        model, packing = self._model, self._packing

        def forward(
            params: Any, placement: Placement, cache: KVCache, packed: Int[Array, "R words"]
        ) -> tuple[KVCache, Float[Array, "R B V"], Sampling, Routed | None]:
            decoder = merge(model.abstract, params)
            batch = unpack_ranks(packed, packing, shape)
            context = PagedContext(cache, batch.tables, batch.firsts)
            hidden, written, decided = decoder(batch.tokens, batch.positions, placement, context, model.execution)
            assert written is not None
            logits = decoder.logits(last_rows(hidden, batch.length, shape), model.execution.kernels)
            routed = None
            if decided is not None:
                devices = decoder.rules.spec.expert_devices
                counts = count_loads(decided.slots, placement.slot_expert.shape[1], devices)
                routed = Routed(counts, decided.experts if model.execution.record_routing else None)
            return written.cache, logits.astype(jnp.float32), batch.sampling, routed

        words = self._on_ranks((packing.words(shape),), jnp.int32)
        return self._build(str(shape), forward, 2, model.params, model.placement, self._cache_shape, words)

    def compile_sampling(self, batch: int) -> Any:
        """The sampling program of one number of sequences a rank."""
        logits = self._on_ranks((batch, self._model.config.vocab_size), jnp.float32)
        fields = jax.tree.map(lambda dtype: self._on_ranks((batch,), dtype), SAMPLING_DTYPES)
        run = functools.partial(sample_ranks, kernels=self._model.execution.kernels)
        return self._build(f"sampling batch={batch}", run, (), logits, fields)

    def _build(self, title: str, fn: Callable[..., Any], donated: int | tuple[()], *arguments: Any) -> Any:
        def lower(name: str) -> jax.stages.Lowered:
            def named(*args: Any) -> Any:
                return fn(*args)

            # Profiles tell programs apart by their names alone.
            named.__name__ = name
            return jax.jit(named, donate_argnums=donated).lower(*arguments)

        with jax.set_mesh(self._model.mesh):
            program = build(title, lower, self._options)
        self.programs.append(program)
        return program.compiled

    def _on_ranks(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        spec = P(RANKS, *(None for _ in shape))
        sharding = NamedSharding(self._model.mesh, spec)
        return jax.ShapeDtypeStruct((self._model.num_ranks, *shape), dtype, sharding=sharding)

    def _count_late(self, program: str) -> None:
        if self._warm:
            self.late_compiles += 1
            log.error("compiling after warm-up: %s; no warmed-up shape fits this step", program)


def _abstract(leaf: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def unpack_ranks(packed: Int[Array, "R words"], packing: Packing, shape: StepShape) -> Batch:
    """Every rank's batch, fields with a leading axis R."""

    def local(words: Array) -> Batch:
        batch = packing.unpack(words[0], shape)
        return jax.tree.map(lambda field: field[None], batch)

    return jax.shard_map(local, in_specs=PACKED, out_specs=P(RANKS), check_vma=False)(packed)


def last_rows(hidden: Hidden, length: Int[Array, "R B"], shape: StepShape) -> Float[Array, "R B D"]:
    """The hidden state after each sequence's last token; that of row 0 for padding."""

    def local(hidden: Array, length: Array) -> Array:
        rows = hidden.reshape(shape.batch, shape.tokens, -1)
        return jnp.take_along_axis(rows, jnp.maximum(length[0] - 1, 0)[:, None, None], axis=1)[:, 0][None]

    return jax.shard_map(local, in_specs=(RANK_ROWS, PACKED), out_specs=RANK_ROWS, check_vma=False)(hidden, length)


def sample_ranks(logits: Float[Array, "R B V"], sampling: Sampling, kernels: Kernels = "xla") -> Int[Array, "R B two"]:
    """Token and the bits of its log-probability: one packed array back to the host."""

    def local(logits: Array, sampling: Sampling) -> Array:
        own = Sampling(*(field[0] for field in sampling))
        tokens, logprobs = sample(logits[0], *own, implementation=kernels)
        return jnp.stack([tokens, jax.lax.bitcast_convert_type(logprobs, jnp.int32)], axis=-1)[None]

    with jax.named_scope("sampling"):
        run = jax.shard_map(local, in_specs=(RANK_ROWS, PACKED), out_specs=RANK_ROWS, check_vma=False)
        return run(logits, sampling)
