"""Dense gated MLPs: a dense layer's whole feed-forward part, and the shared expert beside a mixture."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxmoe.axes import Hidden, Layer
from jaxmoe.ops.grouped_mlp import gated_mlp
from jaxmoe.ops.linear import Compute
from jaxmoe.sharding.mesh import RANKS
from jaxmoe.sharding.rules import Rules


class FeedForward(nnx.Module):
    """gate_up [L, D, 2, F] (gate first) and down [L, F, D] of the layers that have one; every rank has its own copy."""

    def __init__(
        self,
        layers: int,
        width: int,
        inner: int,
        activation: str,
        depth: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        rules: Rules,
        meaning: str,
    ) -> None:
        """meaning: of the inner width, to `rules`: "dense_width" or "shared_width"."""
        self.activation = activation
        self.is_split = meaning in rules.split
        self.gate_up_partition = rules.partition(None, None, None, meaning)
        self.down_partition = rules.partition(None, meaning, None)

        def normal(shape: tuple[int, ...], scale: float, spec: P) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * scale, out_sharding=spec)

        self.gate_up = normal((layers, width, 2, inner), width**-0.5, self.gate_up_partition)
        self.down = normal((layers, inner, width), (2 * depth * inner) ** -0.5, self.down_partition)

    def __call__(self, x: Hidden, layer: Layer, compute: Compute = Compute()) -> Hidden:  # noqa: B008 - frozen
        def local(x: Array, layer: Array, gate_up: Array, down: Array, compute: Compute) -> Array:
            out = gated_mlp(x[0], gate_up, down, layer, self.activation, compute.of_rank)[None]
            return jax.lax.psum(out, "tp") if self.is_split else out

        ranks = P(RANKS, None, None)
        run = jax.shard_map(
            local,
            in_specs=(ranks, P(), self.gate_up_partition, self.down_partition, P(RANKS)),
            out_specs=ranks,
            check_vma=False,
        )
        with jax.named_scope("feed_forward"):
            return run(x, jnp.asarray(layer), self.gate_up[...], self.down[...], compute)
