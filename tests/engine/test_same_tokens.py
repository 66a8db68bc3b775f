"""The same greedy tokens, which are transformers', whatever way an engine comes to them."""

import dataclasses

import numpy as np
import pytest

from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.model import Model
from jaxmoe.engine.request import Request, SamplingParams
from jaxmoe.spans import FULL

CACHES = {
    "keys and values": ("mixtral", {}),
    "keys and values of a window": ("mixtral", {"sliding_window": 13}),
    "keys and values of chunks and of all": ("llama4", {}),
    "latents": ("deepseek_v3", {}),
}
MACHINES = {
    "native": {"kernels": "native"},
    "xla": {"kernels": "xla"},
    "native on eight devices": {"kernels": "native", "mesh": "dp=2,ep=4"},
}
GREEDY = SamplingParams(temperature=0, max_tokens=12)
LENGTHS = (3, 17, 1, 30, 41)  # Llama 4's chunks are of 8
# In pieces that fit neither pages nor spans.
CHUNKED = EngineConfig(page_size=3, max_batch=1, max_prefill_tokens=5, max_prefill_sequences=1, warm_up=False)
PLAIN = EngineConfig(page_size=4, max_batch=4, max_prefill_tokens=16, max_prefill_sequences=2, warm_up=False)


@pytest.fixture(scope="module", params=CACHES)
def checkpoint(request, reference_checkpoint, further_layer):
    family, options = CACHES[request.param]
    return further_layer() if family == "deepseek_v3" else reference_checkpoint(family, **options)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(2)
    return [rng.integers(0, 127, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(checkpoint, prompts):
    return [checkpoint.greedy(prompt, 12) for prompt in prompts]


@pytest.fixture(scope="module", params=MACHINES)
def model(request, checkpoint):
    return Model(checkpoint.folder, **MACHINES[request.param])


@pytest.fixture(scope="module")
def engine(model):
    """With pages for the longest of the requests, and for no more than two or three that grow together."""
    pages = 14 if FULL in model.config.spans else 9
    return Engine(model, dataclasses.replace(PLAIN, pages_per_rank=pages))


def together(engine, prompts):
    """Everything on the first two attention ranks, so that they have much to do."""
    tokens = [[] for _ in prompts]
    for index, prompt in enumerate(prompts):
        engine.submit(Request(str(index), tuple(prompt), GREEDY, rank=index % min(2, len(engine.loads()))))
    while engine.has_work:
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
        engine.check_integrity()
    assert all(load.used_pages == 0 for load in engine.loads())
    return tokens


def alone(engine, prompts):
    return [together(engine, [prompt])[0] for prompt in prompts]


def chunked(engine, prompts):
    return together(Engine(engine.model, CHUNKED), prompts)


def preempted(engine, prompts):
    before = engine.num_preemptions
    tokens = together(engine, [*prompts[:3] * 4, *prompts])
    assert engine.num_preemptions > before
    assert tokens[:12] == tokens[12:15] * 4
    return tokens[12:]


def cached(engine, prompts):
    """Each once more, as soon as it has ended: of windows alone there are too few pages to keep it for longer."""
    tokens = []
    for prompt in prompts:
        together(engine, [prompt])
        before = engine.stats().hit_tokens
        tokens += together(engine, [prompt])
        assert engine.stats().hit_tokens - before == (len(prompt) - 1) // 4 * 4
    return tokens


def one_step_at_a_time(engine, prompts):
    return together(Engine(engine.model, dataclasses.replace(PLAIN, overlap=False)), prompts)


def speculated(engine, prompts):
    """The one family with a layer that drafts; that drafts are right at times is seen in test_speculation.py."""
    if not engine.model.config.mtp_layers:
        pytest.skip("no layer that drafts")
    drafting = Engine(engine.model, dataclasses.replace(PLAIN, speculate="mtp"))
    tokens = together(drafting, prompts)
    assert drafting.stats().drafts
    return tokens


WAYS = [alone, together, chunked, preempted, cached, one_step_at_a_time, speculated]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_greedy_tokens_are_those_of_transformers(engine, expected, prompts, way):
    engine.clear_prefix_cache()
    assert way(engine, prompts) == expected
