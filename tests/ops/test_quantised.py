import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.grouped_mlp import grouped_mlp
from jaxmoe.ops.quantised import LARGEST, Quantised, dequantise, quantise, times

FLOAT = jnp.dtype("float32")
DTYPES = [str(dtype) for dtype in LARGEST]
IMPLEMENTATIONS = ["tiles", "native", "ragged_dot", "megablox"]


def normal(shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, FLOAT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_channel_keeps_its_largest_weight_and_the_others_within_half_a_step(dtype):
    stack = normal((2, 3, 40, 5)).at[0, 1, :, 2].set(0)
    kept = quantise(stack, jnp.dtype(dtype))
    assert kept.values.dtype == dtype
    assert kept.scale.shape == (2, 3, 5)
    off = np.abs(np.asarray(dequantise(kept, FLOAT) - stack))
    largest = np.max(np.abs(stack), axis=2, keepdims=True)
    # int8 has 127 even steps; e4m3 has 3 bits after the leading one, and even steps below 2^-6 of its 448.
    step = largest / 127 / 2 if dtype == "int8" else np.maximum(np.abs(stack) / 16, largest / 448 * 2**-10)
    assert np.all(off <= step * 1.001)
    np.testing.assert_allclose(np.max(np.abs(dequantise(kept, FLOAT)), axis=2), largest[:, :, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_times_a_matrix_are_those_times_what_it_stands_for(dtype):
    kept = quantise(normal((1, 1, 40, 7)), jnp.dtype(dtype))
    one = Quantised(kept.values[0, 0], kept.scale[0, 0])
    np.testing.assert_allclose(
        times(normal((3, 40), 1), one), normal((3, 40), 1) @ dequantise(kept, FLOAT)[0, 0], atol=1e-4
    )


@pytest.mark.parametrize("rows", [1, 60])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
def test_a_mixture_of_weights_in_few_bits_is_that_of_the_weights_they_stand_for(dtype, implementation, rows):
    x, weights = normal((rows, 24)), jnp.abs(normal((rows, 2), 1))
    slots = jnp.asarray(np.argsort(np.random.default_rng(2).random((rows, 4)), axis=1)[:, :2], jnp.int32)
    stacks = [normal((2, 4, 24, 2, 37), 3, 0.3), normal((2, 4, 37, 24), 4, 0.3)]
    kept = [quantise(stack, jnp.dtype(dtype)) if dtype in DTYPES else stack.astype(dtype) for stack in stacks]
    run = jax.jit(lambda *of: grouped_mlp(x, slots, weights, *of, 1, implementation=implementation))
    whole = [dequantise(stack, FLOAT) for stack in kept]
    np.testing.assert_allclose(run(*kept), grouped_mlp(x, slots, weights, *whole, 1), atol=2e-5)


def test_every_float8_is_read_as_what_it_is():
    values = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), jnp.float8_e4m3fn)
    table = values[np.flatnonzero(np.isfinite(np.asarray(values, np.float32)))]
    count = len(table)
    # Of a row that is 1 and zeros, the first matrices make 1, and the second, of one row, is the table.
    gate_up = Quantised(jnp.zeros((1, 1, count, 2, 1), table.dtype).at[0, 0, 0].set(1.0), jnp.ones((1, 1, 2, 1)))
    down = Quantised(table.reshape(1, 1, 1, count), jnp.ones((1, 1, count)))
    x, slots, weights = jnp.eye(1, count), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))
    out = grouped_mlp(x, slots, weights, gate_up, down, activation="relu", implementation="native")
    np.testing.assert_array_equal(np.asarray(out)[0], np.asarray(table, np.float32))
