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


class Collector(FrontendLink):
    """The front end's end, which notes what comes."""

    def __init__(self):
        self.frames, self.closed = [], asyncio.Event()
        super().__init__(self.frames.append, self.closed.set)


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
        link.close()

    async def frontend():
        collector = Collector()
        await collector.connect(pair[1])
        for frame in to_engine:
            collector.send(frame)
        await asyncio.wait_for(collector.closed.wait(), 20)
        collector.send(AskLoads())  # to nobody
        return collector.frames

    thread = threading.Thread(target=engine)
    thread.start()
    assert asyncio.run(frontend()) == to_frontend
    thread.join(20)
    assert received == to_engine


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
        for _ in range(4):
            link.send(Progress("x" * (1 << 20)))
    assert "unread" in caplog.text
