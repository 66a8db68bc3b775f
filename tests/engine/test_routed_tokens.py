"""Each request that asks is told where its tokens went: once each, in order, whatever the company."""

import numpy as np
import pytest

from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.model import Model
from jaxmoe.engine.request import Request, SamplingParams
from jaxmoe.errors import ConfigError
from jaxmoe.models.decoder import Execution

PRESET = "mixtral-8x7b:scale=128,num_hidden_layers=2,vocab_size=128,num_attention_heads=4,num_key_value_heads=2"
ASKS = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, routed_experts=True)


@pytest.fixture(scope="module")
def model():
    return Model(None, "dp=1,ep=2", random_weights=PRESET, execution=Execution(record_routing=True))


def engine_of(model, **limits):
    small = {"page_size": 4, "max_batch": 4, "max_context": 64, "max_prefill_tokens": 8, "max_prefill_sequences": 2}
    return Engine(model, EngineConfig(**small | limits, warm_up=False))


def run(engine, requests):
    """Tokens and rows of experts of every request and sample."""
    for request in requests:
        engine.submit(request)
    tokens, rows, begins = {}, {}, {}
    while engine.has_work:
        for output in engine.step():
            key = (output.request_id, output.index)
            tokens.setdefault(key, []).extend(output.token_ids)
            if (told := output.routed_experts) is not None:
                found = np.frombuffer(told.experts, "<u2").reshape(-1, told.layers, told.k)
                begin = begins.setdefault(key, told.start)
                assert told.start == begin + len(rows.setdefault(key, []))
                rows[key] += list(found)
    return tokens, rows, begins


def test_the_experts_of_a_request_are_those_of_its_tokens_in_one_prompt(model, tmp_path):
    # Too few pages for all, so that some are computed twice.
    engine = engine_of(model, pages_per_rank=14)
    prompts = {str(n): tuple((13 * n + 5 * place) % 120 for place in range(3 + 7 * (n % 4))) for n in range(10)}
    plain = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    requests = [Request(name, prompt, plain if name == "3" else ASKS) for name, prompt in prompts.items()]
    tokens, rows, begins = run(engine, requests)
    assert engine.num_preemptions > 0
    assert ("3", 0) not in rows
    for name, prompt in prompts.items():
        if name == "3":
            continue
        # The last token goes nowhere.
        whole = (*prompt, *tokens[name, 0][:-1])
        assert begins[name, 0] == 0
        alone = engine_of(model, max_prefill_tokens=64)
        run(alone, [Request("whole", whole, SamplingParams(temperature=0, max_tokens=1))])
        alone.save_routing(tmp_path / "routing.npz")
        with np.load(tmp_path / "routing.npz") as told:
            assert np.array_equal(rows[name, 0], told["experts"])


def test_a_further_sample_begins_where_it_computes_for_itself(model):
    prompt = tuple(range(10, 21))
    params = SamplingParams(temperature=1, seed=1, n=2, max_tokens=4, ignore_eos=True, routed_experts=True)
    _, rows, begins = run(engine_of(model), [Request("a", prompt, params)])
    assert begins == {("a", 0): 0, ("a", 1): 8}
    assert len(rows["a", 0]) == 14
    assert np.array_equal(rows["a", 1][:3], rows["a", 0][8:11])


def test_what_is_cached_is_computed_anew_for_who_asks_and_what_is_cancelled_is_forgotten(model):
    engine = engine_of(model)
    prompt = tuple(range(20, 37))
    run(engine, [Request("first", prompt, SamplingParams(max_tokens=1))])
    _, rows, begins = run(engine, [Request("second", prompt, ASKS)])
    assert (begins["second", 0], len(rows["second", 0])) == (0, 26)
    engine.submit(Request("third", prompt, ASKS))
    engine.step()
    engine.cancel("third")
    run(engine, [])
    assert not engine._runner.routed._untold


def test_an_engine_that_does_not_record_says_so():
    engine = engine_of(Model(None, random_weights=PRESET))
    with pytest.raises(ConfigError, match="--routed-experts"):
        engine.submit(Request("a", (1,), ASKS))
    assert not engine.has_work
