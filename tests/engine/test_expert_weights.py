"""Experts in fewer bits: scales go where they go, and every mesh and implementation gives the same answers."""

import jax
import numpy as np
import pytest

import jaxmoe
from jaxmoe.errors import ConfigError

PROMPT = list(range(5, 45))
KEPT = {"bfloat16": (2, 0.02), "int8": (1, 0.1), "float8": (1, 0.3)}


def bytes_of(arrays):
    return sum(array.nbytes for array in arrays)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "llama4"])
def test_the_same_answers_in_a_fraction_of_the_memory(name, kept):
    size, distance = KEPT[kept]
    whole, model = (jaxmoe.load(f"demo:{name}", **options) for options in ({}, {"expert_weights": kept}))
    experts = model.params["experts"]
    scales = [array for path, array in experts.items() if path.endswith("_scale")]
    assert bytes_of(experts.values()) - bytes_of(scales) == bytes_of(whole.params["experts"].values()) * size // 4
    logits = model.logits([PROMPT])
    assert np.mean(np.abs(logits - whole.logits([PROMPT]))) < distance
    for options in ({"kernels": "xla"}, {"mesh": "dp=2,ep=2,tp=2", "expert_axes": "dp,ep"}):
        other = jaxmoe.load(f"demo:{name}", expert_weights=kept, **options)
        np.testing.assert_allclose(other.logits([PROMPT]), logits, atol=1e-4)


def test_scales_move_with_their_experts():
    model = jaxmoe.load("demo:mixtral", "ep=4", redundant_experts=4, expert_weights="int8")
    logits = model.logits([PROMPT])
    slots = np.asarray(model.placement.slot_expert)
    scales = np.asarray(model.params["experts"]["down_scale"])
    moved = np.roll(slots, 5, axis=1)
    model.place_experts(moved)
    np.testing.assert_allclose(model.logits([PROMPT]), logits, atol=1e-4)
    np.testing.assert_array_equal(model.params["experts"]["down_scale"], np.roll(scales, 5, axis=1))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params["experts"])} == {"int8", "float32"}


def test_weights_of_no_known_kind_are_told():
    with pytest.raises(ConfigError, match="expert_weights='int4' is not one of same, bfloat16, int8, float8"):
        jaxmoe.load("demo:mixtral", expert_weights="int4")
