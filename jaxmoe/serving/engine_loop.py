"""The engine's side of the link: receive, step, send, until the front end is gone."""

import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from jaxmoe.engine.request import Output, Request
from jaxmoe.errors import DuplicateRequestError, InvalidRequestError, JaxmoeError, QueueFullError
from jaxmoe.serving.link import (
    AskLoads,
    Cancel,
    EngineLink,
    Fatal,
    LinkClosed,
    Loads,
    Outputs,
    RankLoad,
    Rejected,
    Serving,
    Submit,
)

logger = logging.getLogger(__name__)


class EngineRankLoad(Protocol):
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def used_pages(self) -> int: ...
    @property
    def total_pages(self) -> int: ...


class EngineLike(Protocol):
    """What serving asks of an engine; `jaxmoe.engine.engine.Engine` is one."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str, index: int | None = None) -> bool: ...
    def step(self) -> list[Output]: ...
    def loads(self) -> Iterable[EngineRankLoad]: ...


def serve_engine(engine: EngineLike, link: EngineLink, *, on_serving: Callable[[], object] = lambda: None) -> None:
    """Runs the engine for the front end at the other end of the link; returns once that is gone.

    on_serving: called once the front end, told that the engine is ready, lets requests through.

    A request the engine refuses is told so and disturbs nothing else. If the engine fails in any other way, the front
    end is told that it is lost, and the exception is raised.
    """
    try:
        while True:
            for frame in link.receive(block=not engine.has_work):
                match frame:
                    case Submit(request):
                        if rejected := _submit(engine, request):
                            link.send(rejected)
                    case Cancel(ids, index):
                        for request_id in ids:
                            engine.cancel(request_id, index)
                    case AskLoads():
                        link.send(_loads(engine))
                    case Serving():
                        on_serving()
            if engine.has_work:
                link.send(Outputs(engine.step()))
    except LinkClosed as closed:
        logger.debug("the engine stops: %s", closed)
    except Exception as error:
        with contextlib.suppress(LinkClosed):
            link.send(Fatal(f"the engine failed with {type(error).__name__}; the server's log has the details"))
            link.finish(timeout=10)
        raise


def _submit(engine: EngineLike, request: Request) -> Rejected | None:
    try:
        engine.submit(request)
    except InvalidRequestError as error:
        return Rejected(request.id, "invalid", str(error), error.field)
    except DuplicateRequestError as error:
        return Rejected(request.id, "duplicate", str(error))
    except QueueFullError as error:
        return Rejected(request.id, "queue_full", str(error))
    except JaxmoeError as error:
        return Rejected(request.id, "unavailable", str(error))
    except Exception:
        logger.exception("the engine failed to take a request")
        return Rejected(
            request.id, "internal", "the engine failed to take this request; the server's log has the details"
        )
    return None


def _loads(engine: EngineLike) -> Loads:
    return Loads([RankLoad(rank.running, rank.waiting, rank.used_pages, rank.total_pages) for rank in engine.loads()])
