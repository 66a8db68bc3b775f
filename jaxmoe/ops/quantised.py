"""Weights kept in fewer bits than they are computed with, and the matrices they stand for."""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

# What 8 bits can hold; the largest of a channel becomes this.
LARGEST = {jnp.dtype("int8"): 127.0, jnp.dtype("float8_e4m3fn"): 448.0}


class Quantised(NamedTuple):
    """Stacked matrices values * scale, with one scale for each output channel of each matrix.

    values [L, S, K, *N] of int8 or float8_e4m3fn, scale [L, S, *N] of float32.
    """

    values: Num[Array, "..."]
    scale: Float[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


Stack: TypeAlias = Array | Quantised


def quantise(stack: Float[Array, "L S K *N"], dtype: jnp.dtype) -> Quantised:
    """To the nearest value that `dtype` has, the largest of each output channel to its largest."""
    largest = jnp.max(jnp.abs(stack), axis=2, keepdims=True).astype(jnp.float32)
    scale = jnp.where(largest > 0, largest, 1.0) / LARGEST[dtype]
    values = stack.astype(jnp.float32) / scale
    rounded = jnp.round(values) if dtype == jnp.dtype("int8") else values
    return Quantised(rounded.astype(dtype), jnp.squeeze(scale, 2))


def dequantise(stack: Stack, dtype: jnp.dtype) -> Array:
    """The matrices themselves. An array that is not quantised is only cast."""
    if isinstance(stack, Quantised):
        return (stack.values.astype(jnp.float32) * jnp.expand_dims(stack.scale, 2)).astype(dtype)
    return stack.astype(dtype)


def pick(stack: Stack, index: int | Int[Array, ""]) -> Stack:
    """One entry along the first axis."""
    return jax.tree.map(lambda array: array[index], stack)


def times(rows: Float[Array, "M K"], matrix: Stack) -> Float[Array, "M N"]:
    """rows times one matrix [K, N] (scale [N]), in the rows' dtype."""
    if isinstance(matrix, Quantised):
        return ((rows @ matrix.values.astype(rows.dtype)) * matrix.scale).astype(rows.dtype)
    return rows @ matrix.astype(rows.dtype)
