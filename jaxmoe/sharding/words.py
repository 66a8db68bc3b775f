"""Arrays of several types as one array of words, so that they travel in one collective."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt


def to_words(array: Shaped[Array, "N width"], like: Any) -> UInt[Array, "N words"]:
    """The bits of `array` in unsigned integers as wide as the dtype `like`, which is at most as wide as its own.

    As integers no compiler widens or rounds them on the way: XLA:CPU would send bfloat16 as float32.
    """
    word = {2: jnp.uint16, 4: jnp.uint32}[jnp.dtype(like).itemsize]
    words = jax.lax.bitcast_convert_type(array, word)
    return words.reshape(array.shape[0], -1)


def from_words(words: UInt[Array, "N words"], fields: Sequence[tuple[int, Any]]) -> list[Shaped[Array, "N width"]]:
    """The arrays that were joined along the second axis, of these widths and dtypes."""
    arrays, start = [], 0
    for width, dtype in fields:
        each = jnp.dtype(dtype).itemsize // words.dtype.itemsize
        part = words[:, start : start + width * each]
        start += width * each
        arrays.append(jax.lax.bitcast_convert_type(part.reshape(-1, width, each) if each > 1 else part, dtype))
    return arrays
