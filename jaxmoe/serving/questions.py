"""What the front end asks the engine beside requests for tokens, and its answers. Imports neither jax nor grpc."""

import asyncio
import itertools
from collections.abc import Callable

from jaxmoe.errors import UnavailableError
from jaxmoe.serving.link import AskLoads, Loads, RankLoad, Table, ToEngine
from jaxmoe.serving.rejections import exception

_LOADS_TIMEOUT = 5.0


class Questions:
    """Those that have no answer yet. send: takes a frame to the engine."""

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        self._send = send
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[bytes]] = {}
        self._loads: asyncio.Future[list[RankLoad]] | None = None

    async def ask(self, frame: Callable[[int], ToEngine]) -> bytes:
        """The content of the `Table` that answers the frame of this number; raises why there is none."""
        number = next(self._numbers)
        self._asked[number] = asyncio.get_running_loop().create_future()
        self._send(frame(number))
        try:
            return await self._asked[number]
        finally:
            del self._asked[number]

    async def loads(self) -> list[RankLoad]:
        """All that wait share one answer. Raises UnavailableError if none comes soon."""
        if self._loads is None:
            self._loads = asyncio.get_running_loop().create_future()
            self._send(AskLoads())
        try:
            return await asyncio.wait_for(asyncio.shield(self._loads), _LOADS_TIMEOUT)
        except TimeoutError:
            raise UnavailableError(f"the engine has not reported its loads within {_LOADS_TIMEOUT:g} s") from None

    def answered(self, frame: Table | Loads) -> None:
        match frame:
            case Loads(ranks):
                if self._loads is not None:
                    self._loads.set_result(ranks)
                self._loads = None
            case Table(number, content, problem):
                asked = self._asked.get(number)
                if asked is not None and not asked.done():
                    if problem is None:
                        asked.set_result(content)
                    else:
                        asked.set_exception(exception(problem))

    def fail(self, error: Exception) -> None:
        """No answer comes any more."""
        if self._loads is not None:
            self._loads.set_exception(error)
            self._loads.exception()  # asked for, lest it be logged where nobody waits
            self._loads = None
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(error)
