"""Runs steps' plans on the device: packs, launches, and reads the sampled tokens back.

A step is launched in two parts, so that its forward pass can begin before the host has read the tokens of the step
before: what it takes of these the device hands on by itself. Only drawing waits for the host.
"""

import bisect
import contextlib
import dataclasses
import math
import operator
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.axes import Hidden
from jaxmoe.engine.adjustments import Adjuster
from jaxmoe.engine.batch import Packing, Ranks, StepShape, buckets, first_draws
from jaxmoe.engine.config import ACCELERATOR_SHARE, CPU_SHARE, EngineConfig
from jaxmoe.engine.executables import Executables, Report, Routed
from jaxmoe.engine.grammars import Grammars
from jaxmoe.engine.model import Model, Progress, no_progress
from jaxmoe.engine.pages import PageGroup, pages_reached
from jaxmoe.engine.prompt_logprobs import PromptReports
from jaxmoe.engine.request import Sampled
from jaxmoe.engine.routed_tokens import RoutedTokens
from jaxmoe.engine.sequence import Chunk, StepPlan
from jaxmoe.errors import ConfigError
from jaxmoe.models.kv_cache import KVCache, bytes_per_page, make_cache
from jaxmoe.moe.simulation import Recorder
from jaxmoe.moe.statistics import LoadStatistics
from jaxmoe.sharding.devices import use_huge_pages
from jaxmoe.spans import FULL


