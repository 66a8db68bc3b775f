"""Choosing the next token, on the device, every row by its own parameters."""

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
    seed: Int[Array, "B"],
    position: Int[Array, "B"],
    implementation: Kernels = "xla",
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """The token of every row and its log-probability under the unmodified logits.

    temperature 0 takes the most likely token (the lowest id on ties). Otherwise logits are divided by it, the top_k
    most likely are kept (0: all), of these the smallest set whose share of the probability reaches top_p, and one is
    drawn by the Gumbel trick. Tokens as likely as the last one kept are kept too, as in transformers' TopKLogitsWarper.
    The draw depends on (seed, position) alone: the same request gets the same tokens in any batch.
    """
    logits = logits.astype(jnp.float32)
    best, log_sum = greedy(logits, implementation)

    def draw() -> Int[Array, "B"]:
        # The likeliest token stays at 0, so that no temperature, however small, carries it to infinity.
        below = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled = below / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        filtered = jnp.any((temperature > 0) & ((top_k > 0) | (top_p < 1)))
        kept = jax.lax.cond(filtered, lambda: keep_likely(scaled, top_k, top_p), lambda: scaled)
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


def keep_likely(logits: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Logits with all but the top_k, and of these all but the top_p, set to -inf.

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
