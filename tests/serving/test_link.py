import asyncio
import socket
import threading

import pytest

from jaxmoe.engine.request import Output, Request, SamplingParams
from jaxmoe.serving.link import AskLoads, Cancel, EngineLink, FrontendLink, LinkClosed, Outputs, Progress, Submit


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_frames_arrive_whole_and_in_order_both_ways(pair):
    request = Request("1", tuple(range(100_000)), SamplingParams(seed=-1, stop_token_ids=(3,)), rank=2)
    to_engine = [Submit(request), Cancel(["1", "2"]), AskLoads()]
    to_frontend = [Outputs([Output("1", (7,), (-0.5,), "stop", 7)]), Outputs([]), Progress("x" * 500_000)]
    link, received = EngineLink(pair[0]), []

    def engine():
        for frame in to_frontend:
            link.send(frame)
        while len(received) < len(to_engine):
            received.extend(link.receive(block=True))
        link.finish(timeout=20)

    async def frontend():
        frames, closed = asyncio.Queue(), asyncio.Event()
        link = FrontendLink(frames.put_nowait, closed.set)
        await link.connect(pair[1])
        for frame in to_engine:
            link.send(frame)
        async with asyncio.timeout(20):
            came = [await frames.get() for _ in to_frontend]
            link.close()
            await closed.wait()
        link.send(AskLoads())  # to nobody
        return came

    thread = threading.Thread(target=engine)
    thread.start()
    assert asyncio.run(frontend()) == to_frontend
    thread.join(20)
    assert received == to_engine


def test_the_front_end_learns_that_the_engine_is_gone(pair):
    async def frontend():
        closed = asyncio.Event()
        await FrontendLink(print, closed.set).connect(pair[1])
        EngineLink(pair[0]).close()
        await asyncio.wait_for(closed.wait(), 20)

    asyncio.run(frontend())


def test_receiving_without_blocking_returns_at_once(pair):
    assert EngineLink(pair[0]).receive(block=False) == []


def test_the_engine_learns_that_the_front_end_is_gone(pair):
    link = EngineLink(pair[0])
    pair[1].close()
    with pytest.raises(LinkClosed):
        link.receive(block=True)
    with pytest.raises(LinkClosed):
        link.send(Progress("x"))


def test_the_engine_does_not_wait_for_a_reader_within_the_limit(pair):
    link = EngineLink(pair[0], max_unread=2 << 20)
    link.send(Progress("x" * (2 << 20)))


def test_a_reader_that_has_stopped_is_told_in_the_log_and_given_up(pair, caplog):
    link = EngineLink(pair[0], max_unread=1 << 20, patience=0.01)
    with pytest.raises(LinkClosed, match="has read nothing"):
        link.send(Progress("x" * (4 << 20)))
    assert "unread" in caplog.text
