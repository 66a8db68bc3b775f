"""The engine on a real (tiny) model: how requests begin, end and fail; the same tokens whatever the mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.model import Model
from jaxmoe.engine.request import Request, SamplingParams
from jaxmoe.errors import ConfigError, InvalidRequestError, MeshError

GREEDY = SamplingParams(temperature=0, max_tokens=12)
SMALL = EngineConfig(page_size=4, max_batch=4, max_prefill_tokens=16, max_prefill_sequences=4)


@pytest.fixture(scope="module")
def checkpoint(reference_checkpoint):
    return reference_checkpoint(eos_token_id=7)


@pytest.fixture(scope="module")
def model(checkpoint):
    return Model(checkpoint.folder)


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, SMALL)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(1)
    return [rng.integers(8, 128, length).tolist() for length in (3, 17, 1, 30, 16, 2, 9, 40)]


def collect(outputs) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for output in outputs:
        tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


def together(engine, prompts, params=GREEDY):
    tokens = collect(engine.generate(prompts, params))
    engine.check_integrity()
    return [tokens[str(index)] for index in range(len(prompts))]


@pytest.fixture(scope="module")
def alone(engine, prompts):
    return [together(engine, [prompt])[0] for prompt in prompts]


def test_greedy_tokens_are_those_of_transformers(checkpoint, alone, prompts):
    for prompt, tokens in zip(prompts, alone, strict=True):
        expected = checkpoint.greedy(prompt, 12)
        if 7 in expected:
            expected = expected[: expected.index(7) + 1]
        assert tokens == expected


@pytest.mark.parametrize("mesh", ["dp=2,ep=4", "ep=8", "dp=4", "ep=3", "ep=2,tp=2"])
def test_greedy_tokens_are_the_same_for_every_mesh(checkpoint, alone, prompts, mesh):
    engine = Engine(
        Model(checkpoint.folder, mesh),
        EngineConfig(page_size=4, max_batch=2, max_prefill_tokens=16, max_prefill_sequences=2, warm_up=False),
    )
    assert together(engine, prompts) == alone


def test_a_seed_gives_the_same_tokens_alone_and_batched_and_another_seed_others(engine, prompts):
    sampled = SamplingParams(temperature=1.5, top_k=40, top_p=0.95, seed=3, max_tokens=12, ignore_eos=True)
    by_itself = together(engine, prompts[3:4], sampled)[0]
    assert together(engine, prompts, sampled)[3] == by_itself
    assert together(engine, prompts[3:4], SamplingParams(temperature=1.5, seed=4, max_tokens=12))[0] != by_itself


def test_nothing_compiles_after_warm_up(model, prompts):
    engine = Engine(model, SMALL)
    for count in range(1, len(prompts) + 1):
        together(engine, prompts[:count], SamplingParams(temperature=0.5, max_tokens=3))
    assert engine.late_compiles == 0


def test_a_generation_ends_at_its_stop_token_its_length_or_the_context(engine, model, alone, prompts):
    third = alone[3][2]
    stops = alone[3].index(third) + 1
    stopping = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(third,))
    *_, last = engine.generate([prompts[3]], stopping)
    assert (last.finish_reason, last.stop_token) == ("stop", third)
    assert together(engine, [prompts[3]], stopping)[0] == alone[3][:stops]
    *_, last = engine.generate([prompts[3]], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    assert (last.finish_reason, last.stop_token) == ("length", None)
    endless = SamplingParams(temperature=0, ignore_eos=True)
    assert len(together(engine, [prompts[3]], endless)[0]) == model.config.max_position - len(prompts[3])


def test_cancelling_one_request_frees_its_pages_and_leaves_the_others_tokens(engine, alone, prompts):
    for index in (0, 1, 3):
        engine.submit(Request(str(index), tuple(prompts[index]), GREEDY))
    outputs = engine.step()
    assert engine.cancel("1")
    assert not engine.cancel("1")
    assert not engine.cancel("never heard of")
    while engine.has_work:
        outputs += engine.step()
    tokens = collect(outputs)
    assert tokens["0"] == alone[0]
    assert tokens["3"] == alone[3]
    assert [output.finish_reason for output in outputs if output.request_id == "1"][-1] == "abort"
    engine.check_integrity()
    assert all(load.used_pages == 0 for load in engine.loads())


def breaks(engine, monkeypatch, times, doing="launch"):
    """So many steps from now on fail as they are launched or read, and the cache that they had is gone."""
    do, left = getattr(engine._runner, doing), [None] * times

    def failing(work):
        plan = work if doing == "launch" else work.plan
        if not left or plan.empty:
            return do(work)
        left.pop()
        for array in jax.tree.leaves(engine._runner._cache)[:1]:
            array.delete()
        raise RuntimeError("secret detail")

    monkeypatch.setattr(engine._runner, doing, failing)


@pytest.mark.parametrize("doing", ["launch", "read"])
def test_a_device_error_fails_the_requests_of_its_step_and_the_engine_goes_on(
    engine, alone, prompts, monkeypatch, doing
):
    engine.submit(Request("lost", tuple(prompts[1]), GREEDY))
    assert all(not output.finish_reason for _ in range(3) for output in engine.step())
    with monkeypatch.context() as patch:
        # A step in flight is read a second time before it is given up.
        breaks(engine, patch, 1 if doing == "launch" else 2, doing)
        *told, last = engine.step()
    # What the step before brought is told all the same.
    assert [len(output.token_ids) for output in told] == ([1] if doing == "launch" else [])
    assert (last.request_id, last.finish_reason) == ("lost", "error")
    assert last.error == "the step failed with RuntimeError; the engine's log has the details"
    assert not engine.has_work
    engine.check_integrity()
    assert together(engine, prompts) == alone


def test_an_engine_whose_steps_keep_failing_gives_up(model, prompts, monkeypatch):
    engine = Engine(model, dataclasses.replace(SMALL, warm_up=False))
    breaks(engine, monkeypatch, 4)
    for name in "ab":
        engine.submit(Request(name, tuple(prompts[0]), GREEDY))
        assert [output.finish_reason for output in engine.step()] == ["error"]
    engine.submit(Request("c", tuple(prompts[0]), GREEDY))
    with pytest.raises(RuntimeError, match="secret detail"):
        engine.step()


def test_generate_brings_every_sample_to_its_end_and_raises_when_a_step_fails(engine, prompts, monkeypatch):
    params = SamplingParams(temperature=2, seed=1, max_tokens=9, n=2)
    ends = [(out.request_id, out.index) for out in engine.generate(prompts[:2], params) if out.finish_reason]
    assert sorted(ends) == [("0", 0), ("0", 1), ("1", 0), ("1", 1)]
    breaks(engine, monkeypatch, 1)
    with pytest.raises(RuntimeError, match="the step failed"):
        list(engine.generate(prompts[:3], params))
    assert not engine.has_work


def test_closing_generate_early_cancels_what_still_runs(engine, prompts):
    outputs = engine.generate(prompts, GREEDY)
    next(outputs)
    outputs.close()
    assert not engine.has_work
    engine.check_integrity()


def test_a_bad_request_is_refused_and_changes_nothing_for_the_others(engine, model, alone, prompts):
    engine.submit(Request("good", tuple(prompts[1]), GREEDY))
    too_long = tuple([9] * model.config.max_position)
    for bad, said in (
        (Request("a", ()), "empty"),
        (Request("b", (1, 128)), "token 128 at position 1"),
        (Request("c", too_long), "leaves no room"),
        (Request("d", (1,), SamplingParams(top_p=0)), "top_p"),
        (Request("e", (1,), rank=5), "rank=5"),
    ):
        with pytest.raises(InvalidRequestError, match=said):
            engine.submit(bad)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert collect(outputs) == {"good": alone[1]}


def test_log_probabilities_are_those_of_the_uncached_logits(engine, model, prompts):
    prompt = prompts[4]
    outputs = list(engine.generate([prompt], GREEDY))
    tokens = [token for output in outputs for token in output.token_ids]
    logprobs = [logprob for output in outputs for logprob in output.logprobs]
    logits = model.logits(np.array([prompt + tokens]))[0].astype(np.float64)
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [log_softmax[len(prompt) - 1 + index, token] for index, token in enumerate(tokens)]
    np.testing.assert_allclose(logprobs, expected, atol=5e-4)


def test_a_mesh_that_does_not_fit_says_what_would(checkpoint):
    with pytest.raises(MeshError, match=r"needs 16 devices and 8 cpu are here|16 devices are needed"):
        Model(checkpoint.folder, "ep=16")
    with pytest.raises(MeshError, match=r"tp=7 divides none of heads=4, .*; use tp in 1, 2, "):
        Model(checkpoint.folder, "tp=7")


def test_a_dtype_or_memory_that_cannot_work_is_explained(checkpoint, model):
    with pytest.raises(ConfigError, match="dtype='int8' is not one of"):
        Model(checkpoint.folder, dtype="int8")
    with pytest.raises(ConfigError, match="max_context=65 is beyond the model's 64 positions"):
        Engine(model, EngineConfig(max_context=65))
    with pytest.raises(ConfigError, match="max_batch=0"):
        EngineConfig(max_batch=0)