@dataclasses.dataclass
class _Call:
    """One call of a forward program, and what was launched on it since.

    slot_expert: of the placement that it ran with. drawn, drafts, prompts: packed reports on what it drew, what it
    drafted, and reports on tokens of its prompts.
    """

    shape: StepShape
    ranks: Ranks
    packed: Int[np.ndarray, "R words"]
    slot_expert: Int[np.ndarray, "L S"]
    logits: Float[Array, "R draws V"]
    sampling: Int[Array, "R draws fields"]
    hidden: Hidden | None
    routed: Routed | None
    drawn: Any = None
    drafts: Int[Array, "R B"] | None = None
    prompts: list[Int[Array, "R rows words"]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Flight:
    """A step that was launched and not yet read."""

    plan: StepPlan
    calls: list[_Call] = dataclasses.field(default_factory=list)


class Runner:
    """Owns the KV cache and the compiled steps of one model.

    device_seconds: how long it launched programs and waited for what they sampled, since it was made.
    """

    def __init__(self, model: Model, config: EngineConfig, progress: Progress = no_progress) -> None:
        self.model = model
        limit = model.config.max_position
        self.max_context = config.max_context or limit
        if self.max_context > limit:
            raise ConfigError(
                f"max_context={self.max_context} is beyond the model's {limit} positions; use at most {limit}"
            )
        if config.speculate and not model.config.mtp_layers:
            raise ConfigError(
                f"speculate={config.speculate!r} needs a layer for multi-token prediction, which {model.name} "
                f"({model.config.model_type}) does not have; leave it out"
            )
        self._speculates = config.speculate is not None
        self.groups = page_groups(model, config, self.max_context)
        self._page_size = config.page_size
        self._cache = self._make_cache()
        self._packing = Packing(model.config.spans, config.page_size, config.max_batch)
        self._buckets = buckets(config, self.max_context, self._packing, model.execution.kernels)
        self.executables = Executables(model, self._cache, self._packing, self._speculates)
        self._kept = self.executables.nothing_kept()
        spec = model.mesh_spec
        self.statistics = LoadStatistics(
            model.config.experts, spec.num_ranks // spec.expert_devices, spec.expert_devices, model.exchange
        )
        self.recorder = Recorder()
        self.routed = RoutedTokens()
        self.grammars = Grammars(model.folder, model.config.vocab_size, model.eos_token_ids)
        self._adjuster = Adjuster(model.config.vocab_size, model.eos_token_ids, self.grammars)
        self._prompts = PromptReports()
        self.device_seconds = 0.0
        if config.warm_up:
            with ThreadPoolExecutor(1) as beside:
                beside.submit(self.grammars.prepare)
                self.executables.warm_up(self._buckets, progress)

    def reset_cache(self) -> None:
        """Makes the KV cache anew, whatever has become of the one before, and empty."""
        for array in jax.tree.leaves(self._cache):  # two might not fit
            if not array.is_deleted():
                array.delete()
        self._cache = self._make_cache()
        self._kept = self.executables.nothing_kept()

    def _make_cache(self) -> KVCache:
        model, pages = self.model, tuple(group.pages_per_rank for group in self.groups)
        cache = make_cache(model.config, model.mesh, model.rules, pages, self._page_size, model.dtype)
        use_huge_pages(cache)
        return cache

    @property
    def cache_arrays(self) -> list[jax.Array]:
        """All arrays of KV pages."""
        return jax.tree.leaves(self._cache)

    @property
    def cache_bytes(self) -> int:
        """Bytes of KV cache of one attention rank, over its `tp` devices; what all of these hold counts once."""
        return sum(array.nbytes for array in jax.tree.leaves(self._cache)) // self.model.num_ranks

    def describe_dispatch(self) -> str:
        """How the programs' mixtures dispatch, by tokens a rank; "" where one device has all experts."""
        if self.model.mesh_spec.expert_devices == 1 or not self.model.config.stacks["moe"]:
            return ""
        tokens: dict[str, list[int]] = {}
        for count in sorted({shape.rows for shape in self._buckets}):
            tokens.setdefault(self.model.strategy(count), []).append(count)
        return "; ".join(
            f"{strategy} for steps of {', '.join(map(str, counts))} tokens a rank"
            for strategy, counts in tokens.items()
        )

    def launch(self, plan: StepPlan) -> Flight:
        """Begins a step: packs it and launches its forward passes. The step before may be in flight."""
        flight = Flight(plan)
        for shape, ranks in self._buckets.calls(plan):
            self.model.simulate(shape.rows * self.model.num_ranks)
            packed = self._packing.pack(shape, ranks)
            with self._on_device():
                forward = self.executables.forward(shape, self._cache, packed, self._kept)
            self._cache = forward.cache
            flight.calls.append(_Call(shape, ranks, packed, self.model.slot_expert, *forward[1:]))
        return flight

    def sample(self, flight: Flight) -> None:
        """Launches what draws the step's tokens. All that came before them must have been read."""
        programs = self.executables
        for call in flight.calls:
            call.ranks = [[chunk.settled for chunk in chunks] for chunks in call.ranks]
            adjusted = call.logits
            for adjustments in self._adjuster.pack(call.shape.draws, call.ranks):
                adjusted = programs.adjust(adjusted, adjustments)
            with self._on_device():
                call.drawn, self._kept = programs.sample(adjusted, call.sampling, self._kept)
                if self._speculates:
                    assert call.hidden is not None
                    self._cache, call.drafts, self._kept = programs.draft(
                        call.shape, self._cache, call.packed, call.hidden, call.drawn, self._kept
                    )
            chunks = (chunk for chunks in call.ranks for chunk in chunks if chunk.samples)
            if adjusted is not call.logits or any(chunk.sequence.request.params.logprobs for chunk in chunks):
                call.drawn = programs.report(call.logits, call.drawn)
            if call.hidden is not None:
                rows = self._prompts.pick(call.shape, call.ranks)
                call.prompts = [programs.report_prompts(call.shape, call.hidden, each) for each in rows]

    def read(self, flight: Flight) -> dict[str, Sampled]:
        """Waits for a step. What every chunk of its plan that samples brings, by request id."""
        sampled: dict[str, Sampled] = {}
        for call in flight.calls:
            with self._on_device():
                brought, told = Report.read(call.drawn), [Report.read(packed) for packed in call.prompts]
                drafts = None if call.drafts is None else np.asarray(call.drafts)
            for rank, chunks in enumerate(call.ranks):
                of_prompts = (
                    (float(each.logprobs[rank, row]), each.top(rank, row, self.executables.most_logprobs))
                    for each in told
                    for row in range(each.tokens.shape[1])
                )
                for index, (row, chunk) in enumerate(zip(first_draws(chunks), chunks, strict=False)):
                    if told:
                        self._prompts.take(chunk, of_prompts)
                    if chunk.samples:
                        draft = None if drafts is None else int(drafts[rank, index])
                        sampled[chunk.sequence.request.id] = self._sampled(brought, rank, row, chunk, draft)
            if call.routed is not None:
                self._record(call, call.routed)
        self.statistics.settle()
        return sampled

    def _record(self, call: _Call, routed: Routed) -> None:
        self.statistics.record(routed.counts, call.slot_expert, call.shape.rows)
        if routed.experts is not None:
            self.recorder.record(routed.experts)
            self.routed.record(call.shape, call.ranks, routed.experts)

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.device_seconds += time.monotonic() - began

    def _sampled(self, brought: Report, rank: int, row: int, chunk: Chunk, draft: int | None) -> Sampled:
        # What was drawn after a draft counts if that is what was drawn before.
        right = chunk.draft and brought.tokens[rank, row] == chunk.sequence.draft
        rows = range(row, row + 1 + right)
        most = chunk.sequence.request.params.logprobs
        return Sampled(
            tuple(brought.tokens[rank, row : row + 1 + right].tolist()),
            tuple(brought.logprobs[rank, row : row + 1 + right].tolist()),
            tuple(brought.top(rank, each, most) for each in rows) if most else (),
            self._prompts.give(chunk.sequence),
            draft,
        )


def page_groups(model: Model, config: EngineConfig, max_context: int) -> tuple[PageGroup, ...]:
    """The groups of KV pages, in the order of the model's spans, as many pages as asked for or as memory allows.

    Layers that see the whole context have pages for a full batch at full context, others for what a full batch sees of
    it. Where memory does not allow that, short spans still serve a full batch, so that it is the context that runs out,
    unless this leaves too little for one whole context: then they serve as many sequences as it can spare.

    Raises ConfigError if the memory left over holds less than one context.
    """
    spans, page_size = model.config.spans, config.page_size
    total = -(-max_context // page_size)
    of_one = [pages_reached(span, config.max_prefill_tokens, page_size, total) for span in spans]
    longest = max(spans, key=lambda span: (span == FULL, span.size))
    enough = of_one[spans.index(longest)]
    platform = model.mesh.devices.flat[0].platform
    page_bytes = [
        bytes_per_page(model.config, group, page_size, model.dtype, model.rules, platform)
        for group in range(len(spans))
    ]

    def pages(most: int, sequences: int) -> list[int]:
        """By group, when the one with the longest span has `most`."""
        return [
            most if span == longest else min(most, sequences * held) for span, held in zip(spans, of_one, strict=True)
        ]

    def made(most: int, sequences: int) -> tuple[PageGroup, ...]:
        return tuple(map(PageGroup, spans, pages(most, sequences)))

    if config.pages_per_rank:
        return made(config.pages_per_rank, config.max_batch)
    memory = free_memory(model)
    for sequences in range(config.max_batch, 0, -1):
        sizes = range(1, config.max_batch * enough + 1)
        most = bisect.bisect_right(
            sizes, memory, key=lambda most: sum(map(operator.mul, page_bytes, pages(most, sequences)))
        )
        if most >= enough:
            return made(most, sequences)
    raise ConfigError(
        f"the memory left for KV pages ({memory / 2**20:.0f} MiB a device) holds {most * page_size} tokens, "
        f"less than one context of {max_context}; use a smaller --max-context or more devices"
    )


def free_memory(model: Model) -> int:
    """Bytes of a device that KV pages may take."""
    stats = model.mesh.devices.flat[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int((stats["bytes_limit"] - stats["bytes_in_use"]) * ACCELERATOR_SHARE)
    # Of what the machine has, not of what is free: the size of the cache is part of every program, and what is free
    # changes from start to start, which would then find none of its programs in the compile cache.
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // model.mesh_spec.num_devices
    weights = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.params)
    )
    return int(max(0, machine - weights) * CPU_SHARE)
