"""The gate of gated MLPs."""

import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def swiglu(gate_up: Float[Array, "*rows two F"], activation: str) -> Float[Array, "*rows F"]:
    """activation(gate) * up of the fused projection."""
    return ACTIVATIONS[activation](gate_up[..., 0, :]) * gate_up[..., 1, :]
