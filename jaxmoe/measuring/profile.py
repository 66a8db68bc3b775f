"""An engine that records some of its steps for whoever wants to know where the time goes."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxmoe.engine.engine import Counters, Engine, StepReport
from jaxmoe.engine.kv_events import KvEventBatch
from jaxmoe.engine.rebalancing import RebalanceCounts, RebalanceReport
from jaxmoe.engine.request import Output, Request
from jaxmoe.engine.scheduler import RankLoad
from jaxmoe.errors import ConfigError
from jaxmoe.measuring import trace
from jaxmoe.measuring.breakdown import break_down, table
from jaxmoe.moe.statistics import LoadStatistics

# The first steps touch memory that nobody has touched yet.
PASSED_OVER = 4


class ProfiledEngine:
    """Serves as `engine` does; of its steps that have work, `steps` are recorded into `folder`, after the first few.

    steps: 0 records only what `start` asks for.
    report: told the table by scope once they are, by a thread of its own.
    """

    def __init__(self, engine: Engine, folder: Path, steps: int, report: Callable[[str], object]) -> None:
        self._engine, self.folder, self._report = engine, folder, report
        self._number = 0
        self._first: int | None = PASSED_OVER + 1 if steps else None
        self._last: int | None = PASSED_OVER + steps
        self._recording = False
        self._summing_up: threading.Thread | None = None

    def start(self, steps: int | None) -> None:
        """Records from the next step on, so many, or until `stop`. Raises ConfigError while steps are recorded."""
        if self._first is not None or (self._summing_up and self._summing_up.is_alive()):
            raise ConfigError("steps are being recorded, or summed up, already; try again when that is done")
        self._first, self._last = self._number + 1, None if steps is None else self._number + steps

    def stop(self) -> bool:
        """Ends a recording; whether there was one."""
        stopped, self._first = self._recording, None
        self._stop()
        return stopped

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def submit(self, request: Request) -> None:
        self._engine.submit(request)

    def cancel(self, request_id: str, index: int | None = None) -> bool:
        return self._engine.cancel(request_id, index)

    def loads(self) -> Iterable[RankLoad]:
        return self._engine.loads()

    def clear_prefix_cache(self) -> None:
        self._engine.clear_prefix_cache()

    def kv_events(self) -> list[KvEventBatch]:
        return self._engine.kv_events()

    def counters(self) -> Counters:
        return self._engine.counters()

    @property
    def statistics(self) -> LoadStatistics:
        return self._engine.statistics

    @property
    def rebalances(self) -> RebalanceCounts:
        return self._engine.rebalances

    @property
    def last_rebalance(self) -> RebalanceReport | None:
        return self._engine.last_rebalance

    @property
    def last_step(self) -> StepReport:
        return self._engine.last_step

    def step(self) -> list[Output]:
        self._number += 1
        if self._number == self._first:
            trace.start(self.folder)
            self._recording = True
        if not self._recording:
            return self._engine.step()
        with trace.step(self._number):
            outputs = self._engine.step()
        if self._number == self._last:
            self._stop()
        return outputs

    def close(self) -> None:
        """Ends a recording that is under way, whatever it has, and waits until it has been reported."""
        self._stop()
        if self._summing_up:
            self._summing_up.join()

    def _stop(self) -> None:
        if not self._recording:
            return
        self._recording, self._first = False, None
        trace.stop()
        # Reading a recording takes seconds, many on a large mesh: beside the steps, which clients wait for.
        self._summing_up = threading.Thread(target=self._sum_up)
        self._summing_up.start()

    def _sum_up(self) -> None:
        found = break_down(trace.read(self.folder), self._engine.programs)
        self._report("\n".join([f"profile in {self.folder}:", *table(found)]))
