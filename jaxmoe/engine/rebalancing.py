"""Experts on the move while an engine serves: layer by layer, a few with each step, never more than a budget.

A layer's experts are fetched beside it, checked, and then put in place together with the map that sends tokens to them.
Until then, and after any failure or the deadline, the layer and its map are as they were.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxmoe.engine.config import Rebalance
from jaxmoe.engine.model import LayerMove, Model
from jaxmoe.errors import ConfigError, JaxmoeError
from jaxmoe.moe.balancing import device_loads, plan
from jaxmoe.moe.statistics import BLOCK, LoadStatistics, balancedness

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RebalanceReport:
    """One rebalance, under way or over.

    trigger: "call", "interval" or "threshold".
    outcome: "running", "done", "failed" or "deadline"; with these two, layers that had not moved stay as they were.
    reason: why it failed.
    looked_at, moved_layers: mixture layers. moved_experts, moved_bytes: that were put into other slots.
    steps, seconds: that it took. moving_seconds: of them, spent on moving; worst_moving_seconds: in one step at most.
    worst_step_seconds: the longest step with what moved in it; usual_step_seconds: the median without.
    before, after: balancedness of the loads that were planned for; 1 without loads.
    """

    trigger: str
    outcome: str = "running"
    reason: str = ""
    looked_at: int = 0
    moved_layers: int = 0
    moved_experts: int = 0
    moved_bytes: int = 0
    steps: int = 0
    seconds: float = 0.0
    moving_seconds: float = 0.0
    worst_moving_seconds: float = 0.0
    worst_step_seconds: float = 0.0
    usual_step_seconds: float = 0.0
    before: float = 1.0
    after: float = 1.0

    def __str__(self) -> str:
        told = (
            f"rebalance by {self.trigger}: {self.outcome}, {self.moved_experts} experts of {self.moved_layers} layers "
            f"({self.moved_bytes / 2**20:.1f} MiB) moved in {self.steps} steps and {self.seconds:.1f} s, balancedness "
            f"{self.before:.3f} to {self.after:.3f}, longest step {1e3 * self.worst_step_seconds:.1f} ms "
            f"({1e3 * self.worst_moving_seconds:.1f} ms of it moving at most; usually "
            f"{1e3 * self.usual_step_seconds:.1f} ms a step)"
        )
        return f"{told}; {self.reason}" if self.reason else told


class RebalanceCounts(NamedTuple):
    """Rebalances that are over, by how they ended, and what moved in all that there were."""

    done: int = 0
    failed: int = 0
    deadline: int = 0
    moved_experts: int = 0
    moved_bytes: int = 0


class Rebalancer:
    """Looks at the loads as configured, and moves experts when there is something to gain."""

    def __init__(self, model: Model, statistics: LoadStatistics, config: Rebalance) -> None:
        """Compiles what moves experts. Raises ConfigError if the model's slots do not suffice."""
        self._model, self._statistics, self._config = model, statistics, config
        self._mover = model.mover
        layers, experts = len(model.slot_expert), model.config.experts
        # Whatever the loads, it can be planned for.
        plan(np.zeros((layers, experts)), self._devices, model.slot_expert, config.devices_at_least)
        self._work: Iterator[int] | None = None
        self._looked = 0
        self._began = 0.0
        self._usual: list[float] = []
        self.report: RebalanceReport | None = None
        self.counts = RebalanceCounts()

    @property
    def active(self) -> bool:
        return self._work is not None

    def start(self, trigger: str, slot_expert: Int[np.ndarray, "L S"] | None = None) -> None:
        """Begins with the next step. slot_expert: where to; None plans for the loads of the window."""
        if self.active:
            raise ConfigError("experts are on the move already; wait until they have arrived")
        target = None if slot_expert is None else self._model.checked_placement(slot_expert)
        usual = float(np.median(self._usual)) if self._usual else 0.0
        loads = self._loads()
        before = self._balance(loads)
        self.report = RebalanceReport(trigger, usual_step_seconds=usual, before=before, after=before)
        self._began = time.perf_counter()
        self._work = self._moves(loads, target)

    def step(self, seconds: float) -> None:
        """To be called after each step of the engine, which took so long."""
        if self._work is None:
            self._usual = [*self._usual[-63:], seconds] if seconds else self._usual
            self._look()
            return
        began = time.perf_counter()
        try:
            outcome = self._advance(self._work)
        except (JaxmoeError, RuntimeError) as error:
            # XLA's own errors are RuntimeErrors. Of what fails here, steps do not know.
            outcome = "failed"
            self._tell(reason=f"{type(error).__name__}: {error}")
        now = time.perf_counter()
        report, moving = self._now(), now - began
        self._tell(
            steps=report.steps + 1,
            seconds=now - self._began,
            moving_seconds=report.moving_seconds + moving,
            worst_moving_seconds=max(report.worst_moving_seconds, moving),
            worst_step_seconds=max(report.worst_step_seconds, seconds + moving),
        )
        if outcome:
            self._finish(outcome)

    def _look(self) -> None:
        """Whether it is time to move."""
        config, calls = self._config, self._statistics.num_calls
        # A threshold is looked at as often as the statistics are read.
        every = config.interval or (2 * BLOCK if config.threshold else 0)
        if not every or calls - self._looked < every:
            return
        self._looked = calls
        found = self._statistics.report()
        if found is None:
            return
        if config.threshold and found.of_ceiling < config.threshold:
            self.start("threshold")
        elif config.interval and not config.threshold:
            self.start("interval")

    def _advance(self, work: Iterator[int]) -> str:
        """Moves on until the budget of a step is spent; the outcome, "" while there is none."""
        left = self._config.bytes_per_step
        while True:
            if time.perf_counter() - self._began > self._config.deadline:
                return "deadline"
            spent = next(work, None)
            if spent is None:
                return "done"
            left -= spent
            if left < self._mover.slot_bytes:
                return ""

    def _moves(self, loads: Int[np.ndarray, "L E"], target: Int[np.ndarray, "L S"] | None) -> Iterator[int]:
        """Yields the bytes that each piece of the work takes of a step's budget; all of it, what should end a step."""
        model, config = self._model, self._config
        for layer in range(len(model.slot_expert)):
            of_layer = slice(layer, layer + 1)
            if target is None:
                present = model.slot_expert[of_layer]
                planned = plan(loads[of_layer], self._devices, present, config.devices_at_least, config.least_gain)[0]
            else:
                planned = target[layer]
            self._tell(looked_at=layer + 1)
            move = LayerMove(model, layer, planned)
            if not move.moves:
                # On a large model planning takes milliseconds a layer.
                yield config.bytes_per_step
                continue
            while not move.fetched:
                move.fetch()
                yield self._mover.slot_bytes
            # Checked and put in place in a step of its own, which moves nothing else.
            yield config.bytes_per_step
            move.commit()
            report, counts, size = self._now(), self.counts, move.moves * self._mover.slot_bytes
            self.counts = counts._replace(
                moved_experts=counts.moved_experts + move.moves, moved_bytes=counts.moved_bytes + size
            )
            self._tell(
                moved_layers=report.moved_layers + 1,
                moved_experts=report.moved_experts + move.moves,
                moved_bytes=report.moved_bytes + size,
                after=self._balance(loads),
            )
            yield config.bytes_per_step

    def _finish(self, outcome: str) -> None:
        self._work = None
        self._tell(outcome=outcome)
        self.counts = self.counts._replace(**{outcome: getattr(self.counts, outcome) + 1})
        report = self._now()
        (log.error if outcome == "failed" else log.info)("%s", report)
        if report.moved_layers:
            # Loads of devices under the old map say nothing of the new one.
            self._statistics.restart()
        self._looked = self._statistics.num_calls

    def _loads(self) -> Int[np.ndarray, "L E"]:
        """Of the window; of mixture layers that the engine does not run, 0."""
        loads = np.zeros((len(self._model.slot_expert), self._model.config.experts), np.int64)
        counted = self._statistics.experts()
        loads[: len(counted)] = counted
        return loads

    def _balance(self, loads: Int[np.ndarray, "L E"]) -> float:
        return balancedness(device_loads(self._model.slot_expert, loads, self._devices))

    @property
    def _devices(self) -> int:
        return self._model.mesh_spec.expert_devices

    def _now(self) -> RebalanceReport:
        assert self.report is not None
        return self.report

    def _tell(self, **changes: object) -> None:
        self.report = dataclasses.replace(self._now(), **changes)  # type: ignore[arg-type]
