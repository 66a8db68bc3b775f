"""The step loop: schedule, run, complete. What the server runs, usable in a notebook."""

import dataclasses
import itertools
import logging
import secrets
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.kv_events import KvEventBatch
from jaxmoe.engine.model import Model, Progress, no_progress
from jaxmoe.engine.pages import PageGroup
from jaxmoe.engine.programs import Program
from jaxmoe.engine.rebalancing import RebalanceCounts, Rebalancer, RebalanceReport
from jaxmoe.engine.request import Output, Request, SamplingParams
from jaxmoe.engine.runner import Flight, Runner
from jaxmoe.engine.scheduler import RankLoad, Scheduler, Stats
from jaxmoe.engine.sequence import NOTHING, StepPlan
from jaxmoe.errors import ConfigError
from jaxmoe.moe.simulation import Recorder
from jaxmoe.moe.statistics import LoadStatistics

log = logging.getLogger(__name__)

# Steps that may fail one after the other before the engine gives up.
MOST_FAILURES = 3


class StepReport(NamedTuple):
    """What a step did.

    started: requests of which it computes the first tokens.
    prefill_tokens: of prompts, and of what preempted sequences have recomputed. sequences: that it computes tokens of.
    device_seconds: how long `Engine.step` launched programs and waited for a step; the rest of its time is the host's.
    """

    started: tuple[str, ...] = ()
    prefill_tokens: int = 0
    sequences: int = 0
    device_seconds: float = 0.0


class Counters(NamedTuple):
    """What has happened since the engine was made.

    preemptions: how often a sequence gave up its pages to an older one and was computed anew.
    programs, compile_seconds: compiled programs, and the wall time that each took, summed up.
    late_compiles: those of them that warm-up did not foresee.
    failed_steps, queried_tokens, hit_tokens, drafts, accepted_drafts: see `jaxmoe.engine.scheduler.Stats`.
    """

    preemptions: int
    programs: int
    compile_seconds: float
    late_compiles: int
    failed_steps: int
    queried_tokens: int
    hit_tokens: int
    drafts: int
    accepted_drafts: int


