"""Choosing the next token, on the device, every row by its own parameters.

`sample` is all that most rows need. Logits of rows that ask for more go through `adjust` first, and `report` tells of
the likeliest tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.ops import native
from jaxmoe.ops.linear import Kernels

_ONE = 0x3F800000  # the bits of 1.0f: those of all probabilities lie in [0, _ONE] in the same order


def sample(
    logits: Float[Array, "B V"],
    temperature: Float[Array, "B"],
    top_k: Int[Array, "B"],
    top_p: Float[Array, "B"],
    min_p: Float[Array, "B"],
    seed: Int[Array, "B"],
    position: Int[Array, "B"],
    implementation: Kernels = "xla",
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """The token of every row and its log-probability under the unmodified logits.

    temperature 0 takes the most likely token (the lowest id on ties). Otherwise logits are divided by it, the top_k
    most likely are kept (0: all), of these the smallest set whose share of the probability reaches top_p, of these
    those at least min_p times as likely as the most likely one, and one is drawn by the Gumbel trick. Tokens as likely
    as the last one kept are kept too, as in transformers' TopKLogitsWarper.
    The draw depends on (seed, position) alone: the same request gets the same tokens in any batch, with drafts or
    without. A draft for that position, drawn by the same noise from other logits, is the same token with a probability
    of at least (1 - d) / (1 + d), d the distance in total variation (Daliri et al., 2024, arXiv:2408.07978); rejection
    sampling reaches 1 - d, but its tokens depend on the draft.
    """
    logits = logits.astype(jnp.float32)
    if implementation == "native":
        return native.sample(logits, temperature, top_k, top_p, min_p, seed, position)
    best, log_sum = greedy(logits)

    def draw() -> Int[Array, "B"]:
        # The likeliest token stays at 0, so that no temperature, however small, carries it to infinity.
        below = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled = below / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        filtered = jnp.any((temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)))
        kept = jax.lax.cond(filtered, lambda: keep_likely(scaled, top_k, top_p, min_p), lambda: scaled)
        # Threefry takes two words as its key: seed and position serve as they are, without hashing them into one first,
        # which would triple the random-number code to compile.
        words = jnp.stack([seed, position], axis=-1).astype(jnp.uint32)
        keys = jax.vmap(lambda pair: jax.random.wrap_key_data(pair, impl="threefry2x32"))(words)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
        drawn = jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)
        return jnp.where(temperature > 0, drawn, best)

    tokens = jax.lax.cond(jnp.any(temperature > 0), draw, lambda: best)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - log_sum


def greedy(logits: Float[Array, "B V"], implementation: Kernels = "xla") -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """The most likely token of each row, the lowest id on ties, and the logarithm of the sum of all exponentials."""
    if implementation == "native":
        return native.greedy(logits)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), jax.nn.logsumexp(logits, axis=-1)


def adjust(
    logits: Float[Array, "B V"],
    allowed: Int[Array, "B words"],
    repetition: Float[Array, "B"],
    frequency: Float[Array, "B"],
    presence: Float[Array, "B"],
    row: Int[Array, "N"],
    token: Int[Array, "N"],
    bias: Float[Array, "N"],
    times: Int[Array, "N"],
) -> Float[Array, "B V"]:
    """Logits with biases and penalties, and -inf for tokens that may not be chosen.

    Bias, then repetition penalty (Keskar et al., 2019, arXiv:1909.05858, for tokens of the prompt too, and a negative
    logit multiplied, as in transformers' RepetitionPenaltyLogitsProcessor), then what `times` weighs, as in vLLM.

    allowed: a bit for every token, that of token 0 the lowest of the first word.
    row, token, bias, times: entries, no two for one token of a row; those of row B do nothing. times: how often the
        token is in the output; 0 if only in the prompt, -1 if in neither.
    """
    inside = jnp.minimum(row, logits.shape[0] - 1)
    values = logits[inside, token] + bias
    penalty = repetition[inside]
    penalised = jnp.where(values > 0, values / penalty, values * penalty)
    values = jnp.where(times >= 0, penalised, values)
    values = values - jnp.where(times > 0, frequency[inside] * times + presence[inside], 0)
    logits = logits.at[row, token].set(values, mode="drop")
    bits = (allowed[..., None] >> jnp.arange(32)) & 1
    return jnp.where(bits.reshape(len(logits), -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)


def report(
    logits: Float[Array, "B V"], tokens: Int[Array, "B"], most: int, implementation: Kernels = "xla"
) -> tuple[Float[Array, "B"], Int[Array, "B most"], Float[Array, "B most"]]:
    """Log-probabilities of the given tokens, and the `most` most likely tokens with theirs, the likeliest first."""
    logits = logits.astype(jnp.float32)
    _, log_sum = greedy(logits, implementation)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    values, likely = jax.lax.top_k(logits, most)
    return chosen - log_sum, likely, values - log_sum[:, None]


def keep_likely(
    logits: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"], min_p: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Logits with all but the top_k, of these all but the top_p, and of these all below min_p times the best, -inf.

    No sort: the bits of non-negative floats are ordered as the floats are, so 31 halvings find the exact threshold
    probability, each a pass over the vocabulary. A sort of the vocabulary costs ten times as much on a CPU.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)
    count = jnp.where(top_k > 0, top_k, logits.shape[-1])
    at_least_k = _greatest(lambda bound: jnp.sum(bits >= bound[:, None], axis=-1) >= count, top_k.shape)
    candidates = jnp.where(bits >= at_least_k[:, None], probabilities, 0)
    needed = top_p * jnp.sum(candidates, axis=-1)

    def reaches(bound: Int[Array, "B"]) -> Bool[Array, "B"]:
        return jnp.sum(jnp.where(bits >= bound[:, None], candidates, 0), axis=-1) >= needed

    threshold = jnp.maximum(at_least_k, jnp.where(top_p < 1, _greatest(reaches, top_k.shape), 0))
    least = jax.lax.bitcast_convert_type(min_p * jnp.max(probabilities, axis=-1), jnp.int32)
    threshold = jnp.maximum(threshold, least)
    return jnp.where(bits >= threshold[:, None], logits, -jnp.inf)


def _greatest(holds: Callable[[Int[Array, "B"]], Bool[Array, "B"]], shape: tuple[int, ...]) -> Int[Array, "B"]:
    """The greatest bit pattern for which a monotone condition holds; it holds for 0."""

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high + 1) // 2
        ok = holds(middle)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    start = (jnp.zeros(shape, jnp.int32), jnp.full(shape, _ONE, jnp.int32))
    return jax.lax.fori_loop(0, 31, halve, start)[0]
