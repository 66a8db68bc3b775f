import asyncio
import contextlib

import pytest
from fake_engine import model_info
from harness import serving, tls

import jaxmoe
from jaxmoe.engine.request import SamplingParams
from jaxmoe.errors import InvalidRequestError, JaxmoeError, QueueFullError, UnavailableError

TEXT = "one two three END of the story"
TALK = [{"role": "user", "content": "one two"}]


@contextlib.contextmanager
def both(address, **access):
    """The two kinds of client, both called as the synchronous one is."""
    with jaxmoe.client.connect(address, **access) as client, asyncio.Runner() as runner:
        other = runner.run(_made(address, access))

        class Awaited:
            def __getattr__(self, name):
                async def collected(*args, **options):
                    answer = getattr(other, name)(*args, **options)
                    return [delta async for delta in answer] if hasattr(answer, "asend") else await answer

                return lambda *args, **options: runner.run(collected(*args, **options))

        yield client, Awaited()
        runner.run(other.close())


async def _made(address, access):
    return jaxmoe.client.connect_async(address, **access)


def test_both_clients_answer_alike(server, tokenizer):
    with both(server.address) as clients:
        answers = [
            (
                client.generate("one two", max_tokens=7),
                "".join(delta.text for delta in client.stream("one two", SamplingParams(max_tokens=7))),
                client.generate(TEXT, stop=["END"], max_tokens=50).text,
                client.generate([40, 41], max_tokens=3).token_ids,
                client.chat(TALK, max_tokens=5).token_ids,
                [token for delta in client.stream_chat(TALK, max_tokens=5) for token in delta.token_ids],
                client.score([40, 41, 42]).logprobs,
            )
            for client in clients
        ]
    assert answers[0] == answers[1]
    answer, streamed, stopped, tokens, said, said_in_pieces, logprobs = answers[0]
    assert (answer.text, answer.finish_reason) == (streamed, "length")
    assert stopped == "one two three "
    assert tokens == (40, 41, 40)
    assert logprobs == (None, -1.0, -2.0)
    assert list(said) == said_in_pieces == tokenizer.encode_chat(TALK)[:5]


def test_what_is_asked_for_reaches_the_engine(server):
    with jaxmoe.client.connect(server.address) as client:
        client.generate([5], temperature=0.5, top_k=3, seed=7, max_tokens=2, stop_token_ids=(9,), ignore_eos=True)
        asked = server.engine.submitted[-1].params
        assert asked == SamplingParams(0.5, 3, 1.0, 7, 2, (9,), True)
        with pytest.raises(TypeError, match="not both"):
            client.generate([5], SamplingParams(), max_tokens=2)


def test_a_full_queue_is_tried_again_when_it_says(checkpoint, monkeypatch):
    pauses = []
    with serving(model_info(checkpoint), pace=0.001) as server:
        server.engine.refusal = QueueFullError("full")

        def wait(seconds):
            pauses.append(seconds)
            if len(pauses) == 2:
                server.engine.refusal = None

        monkeypatch.setattr("jaxmoe.client.sleep", wait)

        with jaxmoe.client.connect(server.address) as client:
            assert client.generate([5], max_tokens=1).token_ids == (5,)
            server.engine.refusal = QueueFullError("full")
            with pytest.raises(QueueFullError, match="full"):
                jaxmoe.client.connect(server.address, retries=0).generate([5], max_tokens=1)
            with pytest.raises(QueueFullError, match="full"):
                client.generate([5], max_tokens=1, timeout=0.5)  # no time to wait as long as the server says
    assert len(pauses) == 2
    assert all(1 < pause < 1.5 for pause in pauses)


@pytest.mark.parametrize(
    ("refusal", "raised"), [(InvalidRequestError("bad", "prompt"), InvalidRequestError), (ValueError("x"), JaxmoeError)]
)
def test_what_will_not_pass_later_is_not_tried_again(server, monkeypatch, refusal, raised):
    monkeypatch.setattr("jaxmoe.client.sleep", lambda seconds: pytest.fail("tried again"))
    server.engine.refusal = refusal
    try:
        with jaxmoe.client.connect(server.address) as client, pytest.raises(raised):
            client.generate([5], max_tokens=1)
    finally:
        server.engine.refusal = None


def test_an_answer_that_has_begun_is_not_begun_again(checkpoint):
    with serving(model_info(checkpoint), pace=0.001, step_timeout=0.5) as server:
        answer = jaxmoe.client.connect(server.address).stream([5])
        next(answer)
        server.engine.gate.clear()
        with pytest.raises(UnavailableError, match="has not finished a step"):
            list(answer)
        server.engine.gate.set()
        assert len(server.engine.submitted) == 1


def test_tls_and_tokens(checkpoint, pki, tmp_path):
    file = tmp_path / "tokens"
    file.write_text("alpha\n")
    with serving(model_info(checkpoint), auth_token_file=str(file), **tls(pki)) as server:
        access = {"tls_ca": str(pki / "ca.pem"), "token": "alpha"}
        with both(server.address, **access) as clients:
            assert [client.generate([5], max_tokens=1).token_ids for client in clients] == [(5,), (5,)]
        with pytest.raises(JaxmoeError, match="UNAUTHENTICATED"):
            jaxmoe.client.connect(server.address, **access | {"token": "beta"}).generate([5], max_tokens=1)
    with pytest.raises(JaxmoeError, match="/no/file: No such file"):
        jaxmoe.client.connect("127.0.0.1:1", tls_ca="/no/file")


def test_leaving_a_stream_cancels_it(server):
    async def leave():
        async with jaxmoe.client.connect_async(server.address) as client:
            async for delta in client.stream([5, 6]):
                assert delta.token_ids[0] == 5
                return server.engine.submitted[-1].id
        return None

    key = asyncio.run(leave())
    server.engine.wait_until(lambda engine: key in engine.cancelled)
