"""Placement is an argument: experts move between steps, tokens stay the same, nothing compiles."""

import jax
import numpy as np
import pytest

import jaxmoe
from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.model import Model
from jaxmoe.engine.request import SamplingParams
from jaxmoe.errors import ConfigError
from jaxmoe.moe.moving import slot_sources
from jaxmoe.moe.placement import initial_placement, placement_of

LIMITS = EngineConfig(page_size=8, max_batch=4, max_context=64, max_prefill_tokens=32, max_prefill_sequences=1)
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
PROMPTS = [list(range(start, start + 20)) for start in (5, 40, 300, 900)]


def shuffled(placement, num_experts, seed):
    """Every expert somewhere else, and other experts replicated, in each layer its own way."""
    rng = np.random.default_rng(seed)
    layers, slots = placement.slot_expert.shape
    extra = rng.integers(0, num_experts, (layers, slots - num_experts))
    everyone = np.tile(np.arange(num_experts), (layers, 1))
    return rng.permuted(np.concatenate([everyone, extra], axis=1), axis=1)


def answers(engine):
    tokens = [[] for _ in PROMPTS]
    for output in engine.generate(PROMPTS, GREEDY):
        tokens[int(output.request_id)] += output.token_ids
    return tokens


@pytest.mark.parametrize(
    ("name", "mesh", "axes"),
    [("mixtral", "dp=2,ep=4", "ep"), ("deepseek-v3", "ep=4", "ep"), ("llama4", "dp=2,ep=2,tp=2", "dp,ep")],
)
def test_experts_move_while_an_engine_serves_and_nothing_compiles(name, mesh, axes):
    model = jaxmoe.load(f"demo:{name}", mesh, expert_axes=axes, redundant_experts=3)
    engine = Engine(model, LIMITS)
    before, logits = answers(engine), model.logits(PROMPTS)
    for seed in range(2):
        model.place_experts(shuffled(model.placement, model.config.experts, seed))
        assert answers(engine) == before
        np.testing.assert_allclose(model.logits(PROMPTS), logits, atol=1e-4)
    assert engine.late_compiles == 0
    assert model._forward._cache_size() == 1


def test_experts_move_in_the_midst_of_generation():
    model = jaxmoe.load("demo:mixtral", "ep=4", redundant_experts=4)
    engine = Engine(model, LIMITS)
    before = answers(engine)
    tokens = [[] for _ in PROMPTS]
    for step, output in enumerate(engine.generate(PROMPTS, GREEDY)):
        tokens[int(output.request_id)] += output.token_ids
        if step % 8 == 3:
            model.place_experts(shuffled(model.placement, model.config.experts, step))
    assert tokens == before


def test_weights_after_a_move_are_those_of_a_load_in_that_placement():
    model = Model(None, "ep=4", "bfloat16", random_weights="mixtral-8x7b:scale=128,num_hidden_layers=2")
    slots = {name: np.asarray(leaf, np.float32) for name, leaf in model.params["experts"].items()}
    new = shuffled(model.placement, 8, 0)
    model.place_experts(new)
    for name, leaf in model.params["experts"].items():
        expected = np.take_along_axis(slots[name], new.reshape(2, 8, *(1,) * (leaf.ndim - 2)), axis=1)
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), expected)


def test_fp8_weights_keep_their_own_scales_in_any_slot(reference_checkpoint):
    checkpoint = reference_checkpoint("deepseek_v3", fp8=(16, 16))
    alone = Model(checkpoint.folder).logits([PROMPTS[0]])
    model = Model(checkpoint.folder, "dp=2,ep=4", redundant_experts=5)
    for seed in range(2):
        np.testing.assert_allclose(model.logits([PROMPTS[0]]), alone, atol=1e-4)
        model.place_experts(shuffled(model.placement, model.config.experts, seed))


def test_a_placement_that_cannot_be_is_told_and_changes_nothing():
    model = jaxmoe.load("demo:mixtral", "ep=4")
    old = np.asarray(model.placement.slot_expert)
    for wrong, told in (
        (old[:, :4], r"a placement of \(4, 4\) mixtures and slots does not fit \(4, 8\)"),
        (np.where(old == 3, 0, old), r"layer 0 of the placement has no slot for experts \[3\]"),
        (np.where(old == 3, 8, old), r"layer 0 of the placement has no slot for experts \[3\]"),
    ):
        with pytest.raises(ConfigError, match=told):
            model.place_experts(wrong)
    np.testing.assert_array_equal(model.placement.slot_expert, old)
    with pytest.raises(ConfigError, match=r"names experts \[5\]; there are 3"):
        placement_of(np.array([[0, 1, 2, 5]]), 3)


def test_all_placements_of_a_model_have_the_same_shapes():
    worst = placement_of(np.array([[0, 1, 2, 2, 2, 2]]), 3)
    even = initial_placement(1, 3, 6)
    assert jax.tree.map(np.shape, worst) == jax.tree.map(np.shape, even)
    assert worst.replica_count.tolist() == [[1, 1, 4]]
    assert even.replica_slots.tolist() == [[[0, 3, 0, 0], [1, 4, 0, 0], [2, 5, 0, 0]]]


def test_an_expert_comes_from_as_near_as_it_can():
    old, new = np.array([0, 1, 2, 0, 1, 3]), np.array([0, 3, 0, 1, 1, 2])
    assert slot_sources(old, new, 3).tolist() == [0, 5, 3, 1, 4, 2]
