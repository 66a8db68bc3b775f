import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.ops.grouped_matmul import MAX_TILE_ROWS, grouped_matmul, swiglu

WIDTH, OUT = 12, 20
IMPLEMENTATIONS = ["tiles", "ragged_dot"]
run = jax.jit(grouped_matmul, static_argnames="implementation")


def operands(num_rows, num_matrices):
    rng = np.random.default_rng(0)
    shapes = [(num_rows, WIDTH), (num_matrices, WIDTH, OUT)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def one_row_at_a_time(rows, weights, group_sizes, offset=0):
    out = np.zeros((len(rows), weights.shape[2]), np.float32)
    for row, group in enumerate(np.repeat(np.arange(len(group_sizes)), group_sizes)):
        out[row] = rows[row] @ weights[offset + group]
    return out


GROUP_SIZES = {
    "balanced": [8, 8, 8, 8, 8],
    "skewed": [1, 30, 0, 2, 7],
    "first and last empty": [0, 13, 14, 13, 0],
    "all in the first": [40, 0, 0, 0, 0],
    "all in the last": [0, 0, 0, 0, 40],
    "rows beyond the sum": [3, 0, 9, 1, 0],
    "no rows at all": [0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", GROUP_SIZES)
def test_every_row_meets_the_matrix_of_its_group_and_rows_beyond_give_zeros(name, implementation):
    rows, weights = operands(40, 5)
    sizes = np.array(GROUP_SIZES[name], np.int32)
    out = run(rows, weights, sizes, implementation=implementation)
    np.testing.assert_allclose(out, one_row_at_a_time(rows, weights, sizes), atol=1e-5)
    assert not out[sizes.sum() :].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("offset", [0, 2, 4])
def test_an_offset_shifts_the_groups_along_the_stacked_matrices(offset, implementation):
    rows, weights = operands(10, 7)
    sizes = np.array([4, 0, 5], np.int32)
    for given_as in (offset, jnp.int32(offset)):
        out = grouped_matmul(*map(jnp.asarray, (rows, weights, sizes)), given_as, implementation)
        np.testing.assert_allclose(out, one_row_at_a_time(rows, weights, sizes, offset), atol=1e-5)


@pytest.mark.parametrize("sizes", [[1, 0, 0], [0, 0, 1], [700, 513, 299], [1500, 0, 12]])
def test_one_row_and_groups_of_more_than_a_tile(sizes):
    assert sum(sizes) == 1 or max(sizes) > MAX_TILE_ROWS
    rows, weights = operands(sum(sizes), 3)
    sizes = np.array(sizes, np.int32)
    np.testing.assert_allclose(run(rows, weights, sizes), one_row_at_a_time(rows, weights, sizes), atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 8), min_size=5, max_size=5))
def test_any_group_sizes_give_the_same_by_tiles_as_by_ragged_dot(sizes):
    rows, weights = operands(40, 5)
    by_tiles, reference = (
        run(rows, weights, np.array(sizes, np.int32), implementation=name) for name in IMPLEMENTATIONS
    )
    np.testing.assert_allclose(by_tiles, reference, atol=1e-5)


@pytest.mark.parametrize("name", GROUP_SIZES)
def test_gradients_by_tiles_equal_those_of_ragged_dot(name):
    rows, weights = operands(40, 7)
    direction = np.random.default_rng(1).normal(size=(40, OUT)).astype(np.float32)
    by_tiles, reference = (
        GRADIENT[name_](rows, weights, np.array(GROUP_SIZES[name], np.int32), direction) for name_ in GRADIENT
    )
    for ours, expected in zip(by_tiles, reference, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def gradient(implementation):
    def along(rows, weights, sizes, direction):
        return jnp.sum(grouped_matmul(rows, weights, sizes, 1, implementation) * direction)

    return jax.jit(jax.grad(along, argnums=(0, 1)))


GRADIENT = {implementation: gradient(implementation) for implementation in IMPLEMENTATIONS}


def test_swiglu_multiplies_the_activated_gate_by_up():
    fused = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    gate, up = fused[:, 0], fused[:, 1]
    np.testing.assert_allclose(swiglu(jnp.asarray(fused), "silu"), gate / (1 + np.exp(-gate)) * up, atol=1e-6)
    np.testing.assert_allclose(swiglu(jnp.asarray(fused), "relu"), np.maximum(gate, 0) * up, atol=1e-6)
