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
from jaxmoe.engine.adjustments import AdjustmentShape
from jaxmoe.engine.batch import KEPT, Batch, Following, Packing, Sampling, StepShape
from jaxmoe.engine.model import Progress, no_progress
from jaxmoe.engine.programs import Program, build, summary
from jaxmoe.engine.prompt_logprobs import Rows, rows_a_call
from jaxmoe.engine.request import MOST_LOGPROBS, TopLogprobs
from jaxmoe.models.config import ModelConfig
from jaxmoe.models.decoder import RANK_ROWS, Decoder, Execution, merge
from jaxmoe.models.kv_cache import CacheShapes, KVCache, PagedContext
from jaxmoe.moe.placement import Placement
from jaxmoe.moe.statistics import count_loads
from jaxmoe.ops.linear import Compute, Kernels
from jaxmoe.ops.sampling import adjust, report, sample
from jaxmoe.sharding.mesh import RANKS

log = logging.getLogger(__name__)

PACKED = P(RANKS, None)
COMPILE_THREADS = 2
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


class Forward(NamedTuple):
    """What a forward pass brings: the cache, updated in place, and what sampling goes by.

    logits: of what is drawn: after each sequence's last token, and with a draft the one before. sampling: a `Sampling`,
        packed. hidden: the states after the final norm, where somebody looks at them; else None. routed: None without
        mixtures.
    """

    cache: KVCache
    logits: Float[Array, "R draws V"]
    sampling: Int[Array, "R draws fields"]
    hidden: Hidden | None
    routed: Routed | None


