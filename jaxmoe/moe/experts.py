"""The expert networks: gated MLPs, stacked over layers and physical slots, split over `ep` (slots) and `tp` (width)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmoe.axes import Layer
from jaxmoe.ops.grouped_matmul import Implementation, grouped_matmul, swiglu
from jaxmoe.sharding.rules import partition


class Experts(nnx.Module):
    """gate_up [L, S, D, 2, F] (gate first) and down [L, S, F, D]: one SwiGLU network for every layer and slot."""

    GATE_UP = (None, "slots", None, None, "expert_width")
    DOWN = (None, "slots", "expert_width", None)

    def __init__(
        self,
        layers: int,
        slots: int,
        width: int,
        expert_width: int,
        activation: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        depth: int | None = None,
    ) -> None:
        self.activation = activation
        key = rngs.params
        self.gate_up = nnx.Param(
            jax.random.normal(key(), (layers, slots, width, 2, expert_width), dtype) * width**-0.5,
            out_sharding=partition(*self.GATE_UP),
        )
        self.down = nnx.Param(
            jax.random.normal(key(), (layers, slots, expert_width, width), dtype)
            * (2 * (depth or layers) * expert_width) ** -0.5,
            out_sharding=partition(*self.DOWN),
        )


def apply_experts(
    rows: Float[Array, "M D"],
    slots: Int[Array, "M"],
    gate_up: Float[Array, "L S D two F"],
    down: Float[Array, "L S F D"],
    layer: Layer,
    activation: str,
    implementation: Implementation = "tiles",
) -> Float[Array, "M D"]:
    """Every row through the network of its slot among those given (this device's); slot -1 gives zeros.

    Under `tp` the arrays hold a part of the width and so the result is a partial sum.
    """
    num_slots = gate_up.shape[1]
    order = jnp.argsort(jnp.where(slots < 0, num_slots, slots), stable=True)
    sizes = jnp.sum(slots[:, None] == jnp.arange(num_slots), axis=0, dtype=jnp.int32)
    offset = layer * num_slots
    fused = gate_up.reshape(-1, gate_up.shape[2], 2 * gate_up.shape[4])
    hidden = grouped_matmul(rows[order], fused, sizes, offset, implementation)
    hidden = swiglu(hidden.reshape(len(order), 2, -1), activation)
    out = grouped_matmul(hidden, down.reshape(-1, *down.shape[2:]), sizes, offset, implementation)
    return out[jnp.argsort(order)]
