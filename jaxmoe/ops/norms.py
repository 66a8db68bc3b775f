"""Normalisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*rows D"], weight: Float[Array, "D"] | None, eps: float) -> Float[Array, "*rows D"]:
    """x / rms(x) in float32, cast back to x's dtype, then times weight, in the order of transformers' RMSNorm."""
    wide = x.astype(jnp.float32)
    normed = (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return normed if weight is None else normed * weight
