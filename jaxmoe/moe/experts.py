"""The expert networks: gated MLPs, stacked over layers and physical slots, split over expert axes (slots) and `tp`."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.sharding.rules import Rules


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
        rules: Rules = Rules(),  # noqa: B008 - frozen
        depth: int | None = None,
    ) -> None:
        self.activation, self.rules = activation, rules
        key = rngs.params
        self.gate_up = nnx.Param(
            jax.random.normal(key(), (layers, slots, width, 2, expert_width), dtype) * width**-0.5,
            out_sharding=rules.partition(*self.GATE_UP),
        )
        self.down = nnx.Param(
            jax.random.normal(key(), (layers, slots, expert_width, width), dtype)
            * (2 * (depth or layers) * expert_width) ** -0.5,
            out_sharding=rules.partition(*self.DOWN),
        )
