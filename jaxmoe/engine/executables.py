"""The compiled step: one program per shape, compiled before the first request, its cache updated in place."""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxmoe.engine.batch import Batch, StepShape, unpack
from jaxmoe.engine.model import Model, Progress, no_progress
from jaxmoe.models.decoder import RANK_ROWS, merge
from jaxmoe.models.kv_cache import KVCache, PagedContext
from jaxmoe.moe.placement import Placement
from jaxmoe.ops.sampling import sample
from jaxmoe.sharding.mesh import RANKS

log = logging.getLogger(__name__)

PACKED = P(RANKS, None)
COMPILE_THREADS = 2


class Executables:
    """Step programs by shape. `late_compiles` counts those that warm-up did not foresee: 0 in good health.

    Without a warm-up each program is compiled when it is first needed.
    """

    def __init__(self, model: Model, cache: KVCache) -> None:
        self._model = model
        self._cache_shape = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), cache)
        self._compiled: dict[StepShape, Any] = {}
        self._warm = False
        self.late_compiles = 0

    def warm_up(self, shapes: Iterable[StepShape], progress: Progress = no_progress) -> None:
        """Compiles every shape, several at once."""
        shapes = list(shapes)
        with ThreadPoolExecutor(COMPILE_THREADS) as pool:
            jobs = {pool.submit(self.compile, shape): shape for shape in shapes}
            for done, job in enumerate(as_completed(jobs), 1):
                self._compiled[jobs[job]] = job.result()
                progress("compiling", done, len(shapes))
        self._warm = True

    def __call__(self, shape: StepShape, cache: KVCache, packed: Array) -> tuple[KVCache, Int[Array, "R B two"]]:
        if shape not in self._compiled:
            if self._warm:
                self.late_compiles += 1
                log.error("compiling after warm-up: %s; no warmed-up shape fits this step", shape)
            self._compiled[shape] = self.compile(shape)
        return self._compiled[shape](self._model.params, self._model.placement, cache, packed)

    def compile(self, shape: StepShape) -> Any:
        """The compiled program (`jax.stages.Compiled`) of one shape."""
        model = self._model

        def step(
            params: Any, placement: Placement, cache: KVCache, packed: Int[Array, "R words"]
        ) -> tuple[KVCache, Int[Array, "R B two"]]:
            decoder = merge(model.abstract, params)
            batch = unpack_ranks(packed, shape)
            context = PagedContext(cache, batch.block_table)
            hidden, context, _ = decoder(batch.tokens, batch.positions, placement, context, model.execution)
            logits = decoder.logits(last_rows(hidden, batch.length, shape))
            return context.cache, sample_ranks(logits, batch)

        words = jax.ShapeDtypeStruct(
            (model.num_ranks, shape.packed_width), jnp.int32, sharding=NamedSharding(model.mesh, PACKED)
        )
        with jax.set_mesh(model.mesh):
            lowered = jax.jit(step, donate_argnums=2).lower(model.params, model.placement, self._cache_shape, words)
        return lowered.compile()


def unpack_ranks(packed: Int[Array, "R words"], shape: StepShape) -> Batch:
    """Every rank's batch, fields with a leading axis R."""

    def local(words: Array) -> tuple[Batch, Array]:
        batch = unpack(words[0], shape)
        return jax.tree.map(lambda field: field[None], batch)

    specs = Batch(*(RANK_ROWS if name in ("tokens", "block_table") else PACKED for name in Batch._fields))
    return jax.shard_map(local, in_specs=PACKED, out_specs=specs, check_vma=False)(packed)


def last_rows(hidden: Float[Array, "R N D"], length: Int[Array, "R B"], shape: StepShape) -> Float[Array, "R B D"]:
    """The hidden state after each sequence's last token; that of row 0 for padding."""

    def local(hidden: Array, length: Array) -> Array:
        rows = hidden.reshape(shape.batch, shape.tokens, -1)
        return jnp.take_along_axis(rows, jnp.maximum(length[0] - 1, 0)[:, None, None], axis=1)[:, 0][None]

    return jax.shard_map(local, in_specs=(RANK_ROWS, PACKED), out_specs=RANK_ROWS, check_vma=False)(hidden, length)


def sample_ranks(logits: Float[Array, "R B V"], batch: Batch) -> Int[Array, "R B two"]:
    """Token and the bits of its log-probability: one packed array back to the host."""

    def local(logits: Array, *fields: Array) -> Array:
        start, length, temperature, top_k, top_p, seed = (field[0] for field in fields)
        tokens, logprobs = sample(logits[0], temperature, top_k, top_p, seed, start + length)
        return jnp.stack([tokens, jax.lax.bitcast_convert_type(logprobs, jnp.int32)], axis=-1)[None]

    fields = (batch.start, batch.length, batch.temperature, batch.top_k, batch.top_p, batch.seed)
    run = jax.shard_map(local, in_specs=(RANK_ROWS, *(PACKED,) * 6), out_specs=RANK_ROWS, check_vma=False)
    return run(logits, *fields)
