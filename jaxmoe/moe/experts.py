"""The expert networks: gated MLPs, stacked over layers and physical slots, split over expert axes (slots) and `tp`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.ops.quantised import LARGEST, Quantised, Stack
from jaxmoe.sharding.rules import Rules


class Experts(nnx.Module):
    """gate_up [L, S, D, 2, F] (gate first) and down [L, S, F, D]: one SwiGLU network for every layer and slot.

    Of 8 bits they have scales beside them, gate_up_scale [L, S, 2, F] and down_scale [L, S, D].
    """

    GATE_UP = (None, "slots", None, None, "expert_width")
    DOWN = (None, "slots", "expert_width", None)
    GATE_UP_SCALE = (None, "slots", None, "expert_width")
    DOWN_SCALE = (None, "slots", None)

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
        stored: jnp.dtype | None = None,
    ) -> None:
        """stored: the dtype that weights are kept in, if it is not the one that is computed in."""
        self.activation, self.rules = activation, rules
        self.quantised = stored in LARGEST

        def normal(shape: tuple[int, ...], scale: float, meaning: tuple[str | None, ...]) -> nnx.Param:
            value = (jax.random.normal(rngs.params(), shape, dtype) * scale).astype(stored or dtype)
            return nnx.Param(value, out_sharding=rules.partition(*meaning))

        self.gate_up = normal((layers, slots, width, 2, expert_width), width**-0.5, self.GATE_UP)
        down_scale = (2 * (depth or layers) * expert_width) ** -0.5
        self.down = normal((layers, slots, expert_width, width), down_scale, self.DOWN)
        if self.quantised:
            of_gate_up, of_down = (rules.partition(*meaning) for meaning in (self.GATE_UP_SCALE, self.DOWN_SCALE))
            self.gate_up_scale = nnx.Param(jnp.ones((layers, slots, 2, expert_width)), out_sharding=of_gate_up)
            self.down_scale = nnx.Param(jnp.ones((layers, slots, width)), out_sharding=of_down)

    @property
    def num_slots(self) -> int:
        return self.gate_up.shape[1]

    @property
    def stacks(self) -> tuple[Stack, Stack]:
        """gate_up and down, with their scales."""
        gate_up, down = self.gate_up[...], self.down[...]
        if self.quantised:
            return Quantised(gate_up, self.gate_up_scale[...]), Quantised(down, self.down_scale[...])
        return gate_up, down

    @property
    def partitions(self) -> tuple[Any, Any]:
        """How each is split, in the form of `stacks`."""

        def of(meaning: tuple[str | None, ...], of_scale: tuple[str | None, ...]) -> Any:
            values, scale = self.rules.partition(*meaning), self.rules.partition(*of_scale)
            return Quantised(values, scale) if self.quantised else values  # type: ignore[arg-type]

        return of(self.GATE_UP, self.GATE_UP_SCALE), of(self.DOWN, self.DOWN_SCALE)
