import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.ops.gating import swiglu
from jaxmoe.ops.grouped_mlp import MAX_TILE_ROWS, grouped_mlp

LAYERS, SLOTS, WIDTH, INNER = 2, 5, 12, 20
LAYER = 1
IMPLEMENTATIONS = ["tiles", "native", "ragged_dot", "megablox"]


@functools.cache
def compiled(implementation, weigh_input, expected=None):
    options = {"weigh_input": weigh_input, "implementation": implementation, "expected": expected}
    return jax.jit(functools.partial(grouped_mlp, activation="silu", **options))


def run(operands, implementation="tiles", weigh_input=False, expected=None):
    return np.asarray(compiled(implementation, weigh_input, expected)(*operands, jnp.int32(LAYER)))


def operands(slots):
    rng = np.random.default_rng(0)
    slots = np.asarray(slots, np.int32)
    rows, _ = slots.shape
    shapes = [(rows, WIDTH), slots.shape, (LAYERS, SLOTS, WIDTH, 2, INNER), (LAYERS, SLOTS, INNER, WIDTH)]
    x, weights, gate_up, down = (rng.normal(size=shape).astype(np.float32) * 0.5 for shape in shapes)
    return x, slots, weights, gate_up, down


def one_at_a_time(x, slots, weights, gate_up, down, weigh_input=False):
    out = np.zeros(x.shape)
    for row, choice in np.argwhere(slots >= 0):
        slot, weight = slots[row, choice], weights[row, choice]
        gate, up = np.einsum("d,dtf->tf", x[row] * (weight if weigh_input else 1), gate_up[LAYER, slot])
        out[row] += (1 if weigh_input else weight) * (gate / (1 + np.exp(-gate)) * up) @ down[LAYER, slot]
    return out


def slots_of(name, rows=40, choices=2):
    rng = np.random.default_rng(1)
    if name.startswith("all in"):
        return np.full((rows, choices), {"first": 0, "last": SLOTS - 1}[name.split()[-1]])
    slots = np.argsort(rng.random((rows, SLOTS)), axis=1)[:, :choices]
    if name == "skewed":
        slots = np.where(rng.random(slots.shape) < 0.8, 3, slots)
    if name == "mostly absent":
        slots = np.where(rng.random(slots.shape) < 0.9, -1, slots)
    if name == "none":
        slots[:] = -1
    return slots


ROUTINGS = ["balanced", "skewed", "all in the first", "all in the last", "mostly absent", "none"]


@pytest.mark.parametrize("weigh_input", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_every_row_meets_the_mlps_of_its_slots(name, implementation, weigh_input):
    arrays = operands(slots_of(name))
    expected = one_at_a_time(*arrays, weigh_input)
    np.testing.assert_allclose(run(arrays, implementation, weigh_input), expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["tiles", "native"])
@pytest.mark.parametrize("rows", [1, MAX_TILE_ROWS * 2 + 3])
def test_one_row_and_slots_of_more_than_a_tile(rows, implementation):
    arrays = operands(slots_of("skewed", rows))
    np.testing.assert_allclose(run(arrays, implementation), one_at_a_time(*arrays), atol=1e-5)


@pytest.mark.parametrize("expected", [1, 7, 80, 10_000])
def test_what_is_expected_tunes_speed_only(expected):
    arrays = operands(slots_of("mostly absent"))
    np.testing.assert_allclose(run(arrays, expected=expected), one_at_a_time(*arrays), atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_without_a_slot_never_matter(implementation):
    x, slots, *rest = operands(slots_of("mostly absent"))
    absent = (slots < 0).all(1)
    clean = run((x, slots, *rest), implementation)
    x[absent] = np.nan
    np.testing.assert_array_equal(run((x, slots, *rest), implementation), clean)
    assert not clean[absent].any()


@settings(max_examples=50, deadline=None)
@given(slots=st.lists(st.tuples(*[st.integers(-1, SLOTS - 1)] * 2), min_size=12, max_size=12))
def test_any_slots_give_the_same_by_tiles_as_by_ragged_dot(slots):
    arrays = operands(slots)
    np.testing.assert_allclose(run(arrays), run(arrays, "ragged_dot"), atol=1e-5)


@functools.cache
def gradient(implementation, weigh_input):
    def along(x, slots, weights, gate_up, down, direction):
        options = {"weigh_input": weigh_input, "implementation": implementation}
        return jnp.sum(grouped_mlp(x, slots, weights, gate_up, down, LAYER, "silu", **options) * direction)

    return jax.jit(jax.grad(along, argnums=(0, 2, 3, 4)))


@pytest.mark.parametrize("weigh_input", [False, True])
@pytest.mark.parametrize("name", ROUTINGS)
def test_gradients_by_tiles_equal_those_of_ragged_dot(name, weigh_input):
    arrays = operands(slots_of(name))
    direction = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)
    by_tiles, reference = (gradient(each, weigh_input)(*arrays, direction) for each in ("tiles", "ragged_dot"))
    for ours, expected in zip(by_tiles, reference, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_an_implementation_that_does_not_exist_is_told():
    with pytest.raises(ValueError, match="implementation='cublas' is not one of tiles, native, ragged_dot, megablox"):
        grouped_mlp(*map(jnp.asarray, operands(slots_of("balanced"))), implementation="cublas")


def test_swiglu_multiplies_the_activated_gate_by_up():
    fused = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    gate, up = fused[:, 0], fused[:, 1]
    np.testing.assert_allclose(swiglu(jnp.asarray(fused), "silu"), gate / (1 + np.exp(-gate)) * up, atol=1e-6)
    np.testing.assert_allclose(swiglu(jnp.asarray(fused), "relu"), np.maximum(gate, 0) * up, atol=1e-6)