class Executables:
    """Step programs by shape. `late_compiles` counts those that warm-up did not foresee: 0 in good health.

    A step is two programs: the forward pass, one for each shape, and sampling, one for each number of draws; apart,
    because sampling is a third of the code and does not depend on how much context there is. Steps in which some row
    asks for it have an adjusting program between these and a reporting one after, also by number of draws; and
    prefills one that tells of the prompt's tokens. Where steps draft, each ends with a program that does, one for each
    shape.
    Without a warm-up each program is compiled when it is first needed.

    speculates: whether steps draft.
    programs: what was compiled, in the order in which it was done.
    """

    def __init__(
        self, model: Steppable, cache: KVCache | CacheShapes, packing: Packing, speculates: bool = False
    ) -> None:
        self._model = model
        self._packing = packing
        self._speculates = speculates
        self._cache_shape = jax.tree.map(_abstract, cache)
        self._compiled: dict[str, Any] = {}
        self._options = CPU_OPTIONS if model.mesh.devices.flat[0].platform == "cpu" else None
        self._warm = False
        self._warm_up_seconds = 0.0
        self.late_compiles = 0
        self.programs: list[Program] = []
        self.most_logprobs = min(MOST_LOGPROBS, model.config.vocab_size)

    def warm_up(self, shapes: Iterable[StepShape], progress: Progress = no_progress) -> None:
        """Compiles every shape, several at once."""
        began = time.monotonic()
        wanted: dict[str, Callable[[], Any]] = {}
        for shape in shapes:
            wanted[str(shape)] = functools.partial(self.compile, shape)
            for kind, compile_kind in self._of_batch.items():
                wanted[f"{kind} batch={shape.draws}"] = functools.partial(compile_kind, shape.draws)
            if self._speculates:
                wanted[_drafts(shape)] = functools.partial(self.compile_drafting, shape)
            if not shape.decodes:
                wanted[_prompts(shape)] = functools.partial(self.compile_prompts, shape)
        with ThreadPoolExecutor(COMPILE_THREADS) as pool:
            jobs = {pool.submit(compile_program): title for title, compile_program in wanted.items()}
            for done, job in enumerate(as_completed(jobs), 1):
                self._compiled[jobs[job]] = job.result()
                progress("compiling", done, len(jobs))
        self._warm = True
        self._warm_up_seconds = time.monotonic() - began

    def describe(self) -> str:
        """One line for a log: what the warm-up compiled and what it cost; "" without one."""
        return summary(self.programs, self._warm_up_seconds) if self._warm else ""

    def forward(
        self, shape: StepShape, cache: KVCache, packed: Int[np.ndarray, "R words"], kept: Int[Array, "R slots kept"]
    ) -> Forward:
        """kept: see `KEPT`.

        The host array goes in as it is: the call's own transfer takes a tenth of the time of `jax.device_put`.
        """
        run = self._program(str(shape), self.compile, shape)
        return Forward(*run(self._model.params, self._model.placement, cache, packed, kept))

    def sample(
        self,
        logits: Float[Array, "R draws V"],
        sampling: Int[Array, "R draws fields"],
        kept: Int[Array, "R slots kept"],
    ) -> tuple[Int[Array, "R draws two"], Int[Array, "R slots kept"]]:
        """Every token drawn with the bits of its log-probability; and `kept` updated in place, unless steps draft."""
        if self._speculates:
            return self._of("sampling", logits)(logits, sampling), kept
        out, kept = self._of("sampling", logits)(logits, sampling, kept)
        return out, kept

    def nothing_kept(self) -> Int[Array, "R slots kept"]:
        """`KEPT` before anything was drawn."""
        shape = self._kept()
        return jax.device_put(np.zeros(shape.shape, np.int32), shape.sharding)

    def adjust(self, logits: Float[Array, "R B V"], packed: Int[np.ndarray, "R words"]) -> Float[Array, "R B V"]:
        """Logits as the rows ask for them. packed: see `AdjustmentShape`."""
        return self._of("adjusting", logits)(logits, packed)

    def report(self, logits: Float[Array, "R B V"], sampled: Int[Array, "R B two"]) -> Int[Array, "R B words"]:
        """What was sampled, with its log-probability under these logits, and the most likely tokens: see `Report`."""
        return self._of("reporting", logits)(logits, sampled)

    def report_prompts(self, shape: StepShape, hidden: Hidden, rows: Rows) -> Int[Array, "R rows words"]:
        """The same of tokens of prompts, which follow some rows of a prefill."""
        return self._program(_prompts(shape), self.compile_prompts, shape)(self._model.params, hidden, *rows)

    def draft(
        self,
        shape: StepShape,
        cache: KVCache,
        packed: Int[np.ndarray, "R words"],
        hidden: Hidden,
        sampled: Int[Array, "R draws two"],
        kept: Int[Array, "R slots kept"],
    ) -> tuple[KVCache, Int[Array, "R B"], Int[Array, "R slots kept"]]:
        """After a forward pass and sampling: the cache, updated in place, for every sequence the token that may come
        after those drawn, and `kept`, updated in place."""
        run = self._program(_drafts(shape), self.compile_drafting, shape)
        cache, drafts, kept = run(self._model.params, self._model.placement, cache, packed, hidden, sampled, kept)
        return cache, drafts, kept

    def compile(self, shape: StepShape) -> Any:
        """The forward program (`jax.stages.Compiled`) of one shape."""
        model, packing = self._model, self._packing

        def forward(
            params: Any,
            placement: Placement,
            cache: KVCache,
            packed: Int[Array, "R words"],
            kept: Int[Array, "R slots kept"],
        ) -> tuple[KVCache, Float[Array, "R B V"], Int[Array, "R B fields"], Hidden | None, Routed | None]:
            decoder = merge(model.abstract, params)
            batch = unpack_ranks(packed, kept, packing, shape)
            context = PagedContext(cache, batch.tables, batch.firsts, batch.pieces)
            hidden, written, decided = decoder(batch.tokens, batch.positions, placement, context, model.execution)
            assert written is not None
            last = pick_rows(hidden, batch.draws) if shape.tokens > 1 else hidden
            told = hidden if not shape.decodes or self._speculates else None
            logits = decoder.logits(last, Compute(model.execution.kernels, batch.draws_in_use))
            routed = None
            if decided is not None:
                devices = decoder.rules.spec.expert_devices
                counts = count_loads(decided.slots, placement.slot_expert.shape[1], devices)
                routed = Routed(counts, decided.experts if model.execution.record_routing else None)
            return written.cache, logits.astype(jnp.float32), sampling_ranks(batch), told, routed

        words = self._on_ranks((packing.words(shape),), jnp.int32)
        arguments = (model.params, model.placement, self._cache_shape, words, self._kept())
        return self._build(str(shape), forward, 2, *arguments)

    def compile_drafting(self, shape: StepShape) -> Any:
        """The program that drafts, of one shape."""
        model, packing = self._model, self._packing

        def draft(
            params: Any,
            placement: Placement,
            cache: KVCache,
            packed: Int[Array, "R words"],
            hidden: Hidden,
            sampled: Int[Array, "R draws two"],
            kept: Int[Array, "R slots kept"],
        ) -> tuple[KVCache, Int[Array, "R B"], Int[Array, "R slots kept"]]:
            decoder, kernels = merge(model.abstract, params), model.execution.kernels
            batch = unpack_ranks(packed, kept, packing, shape)
            following = follow_ranks(batch, sampled)
            context = PagedContext(cache, batch.tables, batch.firsts, batch.pieces)
            further, written, _ = decoder.predict_next(
                hidden, following.tokens, following.positions, placement, context, model.execution
            )
            assert written is not None
            logits = decoder.logits(pick_rows(further, following.ends), Compute(kernels, batch.sequences_in_use))
            # By the noise of the position that the draft is for, so that it is likely to be what is drawn there: see
            # `ops.sampling.sample`.
            drafts = sample_ranks(logits.astype(jnp.float32), following.sampling, kernels)[..., 0]
            return written.cache, drafts, keep_drafts(kept, batch, following, drafts)

        words = self._on_ranks((packing.words(shape),), jnp.int32)
        states = self._on_ranks((shape.rows, model.config.width), model.params["embed"].dtype)
        sampled = self._on_ranks((shape.draws, 2), jnp.int32)
        arguments = (model.params, model.placement, self._cache_shape, words, states, sampled, self._kept())
        return self._build(_drafts(shape), draft, (2, 6), *arguments)

    def compile_sampling(self, batch: int) -> Any:
        """The sampling program of one number of draws a rank."""
        fields = self._on_ranks((batch, len(Sampling._fields)), jnp.int32)
        kernels = self._model.execution.kernels

        def draw(
            logits: Float[Array, "R draws V"],
            sampling: Int[Array, "R draws fields"],
            kept: Int[Array, "R slots kept"],
        ) -> tuple[Int[Array, "R draws two"], Int[Array, "R slots kept"]]:
            drawn = sample_ranks(logits, sampling, kernels)
            return drawn, keep_tokens(kept, sampling, drawn)

        title = f"sampling batch={batch}"
        if self._speculates:
            # Which tokens stay is seen, and kept, where the next are drafted.
            run = functools.partial(sample_ranks, kernels=kernels)
            return self._build(title, run, (), self._logits(batch), fields)
        return self._build(title, draw, 2, self._logits(batch), fields, self._kept())

    def compile_adjusting(self, batch: int) -> Any:
        """The adjusting program of one number of draws a rank."""
        shape = AdjustmentShape(batch, self._model.config.vocab_size)
        run = functools.partial(adjust_ranks, shape=shape)
        words = self._on_ranks((shape.words,), jnp.int32)
        return self._build(f"adjusting batch={batch}", run, (), self._logits(batch), words)

    def compile_reporting(self, batch: int) -> Any:
        """The reporting program of one number of draws a rank."""
        run = functools.partial(report_ranks, most=self.most_logprobs, kernels=self._model.execution.kernels)
        sampled = self._on_ranks((batch, 2), jnp.int32)
        return self._build(f"reporting batch={batch}", run, (), self._logits(batch), sampled)

    def compile_prompts(self, shape: StepShape) -> Any:
        """The program that tells of prompts' tokens, of one number of tokens a rank."""
        model, most = self._model, self.most_logprobs

        def told(
            params: Any, hidden: Hidden, rows: Int[Array, "R rows"], targets: Int[Array, "R rows"]
        ) -> Int[Array, "R rows words"]:
            decoder = merge(model.abstract, params)
            logits = decoder.logits(pick_rows(hidden, rows), Compute(model.execution.kernels))
            return report_ranks(logits, targets[..., None], most, model.execution.kernels)

        states = self._on_ranks((shape.rows, model.config.width), model.params["embed"].dtype)
        rows = self._on_ranks((rows_a_call(shape),), jnp.int32)
        return self._build(_prompts(shape), told, (), model.params, states, rows, rows)

    @property
    def _of_batch(self) -> dict[str, Callable[[int], Any]]:
        return {
            "sampling": self.compile_sampling,
            "adjusting": self.compile_adjusting,
            "reporting": self.compile_reporting,
        }

    def _of(self, kind: str, logits: Float[Array, "R B V"]) -> Any:
        batch = logits.shape[1]
        return self._program(f"{kind} batch={batch}", self._of_batch[kind], batch)

    def _program(self, title: str, compile_program: Callable[[Any], Any], shape: Any) -> Any:
        if title not in self._compiled:
            if self._warm:
                self.late_compiles += 1
                log.error("compiling after warm-up: %s; no warmed-up shape fits this step", title)
            self._compiled[title] = compile_program(shape)
        return self._compiled[title]

    def _logits(self, batch: int) -> jax.ShapeDtypeStruct:
        return self._on_ranks((batch, self._model.config.vocab_size), jnp.float32)

    def _kept(self) -> jax.ShapeDtypeStruct:
        return self._on_ranks((self._packing.max_batch + 1, len(KEPT)), jnp.int32)

    def _build(self, title: str, fn: Callable[..., Any], donated: int | tuple[int, ...], *arguments: Any) -> Any:
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


