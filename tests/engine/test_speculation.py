"""Tokens with drafts are those without, whatever the company; a draft costs no more than its place in a step."""

import dataclasses
import itertools

import numpy as np
import pytest

from jaxmoe.demo import find_model
from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.model import Model
from jaxmoe.engine.request import Request, SamplingParams
from jaxmoe.errors import ConfigError

GREEDY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
PLAIN = EngineConfig(page_size=4, max_batch=4, max_context=128, max_prefill_tokens=16, warm_up=False)
DRAFTS = dataclasses.replace(PLAIN, speculate="mtp")


@pytest.fixture(scope="module")
def models():
    """The demo model, whose drafts are right about every second time, by mesh and kernels."""
    made = {}

    def make(mesh="ep=1", kernels="auto"):
        if (mesh, kernels) not in made:
            made[mesh, kernels] = Model(find_model("demo:deepseek-v3"), mesh, kernels=kernels)
        return made[mesh, kernels]

    return make


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(3)
    # A text that goes on as it began is one of whose tokens a draft is often right.
    return [
        rng.integers(8, 4096, length).tolist() * times for length, times in ((3, 5), (17, 1), (1, 1), (6, 5), (9, 2))
    ]


def run(engine, requests):
    """Tokens and log-probabilities of each request's samples."""
    found = {}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for output in engine.step():
            tokens, logprobs = found.setdefault((output.request_id, output.index), ([], []))
            tokens += output.token_ids
            logprobs += zip(output.logprobs, output.top_logprobs or [()] * len(output.token_ids), strict=True)
        engine.check_integrity()
    assert all(load.used_pages == 0 for load in engine.loads())
    return found


def asked(prompts, params=GREEDY, ranks=1):
    return [Request(str(i), tuple(prompt), params, rank=i % min(2, ranks)) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def expected(models, prompts):
    return run(Engine(models(), PLAIN), asked(prompts))


@pytest.mark.parametrize(
    ("mesh", "kernels", "limits"),
    [
        ("ep=1", "auto", {}),
        ("ep=1", "xla", {"max_prefill_sequences": 2}),
        ("ep=1", "auto", {"max_prefill_tokens": 5, "max_batch": 3, "max_batch_tokens": 7}),
        ("ep=1", "auto", {"pages_per_rank": 13}),
        ("dp=2,ep=2", "auto", {"max_batch": 2}),
    ],
    ids=str,
)
def test_greedy_tokens_are_the_same_with_drafts(models, prompts, expected, mesh, kernels, limits):
    engine = Engine(models(mesh, kernels), dataclasses.replace(DRAFTS, **limits))
    ranks = len(engine.loads())
    found = run(engine, asked(prompts, ranks=ranks))
    assert {key: tokens for key, (tokens, _) in found.items()} == {key: each for key, (each, _) in expected.items()}
    if (mesh, kernels) == ("ep=1", "auto") and not engine.num_preemptions:
        # Nothing rounds otherwise in company or with a draft, but what is computed anew as a piece of a prompt.
        for key, (_, logprobs) in found.items():
            assert logprobs == expected[key][1]
    stats = engine.stats()
    assert 0 < stats.accepted_drafts < stats.drafts
    assert engine.counters().drafts == stats.drafts
    assert (engine.num_preemptions > 0) == ("pages_per_rank" in limits)
    # Once more, from the prefix cache.
    again = run(
        engine, asked([[*prompt, *expected[str(i), 0][0][:3]] for i, prompt in enumerate(prompts)], ranks=ranks)
    )
    # Of so few pages none outlives the requests after it.
    assert engine.stats().hit_tokens > stats.hit_tokens or engine.num_preemptions
    for key, (tokens, _) in again.items():
        assert tokens[:11] == expected[key][0][3:]


def test_sampled_tokens_are_the_same_with_drafts_whatever_a_row_asks_for(models, prompts):
    params = SamplingParams(max_tokens=12, seed=5, temperature=0.5)
    each = [
        {},
        {"n": 2, "top_p": 0.8},
        {"logprobs": 3, "top_k": 3},
        {"min_tokens": 6, "stop_token_ids": tuple(range(0, 4096, 3))},
        {"logit_bias": {17: 8.0, 300: 9.0}},
        {"frequency_penalty": 0.5},
        {"temperature": 0.0, "stop_token_ids": tuple(range(0, 4096, 7))},
        {"prompt_logprobs": 2},
    ]
    requests = [
        Request(str(i), tuple(prompts[i % len(prompts)]), dataclasses.replace(params, **one))
        for i, one in enumerate(each)
    ]
    plain, drafted = (Engine(models(), config) for config in (PLAIN, DRAFTS))
    assert run(drafted, requests) == run(plain, requests)
    assert 0 < drafted.stats().accepted_drafts < drafted.stats().drafts
    penalised = Engine(models(), DRAFTS)
    run(penalised, [requests[5]])
    assert penalised.stats().drafts == 0
    assert np.isnan(penalised.stats().accepted_length)


def test_tokens_are_distributed_as_the_models_are():
    model = Model(
        None,
        random_weights="deepseek-v3:scale=64,num_hidden_layers=2,first_k_dense_replace=1,vocab_size=5,"
        "n_routed_experts=8,n_group=2,topk_group=2,num_experts_per_tok=2",
    )
    prompt, temperature, count = (2, 3, 4), 1.3, 1000

    def after(*tokens):
        logits = model.logits([[*prompt, *tokens]])[0, -1] / temperature
        return np.exp(logits - np.logaddexp.reduce(logits))

    # Of the third token, the first that may be one beyond a draft.
    wanted = sum(after()[one] * after(one)[two] * after(one, two) for one, two in itertools.product(range(5), repeat=2))
    engine = Engine(model, dataclasses.replace(DRAFTS, max_batch=64, max_prefill_tokens=64, max_prefill_sequences=16))
    params = SamplingParams(temperature=temperature, max_tokens=3, ignore_eos=True)
    found = run(engine, [Request(str(i), prompt, dataclasses.replace(params, seed=i)) for i in range(count)])
    stats = engine.stats()
    assert 0.05 * count < stats.accepted_drafts < stats.drafts == count
    seen = np.bincount([tokens[2] for tokens, _ in found.values()], minlength=5)
    # Chi-square of 4 degrees of freedom is above 18.5 once in 1,000 sets of seeds, and these stay what they are.
    assert np.sum((seen - count * wanted) ** 2 / (count * wanted)) < 18.5


@pytest.mark.parametrize("kernels", ["native", "xla"])
def test_nothing_is_compiled_after_warm_up(models, prompts, kernels):
    config = dataclasses.replace(DRAFTS, warm_up=True, max_batch=2, max_context=48, max_prefill_sequences=1)
    engine = Engine(models(kernels=kernels), config)
    params = [GREEDY, dataclasses.replace(GREEDY, logprobs=2, logit_bias={9: 1.0}, prompt_logprobs=0)]
    run(engine, [Request(str(i), tuple(prompt), params[i % 2]) for i, prompt in enumerate(prompts)])
    assert engine.stats().drafts > 0
    assert engine.late_compiles == 0


def test_a_checkpoint_without_the_layer_is_refused(reference_checkpoint):
    with pytest.raises(ConfigError, match="needs a layer for multi-token prediction"):
        Engine(Model(reference_checkpoint().folder), dataclasses.replace(DRAFTS, max_context=64))
    with pytest.raises(ConfigError, match="speculate='ngram'"):
        EngineConfig(speculate="ngram")
    with pytest.raises(ConfigError, match="use max_batch_tokens >= 8"):
        dataclasses.replace(DRAFTS, max_batch_tokens=7)
