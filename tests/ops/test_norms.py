import jax.numpy as jnp
import numpy as np

from jaxmoe.ops.norms import rms_norm


def test_rms_norm_divides_by_the_root_of_the_mean_square_and_multiplies_by_the_weight():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 3, 16)).astype(np.float32), rng.normal(size=16).astype(np.float32)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.1) * weight
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(weight), 0.1), expected, atol=1e-6)


def test_rms_norm_of_half_precision_squares_in_float32_and_rounds_before_the_weight():
    x = jnp.full((1, 4), 300, jnp.float16)  # 300 squared overflows float16
    weight = jnp.array([1, 1.5, -2, 0], jnp.float16)
    normed = rms_norm(x, weight, 1e-5)
    assert normed.dtype == jnp.float16
    np.testing.assert_array_equal(normed, jnp.ones((1, 4), jnp.float16) * weight)


def test_rms_norm_without_a_weight_leaves_a_mean_square_of_one():
    normed = rms_norm(jnp.array([[3.0, -4.0, 0.0, 5.0]]), None, 0.0)
    np.testing.assert_allclose((np.asarray(normed) ** 2).mean(), 1, atol=1e-6)


def test_rms_norm_of_zeros_is_zero():
    assert not rms_norm(jnp.zeros((1, 4)), jnp.ones(4), 1e-5).any()
