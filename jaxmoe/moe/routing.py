"""Routers: which experts a token goes to and with what weight. One small function a family, no collectives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Routing(NamedTuple):
    """The K experts of every token, best first, and their weights. A padded row has experts -1 and weights 0."""

    experts: Int[Array, "N K"]
    weights: Float[Array, "N K"]


def softmax_top_k(logits: Float[Array, "N E"], k: int, valid: Bool[Array, "N"]) -> Routing:
    """Mixtral (arXiv:2401.04088, eq. 1): softmax over all experts in float32, the k largest, divided by their sum."""
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, k)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(jnp.where(valid[:, None], experts, -1), jnp.where(valid[:, None], weights, 0.0))
