"""Dense gated MLPs: a dense layer's whole feed-forward part, and the shared expert beside a mixture."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxmoe.axes import Hidden, Layer
from jaxmoe.ops.grouped_matmul import swiglu
from jaxmoe.sharding.mesh import RANKS
from jaxmoe.sharding.rules import partition


class FeedForward(nnx.Module):
    """gate_up [L, D, 2, F] (gate first) and down [L, F, D] of the layers that have one; every rank has its own copy."""

    GATE_UP = (None, None, None, "dense_width")
    DOWN = (None, "dense_width", None)

    def __init__(
        self, layers: int, width: int, inner: int, activation: str, depth: int, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.activation = activation

        def normal(shape: tuple[int, ...], scale: float, meaning: tuple[str | None, ...]) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * scale, out_sharding=partition(*meaning))

        self.gate_up = normal((layers, width, 2, inner), width**-0.5, self.GATE_UP)
        self.down = normal((layers, inner, width), (2 * depth * inner) ** -0.5, self.DOWN)

    def __call__(self, x: Hidden, layer: Layer) -> Hidden:
        tp = jax.sharding.get_abstract_mesh().shape["tp"]

        def local(x: Array, layer: Array, gate_up: Array, down: Array) -> Array:
            hidden = swiglu(jnp.einsum("rnd,dtf->rntf", x, gate_up[layer]), self.activation)
            out = jnp.einsum("rnf,fd->rnd", hidden, down[layer])
            return jax.lax.psum(out, "tp") if tp > 1 else out

        ranks = P(RANKS, None, None)
        run = jax.shard_map(
            local,
            in_specs=(ranks, P(), partition(*self.GATE_UP), partition(*self.DOWN)),
            out_specs=ranks,
            check_vma=False,
        )
        with jax.named_scope("feed_forward"):
            return run(x, jnp.asarray(layer), self.gate_up[...], self.down[...])
