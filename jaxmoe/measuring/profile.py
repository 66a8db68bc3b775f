"""An engine that records some of its steps for whoever wants to know where the time goes."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxmoe.engine.engine import Engine
from jaxmoe.engine.request import Output, Request
from jaxmoe.engine.scheduler import RankLoad
from jaxmoe.measuring import trace
from jaxmoe.measuring.breakdown import break_down, table

# The first steps touch memory that nobody has touched yet.
PASSED_OVER = 4


class ProfiledEngine:
    """Serves as `engine` does; of its steps that have work, `steps` are recorded into `folder`, after the first few.

    report: told the table by scope once they are, by a thread of its own.
    """

    def __init__(self, engine: Engine, folder: Path, steps: int, report: Callable[[str], object]) -> None:
        self._engine, self._folder, self._report = engine, folder, report
        self._number, self._last = 0, PASSED_OVER + steps
        self._recording = False
        self._summing_up: threading.Thread | None = None

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def submit(self, request: Request) -> None:
        self._engine.submit(request)

    def cancel(self, request_id: str, index: int | None = None) -> bool:
        return self._engine.cancel(request_id, index)

    def loads(self) -> Iterable[RankLoad]:
        return self._engine.loads()

    def step(self) -> list[Output]:
        self._number += 1
        if self._number == PASSED_OVER + 1:
            trace.start(self._folder)
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
        self._recording = False
        trace.stop()
        # Reading a recording takes seconds, many on a large mesh: beside the steps, which clients wait for.
        self._summing_up = threading.Thread(target=self._sum_up)
        self._summing_up.start()

    def _sum_up(self) -> None:
        found = break_down(trace.read(self._folder), self._engine.programs)
        self._report("\n".join([f"profile in {self._folder}:", *table(found)]))