class Engine:
    """Continuous batching over one model. Not thread-safe: one thread submits, cancels and steps.

    Compiles all its programs when it is made, reporting to `progress`.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig = EngineConfig(),  # noqa: B008 - frozen
        progress: Progress = no_progress,
    ) -> None:
        self.model = model
        self.config = config
        self._runner = Runner(model, config, progress)
        self._scheduler = Scheduler(
            config,
            num_ranks=model.num_ranks,
            groups=self._runner.groups,
            max_context=self._runner.max_context,
            eos_token_ids=frozenset(model.eos_token_ids),
            vocab_size=model.config.vocab_size,
        )
        self._rebalancer = Rebalancer(model, self.statistics, config.rebalance) if config.rebalance else None
        self._names = itertools.count()
        self._unstarted: set[str] = set()
        self.last_step = StepReport()
        self._failures = 0
        self._flight = Flight(NOTHING)

    @property
    def max_context(self) -> int:
        """Tokens that a prompt and its continuation may have together."""
        return self._runner.max_context

    @property
    def page_groups(self) -> tuple[PageGroup, ...]:
        """The groups of KV pages, one for each distance that the model's layers look back."""
        return self._runner.groups

    @property
    def cache_arrays(self) -> list[jax.Array]:
        """All arrays of KV pages."""
        return self._runner.cache_arrays

    def describe(self) -> str:
        """One line for a log: the limits in force."""
        tokens = [group.pages_per_rank * self.config.page_size for group in self.page_groups]
        labels = [f" ({group.span})" for group in self.page_groups] if len(tokens) > 1 else [""]
        cached = " and ".join(f"{count} tokens{label}" for count, label in zip(tokens, labels, strict=True))
        dispatch = self._runner.describe_dispatch()
        return (
            f"context {self.max_context} tokens, {self.config.max_batch} sequences and {cached} of KV cache "
            f"({self._runner.cache_bytes / 2**20:.0f} MiB) on each of {self.model.num_ranks} attention ranks"
            + (f"; {dispatch}" if dispatch else "")
        )

    @property
    def late_compiles(self) -> int:
        """Programs compiled after warm-up; 0 unless a step had a shape that no bucket foresaw."""
        return self._runner.executables.late_compiles

    @property
    def statistics(self) -> LoadStatistics:
        """How evenly what was routed so far fell on experts and devices."""
        return self._runner.statistics

    def save_routing(self, path: str | Path) -> None:
        """Writes the experts of the first tokens that were routed, for `trace:FILE`. Raises ConfigError.

        The model must have been loaded with `Execution(record_routing=True)`.
        """
        if not self.model.execution.record_routing:
            raise ConfigError("this engine does not record its routing; start it with --record-routing FILE")
        self._runner.recorder.save(path)

    def forget_routing(self) -> None:
        """Keeps nothing for `save_routing`; requests may ask for their own routing all the same."""
        self._runner.recorder = Recorder(most=0)

    @property
    def programs(self) -> tuple[Program, ...]:
        """What has been compiled so far."""
        return tuple(self._runner.executables.programs)

    def describe_programs(self) -> str:
        """One line for a log: what start-up compiled and what it cost; "" without a warm-up."""
        return self._runner.executables.describe()

    @property
    def num_preemptions(self) -> int:
        """How often a sequence gave up its pages to an older one and was computed anew."""
        return self._scheduler.num_preemptions

    @property
    def has_work(self) -> bool:
        return (
            self._scheduler.has_work
            or not self._flight.plan.empty
            or bool(self._rebalancer and self._rebalancer.active)
        )

    def submit(self, request: Request) -> None:
        """Queues a request. Raises InvalidRequestError, QueueFullError or DuplicateRequestError and changes nothing.

        Raises ConfigError for routed experts, unless the model was loaded with `Execution(record_routing=True)`.
        """
        if request.params.routed_experts and not self.model.execution.record_routing:
            raise ConfigError("this engine does not tell of routed experts; start it with --routed-experts")
        if request.params.constraint is not None:
            request.params.validate(self.model.config.vocab_size)
            self._runner.grammars.matcher(request.params.constraint)
        if request.params.seed is None:
            request = dataclasses.replace(
                request, params=dataclasses.replace(request.params, seed=secrets.randbits(32))
            )
        self._scheduler.submit(request)
        self._unstarted.add(request.id)

    def cancel(self, request_id: str, index: int | None = None) -> bool:
        """Ends a request, or one of its samples, and frees the pages; the last Output of each says "abort".

        False when no such request or sample is live.
        """
        if index is None:
            self._unstarted.discard(request_id)
        return self._scheduler.cancel(request_id, index)

    def step(self) -> list[Output]:
        """One step over everything that is live; [] when there is nothing to do. `last_step` then tells what it did.

        Launches the step and returns what the one before brought, which it waits for: while the device works on the
        one, the host deals with the other (`EngineConfig.overlap`; without it, what the step itself brought).

        If a step fails, the requests that have a part in it end with "error" and all others are computed anew. Raises
        what made it fail once MOST_FAILURES steps have failed one after the other, or if the KV cache cannot be remade:
        then the engine is of no more use.
        """
        self.last_step = StepReport()
        began, on_device = time.perf_counter(), self._runner.device_seconds
        plan, before, outputs = self._scheduler.schedule(), self._flight, []
        self._flight = Flight(NOTHING)
        try:
            flight = self._runner.launch(plan)
            if self.config.overlap:
                outputs, before = self._land(before), self._flight
            self._runner.sample(flight)
            if self.config.overlap:
                self._flight = flight
            else:
                outputs = self._land(flight)
        except Exception as error:
            return outputs + self._recover(plan, before, error)
        self.last_step = self._report(plan, self._runner.device_seconds - on_device)
        if self._rebalancer:
            self._rebalancer.step(0.0 if plan.empty else time.perf_counter() - began)
        return outputs

    def _land(self, flight: Flight) -> list[Output]:
        """Waits for a step, and what it brought."""
        sampled = self._runner.read(flight)
        if not flight.plan.empty:
            self._failures = 0
        return self._runner.routed.attach(self._scheduler.complete(flight.plan, sampled))

    def rebalance(self, slot_expert: Any = None) -> None:
        """Begins to move experts, a few with each step, to a placement [L, S] or to what is planned for recent loads.

        Raises ConfigError if the engine was not configured to (`EngineConfig.rebalance`), the placement does not fit or
        experts are on the move already.
        """
        if self._rebalancer is None:
            raise ConfigError("this engine keeps no room to move experts; start it with --rebalance")
        self._rebalancer.start("call", slot_expert)

    @property
    def rebalances(self) -> RebalanceCounts:
        """What moved so far, over all rebalances."""
        return self._rebalancer.counts if self._rebalancer else RebalanceCounts()

    @property
    def last_rebalance(self) -> RebalanceReport | None:
        """Of the rebalance under way, else of the latest that there was."""
        return self._rebalancer.report if self._rebalancer else None

    def _recover(self, plan: StepPlan, before: Flight, error: Exception) -> list[Output]:
        """After a step could not be launched or read. before: the one that was in flight and is not complete."""
        outputs: list[Output] = []
        try:
            outputs = self._land(before)
        except Exception:
            plan = before.plan
        self._failures += 1
        if self._failures >= MOST_FAILURES:
            raise error
        log.error("a step failed; its requests end, the KV cache is made anew", exc_info=error)
        # The step may have taken the cache with it, which it was to update in place.
        self._runner.reset_cache()
        text = f"the step failed with {type(error).__name__}; the engine's log has the details"
        return outputs + self._runner.routed.attach(self._scheduler.fail(plan, text))

    def clear_prefix_cache(self) -> None:
        """Forgets all prefixes; requests under way go on."""
        self._scheduler.clear_prefix_cache()

    def kv_events(self) -> list[KvEventBatch]:
        """What entered and left the prefix caches since the last call.

        The first call, however late, tells all that is there, and so does every one after a pause too long for the
        events to be kept: then they begin with "cleared".
        """
        return self._scheduler.kv_events()

    def stats(self) -> Stats:
        """Counts of requests, pages, preemptions, failed steps and tokens found in the prefix cache."""
        return self._scheduler.stats()

    def loads(self) -> list[RankLoad]:
        """What each attention rank carries."""
        return self._scheduler.loads()

    def counters(self) -> Counters:
        programs = self.programs
        seconds = sum(program.seconds for program in programs)
        stats = self.stats()
        return Counters(
            stats.preemptions,
            len(programs),
            seconds,
            self.late_compiles,
            stats.failed_steps,
            stats.queried_tokens,
            stats.hit_tokens,
            stats.drafts,
            stats.accepted_drafts,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError if a page or a request is not where it should be."""
        self._scheduler.check_integrity()

    def _report(self, plan: StepPlan, device_seconds: float) -> StepReport:
        prefills = [chunk for rank in plan.prefills for chunk in rank]
        # With its prompt in the prefix cache, a request may start with a decode.
        begun = (chunk.sequence.request.id for chunk in plan.chunks) if self._unstarted else ()
        started = tuple(name for name in begun if name in self._unstarted)
        self._unstarted.difference_update(started)
        return StepReport(
            started,
            sum(chunk.length for chunk in prefills),
            len(prefills) + sum(map(len, plan.decodes)),
            device_seconds,
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams = SamplingParams(),  # noqa: B008 - frozen
    ) -> Generator[Output, None, None]:
        """Continues all prompts together and yields what each step brings; `request_id` is the prompt's index as text.

        Closing the iterator early cancels what is still running. Raises RuntimeError if a step fails.
        """
        ids = {f"generate-{next(self._names)}": str(index) for index in range(len(prompts))}
        live: dict[str, int] = {}  # samples to come to their ends
        try:
            for (request_id, _), prompt in zip(ids.items(), prompts, strict=True):
                self.submit(Request(request_id, tuple(int(token) for token in prompt), params))
                live[request_id] = params.n
            while live:
                for output in self.step():
                    if output.request_id not in ids:
                        continue
                    if output.finish_reason:
                        live[output.request_id] -= 1
                        if not live[output.request_id]:
                            del live[output.request_id]
                    if output.error:
                        raise RuntimeError(output.error)
                    yield dataclasses.replace(output, request_id=ids[output.request_id])
        finally:
            for request_id in live:
                self.cancel(request_id)
            if live and self.has_work:
                self.step()
