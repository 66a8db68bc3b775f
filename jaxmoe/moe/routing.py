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
    return without_padding(experts, weights, valid)


def sigmoid_group_top_k(
    logits: Float[Array, "N E"],
    bias: Float[Array, "E"],
    k: int,
    groups: int,
    groups_kept: int,
    normalise: bool,
    scale: float,
    valid: Bool[Array, "N"],
) -> Routing:
    """DeepSeek-V3 (arXiv:2412.19437, eqs. 12-16): sigmoid scores; the bias decides who is chosen and nothing else.

    A group counts by the sum of its two best biased scores. Experts of groups that are not kept are out of the choice
    (-inf): a zero in their place, as some runtimes have it, would beat kept experts of negative biased score.
    """
    scores = jax.nn.sigmoid(logits.astype(jnp.float32))
    biased = scores + bias
    rows, experts = scores.shape
    if groups_kept < groups:
        grouped = biased.reshape(rows, groups, experts // groups)
        best, _ = jax.lax.top_k(grouped, min(2, experts // groups))
        _, kept = jax.lax.top_k(jnp.sum(best, axis=-1), groups_kept)
        is_kept = jnp.any(kept[:, :, None] == jnp.arange(groups), axis=1)
        biased = jnp.where(is_kept[:, :, None], grouped, -jnp.inf).reshape(rows, experts)
    _, chosen = jax.lax.top_k(biased, k)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if normalise:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return without_padding(chosen, weights * scale, valid)


def top_k_sigmoid(logits: Float[Array, "N E"], k: int, valid: Bool[Array, "N"]) -> Routing:
    """Llama 4: the k largest logits, each through a sigmoid in float32; not normalised.

    The weight belongs on the expert's input, in the dtype of the logits.
    """
    best, experts = jax.lax.top_k(logits, k)
    weights = jax.nn.sigmoid(best.astype(jnp.float32)).astype(logits.dtype)
    return without_padding(experts, weights.astype(jnp.float32), valid)


def without_padding(experts: Int[Array, "N K"], weights: Float[Array, "N K"], valid: Bool[Array, "N"]) -> Routing:
    """As given, where `valid`."""
    return Routing(jnp.where(valid[:, None], experts, -1), jnp.where(valid[:, None], weights, 0.0))
