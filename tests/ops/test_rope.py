import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops.rope import RopeConfig, cos_sin, inverse_frequencies, rotate, yarn_mscale

WIDTH = 16
FLOAT32 = jnp.dtype("float32")
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_position": 64}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_position": 64}


def plain(theta=100.0):
    return [theta ** (-2 * i / WIDTH) for i in range(WIDTH // 2)]


def llama3(low, high):
    for inverse in plain():
        wavelength = 2 * math.pi / inverse
        if wavelength > 64 / low:
            yield inverse / 8
        elif wavelength < 64 / high:
            yield inverse
        else:
            smooth = (64 / wavelength - low) / (high - low)
            yield (1 - smooth) * inverse / 8 + smooth * inverse


def yarn(fast=32.0, slow=1.0, truncate=True):
    def corrected(rotations):
        return WIDTH * math.log(64 / (rotations * 2 * math.pi)) / (2 * math.log(100))

    low, high = corrected(fast), corrected(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, WIDTH - 1)
    for i, inverse in enumerate(plain()):
        ramp = min(max((i - low) / ((high - low) or 0.001), 0), 1)
        yield inverse / 4 * ramp + inverse * (1 - ramp)


READINGS = {
    "default": ({}, plain()),
    "linear": ({"kind": "linear", "factor": 2.5}, [inverse / 2.5 for inverse in plain()]),
    "llama3": ({**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, llama3(1, 4)),
    "llama3 without a middle band": ({**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 2.0}, llama3(2, 2)),
    "yarn": (YARN, yarn()),
    "yarn of other betas": ({**YARN, "beta_fast": 8.0, "beta_slow": 2.0}, yarn(8, 2)),
    "yarn not truncated": ({**YARN, "beta_fast": 8.0, "truncate": False}, yarn(8, truncate=False)),
    "yarn of equal betas": (
        {**YARN, "beta_fast": 2.0, "beta_slow": 2.0, "truncate": False},
        yarn(2, 2, truncate=False),
    ),
}


@pytest.mark.parametrize("name", READINGS)
def test_frequencies_equal_a_reading_of_their_definition(name):
    fields, expected = READINGS[name]
    inverse = inverse_frequencies(RopeConfig(100.0, **fields), WIDTH)
    assert inverse.dtype == np.float32
    np.testing.assert_allclose(inverse, list(expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "magnitude"),
    [
        ({}, 1),
        ({"kind": "linear", "factor": 4.0}, 1),
        (YARN, 0.1 * math.log(4) + 1),
        ({**YARN, "attention_factor": 0.7, "mscale": 2.0, "mscale_all_dim": 1.0}, 0.7),
        ({**YARN, "mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
        ({**YARN, "mscale": 2.0}, 0.1 * math.log(4) + 1),
        ({**YARN, "factor": 1.0}, 1),
    ],
)
def test_only_yarn_scales_the_rotation(fields, magnitude):
    config = RopeConfig(100.0, **fields)
    assert config.magnitude() == pytest.approx(magnitude)
    cos, sin = cos_sin(config, WIDTH, jnp.array([[0, 5]]), FLOAT32)
    np.testing.assert_allclose(cos**2 + sin**2, magnitude**2, rtol=1e-6)


def test_yarn_mscale_of_deepseek_v3():
    assert yarn_mscale(40, 1.0) ** 2 == pytest.approx(1.874, abs=1e-3)


def test_rotation_is_multiplication_by_a_complex_phase():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 5, WIDTH)).astype(np.float32)
    positions = np.array([[0, 1, 7], [100, 3, 2]])
    pairs = x[..., : WIDTH // 2] + 1j * x[..., WIDTH // 2 :]
    turned = pairs * np.exp(1j * positions[..., None, None] * np.array(plain()))
    rotated = rotate(jnp.asarray(x), *cos_sin(RopeConfig(100.0), WIDTH, jnp.asarray(positions), FLOAT32))
    np.testing.assert_allclose(rotated, np.concatenate([turned.real, turned.imag], -1), atol=2e-5)


def test_scores_depend_on_the_distance_of_positions_alone():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, WIDTH)), jnp.float32) for _ in range(2))

    def score(query_position, key_position):
        turn = [cos_sin(RopeConfig(100.0), WIDTH, jnp.array([at]), FLOAT32) for at in (query_position, key_position)]
        return jnp.sum(rotate(query, *turn[0]) * rotate(key, *turn[1]))

    np.testing.assert_allclose(score(9, 4), score(59, 54), atol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_interleaved_pairs_turn_as_the_same_pairs_laid_out_in_halves():
    rng = np.random.default_rng(2)
    halves = rng.normal(size=(3, 2, WIDTH)).astype(np.float32)
    pairs = np.stack(np.split(halves, 2, axis=-1), axis=-1).reshape(halves.shape)
    turn = cos_sin(RopeConfig(100.0), WIDTH, jnp.array([0, 1, 7]), FLOAT32)
    np.testing.assert_array_equal(
        rotate(jnp.asarray(pairs), *turn, interleaved=True), rotate(jnp.asarray(halves), *turn)
    )
