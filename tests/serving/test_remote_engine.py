import asyncio
import contextlib
import itertools
from types import SimpleNamespace

import pytest
from fake_engine import model_info

from jaxmoe.engine.request import Output, SamplingParams
from jaxmoe.serving.link import Outputs, Ready
from jaxmoe.serving.remote_engine import WOKEN_TOGETHER, Phase, RemoteEngine

STREAMS = 10 * WOKEN_TOGETHER


@contextlib.asynccontextmanager
async def remote(info, **limits):
    """One that serves, and what it has sent to the engine since."""
    engine, sent = RemoteEngine(**{"step_timeout": 60, "max_backlog": 10} | limits), []
    engine.link.send = sent.append
    engine._receive(Ready(info))
    async with asyncio.timeout(20):
        while engine.phase is not Phase.SERVING:
            engine.phase_changed.clear()
            await engine.phase_changed.wait()
        sent.clear()
        yield engine, sent


def test_others_have_their_turn_while_hundreds_of_streams_are_read(checkpoint):
    async def scenario():
        seen = []

        async def read(engine, name):
            with engine.open(name, streams=True) as stream:
                engine.submit(stream, [5], SamplingParams(), None)
                while (piece := await stream.read()).finish is None:
                    seen.append((name, piece.token_ids))

        async with remote(model_info(checkpoint, max_running=STREAMS)) as (engine, sent):
            readers = [asyncio.create_task(read(engine, str(n))) for n in range(STREAMS)]
            while len(sent) < STREAMS:
                await asyncio.sleep(0)
            keys = [frame.request.id for frame in sent]
            engine._receive(Outputs([Output(key, (7,), (0.0,)) for key in keys]))
            await asyncio.sleep(0)
            # Another step is over before all have read what the first brought.
            engine._receive(Outputs([Output(key, (8,), (0.0,)) for key in keys]))
            for _ in range(STREAMS):
                seen.append(None)
                await asyncio.sleep(0)
            engine._receive(Outputs([Output(key, (), (), "length") for key in keys]))
            await asyncio.gather(*readers)
        turns = [len(list(turn)) for read, turn in itertools.groupby(seen, lambda each: each is not None) if read]
        assert max(turns) == WOKEN_TOGETHER
        assert {tuple(tokens) for name, tokens in filter(None, seen) if name == str(STREAMS - 1)} == {(7, 8)}

    asyncio.run(scenario())


def test_time_for_which_the_server_was_stopped_is_not_the_engines(checkpoint, monkeypatch):
    async def scenario():
        async with remote(model_info(checkpoint), step_timeout=80) as (engine, _):
            with engine.open("a", streams=True) as stream:
                engine.submit(stream, [5], SamplingParams(), None)
                now, phases = engine.last_word, []
                # In eighths of the limit, but for the once that it comes back late.
                naps = iter([10, 500, *[10] * 9])

                async def sleep(seconds):
                    nonlocal now
                    phases.append(engine.phase)
                    now += next(naps)

                with monkeypatch.context() as patched:
                    patched.setattr("jaxmoe.serving.remote_engine.time", SimpleNamespace(monotonic=lambda: now))
                    patched.setattr("jaxmoe.serving.remote_engine.asyncio", SimpleNamespace(sleep=sleep))
                    with pytest.raises(RuntimeError, match="StopIteration"):
                        await engine.watch()
                assert phases == [Phase.SERVING] * 11 + [Phase.STALLED]

    asyncio.run(scenario())