def _abstract(leaf: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def unpack_ranks(
    packed: Int[Array, "R words"], kept: Int[Array, "R slots kept"], packing: Packing, shape: StepShape
) -> Batch:
    """Every rank's batch, fields with a leading axis R."""

    def local(words: Array, kept: Array) -> Batch:
        batch = packing.unpack(words[0], shape, kept[0])
        return jax.tree.map(lambda field: field[None], batch)

    run = jax.shard_map(local, in_specs=(PACKED, RANK_ROWS), out_specs=P(RANKS), check_vma=False)
    return run(packed, kept)


def keep_tokens(
    kept: Int[Array, "R slots kept"], sampling: Int[Array, "R draws fields"], drawn: Int[Array, "R draws two"]
) -> Int[Array, "R slots kept"]:
    """`KEPT` without drafts, once tokens are drawn."""

    def local(kept: Array, sampling: Array, drawn: Array) -> Array:
        return kept.at[0, Sampling.unpack(sampling[0]).slot, KEPT.index("token")].set(drawn[0, :, 0])

    run = jax.shard_map(local, in_specs=(RANK_ROWS, RANK_ROWS, RANK_ROWS), out_specs=RANK_ROWS, check_vma=False)
    return run(kept, sampling, drawn)


def keep_drafts(
    kept: Int[Array, "R slots kept"], batch: Batch, following: Following, drafts: Int[Array, "R B"]
) -> Int[Array, "R slots kept"]:
    """`KEPT`, once drafts are drawn."""

    def local(kept: Array, batch: Batch, following: Following, drafts: Array) -> Array:
        own, after = (jax.tree.map(lambda field: field[0], each) for each in (batch, following))
        return after.keep(own, drafts[0], kept[0])[None]

    specs = (RANK_ROWS, P(RANKS), P(RANKS), PACKED)
    return jax.shard_map(local, in_specs=specs, out_specs=RANK_ROWS, check_vma=False)(kept, batch, following, drafts)


def sampling_ranks(batch: Batch) -> Int[Array, "R draws fields"]:
    """Every rank's `Batch.sampling`, packed."""

    def local(batch: Batch) -> Array:
        return jax.tree.map(lambda field: field[0], batch).sampling.pack()[None]

    return jax.shard_map(local, in_specs=P(RANKS), out_specs=RANK_ROWS, check_vma=False)(batch)


def follow_ranks(batch: Batch, sampled: Int[Array, "R draws two"]) -> Following:
    """Every rank's, fields with a leading axis R."""

    def local(batch: Batch, sampled: Array) -> Following:
        own = jax.tree.map(lambda field: field[0], batch)
        return jax.tree.map(lambda field: field[None], Following.of(own, sampled[0, :, 0]))

    run = jax.shard_map(local, in_specs=(P(RANKS), RANK_ROWS), out_specs=P(RANKS), check_vma=False)
    return run(batch, sampled)


def pick_rows(hidden: Hidden, rows: Int[Array, "R rows"]) -> Float[Array, "R rows D"]:
    """Rows of each rank's own hidden states."""

    def local(hidden: Array, rows: Array) -> Array:
        return hidden[:, rows[0]]

    return jax.shard_map(local, in_specs=(RANK_ROWS, PACKED), out_specs=RANK_ROWS, check_vma=False)(hidden, rows)


def sample_ranks(
    logits: Float[Array, "R B V"], sampling: Int[Array, "R B fields"], kernels: Kernels = "xla"
) -> Int[Array, "R B two"]:
    """Token and the bits of its log-probability: one packed array back to the host."""

    def local(logits: Array, sampling: Array) -> Array:
        tokens, logprobs = sample(logits[0], *Sampling.unpack(sampling[0])[:-1], implementation=kernels)
        return jnp.stack([tokens, jax.lax.bitcast_convert_type(logprobs, jnp.int32)], axis=-1)[None]

    with jax.named_scope("sampling"):
        run = jax.shard_map(local, in_specs=(RANK_ROWS, RANK_ROWS), out_specs=RANK_ROWS, check_vma=False)
        return run(logits, sampling)


def adjust_ranks(
    logits: Float[Array, "R B V"], packed: Int[Array, "R words"], shape: AdjustmentShape
) -> Float[Array, "R B V"]:
    def local(logits: Array, packed: Array) -> Array:
        return adjust(logits[0], *shape.unpack(packed[0]))[None]

    with jax.named_scope("adjusting"):
        run = jax.shard_map(local, in_specs=(RANK_ROWS, PACKED), out_specs=RANK_ROWS, check_vma=False)
        return run(logits, packed)


def report_ranks(
    logits: Float[Array, "R N V"], tokens: Int[Array, "R N any"], most: int, kernels: Kernels = "xla"
) -> Int[Array, "R N words"]:
    """A `Report` of the first of each row's tokens, packed."""

    def local(logits: Array, tokens: Array) -> Array:
        chosen = tokens[0, :, 0]
        logprobs, likely, values = report(logits[0], chosen, most, kernels)
        own = jnp.stack([chosen, jax.lax.bitcast_convert_type(logprobs, jnp.int32)], axis=-1)
        return jnp.concatenate([own, likely, jax.lax.bitcast_convert_type(values, jnp.int32)], axis=-1)[None]

    with jax.named_scope("reporting"):
        run = jax.shard_map(local, in_specs=(RANK_ROWS, RANK_ROWS), out_specs=RANK_ROWS, check_vma=False)
        return run(logits, tokens)


class Report(NamedTuple):
    """Tokens, their log-probabilities and the most likely tokens with theirs, read back from a packed array.

    likely, values: no entries where the step reported none.
    """

    tokens: Int[np.ndarray, "R N"]
    logprobs: Float[np.ndarray, "R N"]
    likely: Int[np.ndarray, "R N most"]
    values: Float[np.ndarray, "R N most"]

    @classmethod
    def read(cls, packed: Int[Array, "R N words"]) -> "Report":
        words = np.asarray(packed)
        floats, middle = words.view(np.float32), 1 + words.shape[-1] // 2
        return cls(words[..., 0], floats[..., 1], words[..., 2:middle], floats[..., middle:])

    def top(self, rank: int, row: int, most: int) -> TopLogprobs:
        """The `most` most likely tokens of a row."""
        return tuple(zip(self.likely[rank, row, :most].tolist(), self.values[rank, row, :most].tolist(), strict=True))


def _prompts(shape: StepShape) -> str:
    return f"prompt tokens={shape.rows}"


def _drafts(shape: StepShape) -> str:
    return f"draft after {shape}"
