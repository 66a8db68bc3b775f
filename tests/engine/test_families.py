"""Every way of caching: what is found is what was computed, what is out of sight takes no page, nothing is copied."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

import jaxmoe
from jaxmoe.engine.batch import Packing, StepShape
from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.executables import Executables
from jaxmoe.engine.model import Model
from jaxmoe.engine.pages import pages_reached
from jaxmoe.engine.request import Request, SamplingParams
from jaxmoe.engine.scheduler import sample_of
from jaxmoe.models.kv_cache import make_cache
from jaxmoe.spans import FULL

CACHES = {
    "keys and values of a window": ("mixtral", {"sliding_window": 13}),
    "keys and values of chunks and of all": ("llama4", {}),
    "latents": ("deepseek_v3", {}),
}
LENGTHS = (3, 17, 1, 30, 41)  # Llama 4's chunks are of 8


@pytest.fixture(scope="module", params=CACHES)
def checkpoint(request, reference_checkpoint):
    family, options = CACHES[request.param]
    return reference_checkpoint(family, **options)


@pytest.fixture(scope="module")
def models(checkpoint):
    """The checkpoint on a mesh."""
    made = {}

    def on(mesh):
        if mesh not in made:
            made[mesh] = Model(checkpoint.folder, mesh)
        return made[mesh]

    return on


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(2)
    return [rng.integers(0, 127, length).tolist() for length in LENGTHS]


@pytest.mark.parametrize("kernels", ["native", "xla"])
def test_what_is_found_in_the_cache_gives_what_computing_it_gives(checkpoint, prompts, kernels):
    model = Model(checkpoint.folder, kernels=kernels)
    config = EngineConfig(page_size=4, max_batch=2, max_prefill_tokens=16, pages_per_rank=64, warm_up=False)
    longest, other = prompts[-1], prompts[1]
    answer = checkpoint.greedy(longest, 12)
    # The same again, one that parts from it, the next turn of a conversation, and one of a whole number of pages.
    asked = [longest, longest, [*longest[:30], *other], longest[:40], [*longest, *answer, 5]]
    params = SamplingParams(temperature=0, max_tokens=6)

    def outputs(engine):
        return [
            [(output.token_ids, output.logprobs) for output in engine.generate([prompt], params)] for prompt in asked
        ]

    engine = Engine(model, config)
    found, computed = outputs(engine), outputs(Engine(model, dataclasses.replace(config, prefix_cache=False)))
    assert engine.stats().hit_tokens >= 40 + 24 + 32 + 40
    if kernels == "native":
        # A token that decodes attends to latents where pieces of prompts make keys of them, and rounds otherwise.
        exact = -1 if model.config.model_type == "deepseek_v3" else None
        assert found[:exact] == computed[:exact]
    for one, two in zip(found, computed, strict=True):
        assert [tokens for tokens, _ in one] == [tokens for tokens, _ in two]
        np.testing.assert_allclose([logprobs for _, logprobs in one], [logprobs for _, logprobs in two], atol=1e-5)


def test_samples_share_their_prompt_and_are_each_what_they_are_alone(models, prompts):
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=6, n=3, ignore_eos=True)
    request = Request("x", tuple(prompts[1]), params)
    config = EngineConfig(page_size=4, max_batch=4, max_prefill_tokens=16, pages_per_rank=64, warm_up=False)
    engine = Engine(models("dp=1"), config)

    def answers(*requests):
        tokens = {}
        for each in requests:
            engine.submit(each)
        while engine.has_work:
            for output in engine.step():
                tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
            engine.check_integrity()
        return tokens

    together = answers(request)
    assert engine.stats().hit_tokens == 2 * 16
    alone = [sample_of(request, index) for index in range(3)]
    seeds = [dataclasses.replace(each.params, n=1) for each in alone]
    by_itself = [answers(Request("y", request.prompt, each))["y", 0] for each in seeds]
    assert [together["x", index] for index in range(3)] == by_itself
    assert len(set(map(tuple, by_itself))) == 3


@pytest.mark.parametrize("overlap", [False, True])
def test_spans_take_no_more_pages_however_long_the_context_grows(models, prompts, overlap):
    model = models("dp=1")
    config = EngineConfig(page_size=4, max_batch=1, max_prefill_tokens=4, max_prefill_sequences=1, warm_up=False)
    engine = Engine(model, dataclasses.replace(config, overlap=overlap))
    engine.submit(Request("x", tuple(prompts[1]), SamplingParams(temperature=0, ignore_eos=True)))
    length, short_spans = len(prompts[1]), []
    while engine.has_work:
        outputs = engine.step()
        if outputs and engine.has_work:
            (load,) = engine.loads()
            placed = min(length + overlap, 63)  # with the one in flight, but of the last token of all
            short_spans.append(load.used_pages - (-(-placed // 4) if FULL in model.config.spans else 0))
            length += 1
    assert length == 63
    assert max(short_spans) == sum(pages_reached(span, 1, 4, 1000) for span in model.config.spans if span != FULL)


def test_the_engine_says_how_much_is_cached_for_which_span(models):
    model = models("dp=1")
    said = Engine(
        model, EngineConfig(page_size=4, max_batch=2, max_prefill_tokens=8, pages_per_rank=100, warm_up=False)
    ).describe()
    spans = len(model.config.spans)
    assert ("sequences and 400 tokens of KV cache (" if spans == 1 else "400 tokens (full) of KV cache (") in said
    assert ("32 tokens (chunk of 8) and 400" in said) == (spans == 2)


@pytest.mark.parametrize("mesh", ["dp=1", "dp=2,ep=4"])
def test_a_step_updates_the_cache_in_place(models, mesh):
    model = models(mesh)
    packing = Packing(model.config.spans, 4, 8)
    cache = make_cache(model.config, model.mesh, model.rules, tuple(8192 for _ in packing.spans), 4, model.dtype)
    arrays = [array.nbytes // model.num_ranks for array in jax.tree.leaves(cache)]
    for shape in (StepShape(2, 1, 16), StepShape(1, 16, 16)):
        memory = Executables(model, cache, packing).compile(shape).memory_analysis()
        assert memory.alias_size_in_bytes >= sum(arrays)
        assert memory.temp_size_in_bytes < min(arrays) / 8


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "llama4"])
@pytest.mark.parametrize("shape", [StepShape(1, 1, 16), StepShape(1, 16, 16)], ids=str)
def test_a_step_of_native_kernels_copies_no_weights_and_no_cache(name, shape):
    model = jaxmoe.load(f"demo:{name}", kernels="native")
    packing = Packing(model.config.spans, 16, 8)
    cache = make_cache(model.config, model.mesh, model.rules, tuple(64 for _ in packing.spans), 16, model.dtype)
    text = Executables(model, cache, packing).compile(shape).as_text()
    largest_activation = shape.batch * shape.tokens * 2 * model.config.width
    matrices = [leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(model.params["attention"]) if leaf.ndim > 2]
    assert largest_activation < min(matrices) < cache[0][0].size
    made = re.findall(r"= \w+\[([\d,]+)\]\S* (copy|transpose|fusion|convert|dynamic-slice|gather|reshape|dot)\(", text)
    sizes = {(kind, axes): math.prod(map(int, axes.split(","))) for axes, kind in made}
    assert {made for made, size in sizes.items() if size >= min(matrices)} <= {
        ("fusion", f"1,1,{model.config.vocab_size}")
    }
