"""Rotary position embeddings (RoFormer, arXiv:2104.09864) and the ways checkpoints stretch them to longer contexts."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions become angles.

    kind: "default", "linear" (positions divided by factor), "llama3" (long wavelengths only, Llama 3.1) or "yarn"
    (arXiv:2309.00071). The fields after `factor` belong to one kind each, in the words of Hugging Face configs.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def magnitude(self) -> float:
        """What cos and sin are multiplied by: yarn's attention temperature, 1 for every other kind."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)


def yarn_mscale(factor: float, scale: float) -> float:
    """yarn's 0.1 * scale * ln(factor) + 1 (arXiv:2309.00071, eq. 22 with DeepSeek's scale)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(config: RopeConfig, width: int) -> Float[np.ndarray, "half"]:
    """Angle per position of each of the width/2 rotated pairs, float32."""
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    inverse = (1.0 / np.float32(config.theta) ** exponents).astype(np.float32)
    if config.kind == "linear":
        return inverse / np.float32(config.factor)
    if config.kind == "llama3":
        return _llama3(config, inverse)
    if config.kind == "yarn":
        return _yarn(config, inverse, width)
    return inverse


def _llama3(config: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    wavelength = 2 * math.pi / inverse
    low, high = config.low_freq_factor, config.high_freq_factor
    turns = config.original_max_position / wavelength
    # low == high leaves no band between; the select below then never reads the quotient.
    blend = (turns - low) / (high - low) if high != low else np.zeros_like(turns)
    between = (1 - blend) * inverse / config.factor + blend * inverse
    return np.where(turns < low, inverse / config.factor, np.where(turns > high, inverse, between)).astype(np.float32)


def _yarn(config: RopeConfig, inverse: np.ndarray, width: int) -> np.ndarray:
    def pair_that_turns(rotations: float) -> float:
        return width * math.log(config.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_that_turns(config.beta_fast), pair_that_turns(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(width // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (inverse / config.factor * ramp + inverse * (1 - ramp)).astype(np.float32)


def cos_sin(
    config: RopeConfig, width: int, positions: Int[Array, "*rows"], dtype: jnp.dtype
) -> tuple[Float[Array, "*rows half"], Float[Array, "*rows half"]]:
    """cos and sin of every pair's angle: computed in float32, returned in `dtype`."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inverse_frequencies(config, width))
    magnitude = config.magnitude()
    return (jnp.cos(angles) * magnitude).astype(dtype), (jnp.sin(angles) * magnitude).astype(dtype)


def rotate(
    x: Float[Array, "*rows heads d"],
    cos: Float[Array, "*rows half"],
    sin: Float[Array, "*rows half"],
    interleaved: bool = False,
) -> Float[Array, "*rows heads d"]:
    """Rotates the pairs (x[i], x[i + d/2]), or where checkpoints interleave them (x[2i], x[2i + 1]).

    The result has first members, then second members, either way: scores compare queries and keys laid out alike.
    """
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
