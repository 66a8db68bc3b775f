"""The step loop: schedule, run, complete. What the server runs, usable in a notebook."""

import dataclasses
import itertools
import secrets
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.model import Model, Progress, no_progress
from jaxmoe.engine.pages import PageGroup
from jaxmoe.engine.programs import Program
from jaxmoe.engine.rebalancing import Rebalancer, RebalanceReport
from jaxmoe.engine.request import Output, Request, SamplingParams
from jaxmoe.engine.runner import Runner
from jaxmoe.engine.scheduler import RankLoad, Scheduler
from jaxmoe.errors import ConfigError
from jaxmoe.moe.statistics import LoadStatistics


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

    @property
    def max_context(self) -> int:
        """Tokens that a prompt and its continuation may have together."""
        return self._runner.max_context

    @property
    def page_groups(self) -> tuple[PageGroup, ...]:
        """The groups of KV pages, one for each distance that the model's layers look back."""
        return self._runner.groups

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
        return self._scheduler.has_work or bool(self._rebalancer and self._rebalancer.active)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises InvalidRequestError, QueueFullError or DuplicateRequestError and changes nothing."""
        if request.params.seed is None:
            request = dataclasses.replace(
                request, params=dataclasses.replace(request.params, seed=secrets.randbits(32))
            )
        self._scheduler.submit(request)

    def cancel(self, request_id: str) -> bool:
        """Ends a request and frees its pages; its last Output says "abort". False when no such request is live."""
        return self._scheduler.cancel(request_id)

    def step(self) -> list[Output]:
        """One step over everything that is live; [] when there is nothing to do."""
        began = time.perf_counter()
        plan = self._scheduler.schedule()
        sampled = {} if plan.empty else self._runner.run(plan)
        outputs = self._scheduler.complete(plan, sampled)
        if self._rebalancer:
            self._rebalancer.step(time.perf_counter() - began)
        return outputs

    def rebalance(self, slot_expert: Any = None) -> None:
        """Begins to move experts, a few with each step, to a placement [L, S] or to what is planned for recent loads.

        Raises ConfigError if the engine was not configured to (`EngineConfig.rebalance`), the placement does not fit or
        experts are on the move already.
        """
        if self._rebalancer is None:
            raise ConfigError("this engine keeps no room to move experts; start it with --rebalance")
        self._rebalancer.start("call", slot_expert)

    @property
    def last_rebalance(self) -> RebalanceReport | None:
        """Of the rebalance under way, else of the latest that there was."""
        return self._rebalancer.report if self._rebalancer else None

    def loads(self) -> list[RankLoad]:
        """What each attention rank carries."""
        return self._scheduler.loads()

    def check_integrity(self) -> None:
        """Raises AssertionError if a page or a request is not where it should be."""
        self._scheduler.check_integrity()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams = SamplingParams(),  # noqa: B008 - frozen
    ) -> Generator[Output, None, None]:
        """Continues all prompts together and yields what each step brings; `request_id` is the prompt's index as text.

        Closing the iterator early cancels what is still running.
        """
        ids = {f"generate-{next(self._names)}": str(index) for index in range(len(prompts))}
        live: set[str] = set()
        try:
            for (request_id, _), prompt in zip(ids.items(), prompts, strict=True):
                self.submit(Request(request_id, tuple(int(token) for token in prompt), params))
                live.add(request_id)
            while live:
                for output in self.step():
                    if output.request_id not in ids:
                        continue
                    if output.finish_reason:
                        live.discard(output.request_id)
                    yield dataclasses.replace(output, request_id=ids[output.request_id])
        finally:
            for request_id in live:
                self.cancel(request_id)
            if live and self.has_work:
                self.step()
