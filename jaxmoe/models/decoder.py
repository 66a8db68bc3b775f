"""The skeleton that all families share: embed, layers of attention and experts, final norm, logits."""

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxmoe.axes import Hidden, Layer, Logits, Positions, Tokens
from jaxmoe.models.attention import Attention
from jaxmoe.models.config import ModelConfig
from jaxmoe.models.kv_cache import PagedContext
from jaxmoe.moe.dispatch import Strategy, mixture
from jaxmoe.moe.experts import Experts
from jaxmoe.moe.placement import Placement, choose_slots
from jaxmoe.moe.routing import softmax_top_k
from jaxmoe.ops.norms import rms_norm
from jaxmoe.sharding.mesh import RANKS
from jaxmoe.sharding.rules import RULES, partition

RANK_ROWS = P(RANKS, None, None)
DecoderT = TypeVar("DecoderT", bound="Decoder")


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the same mathematics is laid out in a compiled program; never changes a token.

    unroll: write the layers out instead of scanning over them. Steps are equally fast on a CPU and programs three times
        longer to compile, so only training (whose gradients would pass through the scan) asks for it.
    """

    strategy: Strategy = "all_to_all"
    capacity_factor: float = 2.0
    unroll: bool = False


class Routed(NamedTuple):
    """What the routers decided, for losses and statistics. Padded rows have experts -1."""

    logits: Float[Array, "L R N E"]
    experts: Int[Array, "L R N K"]


class Decoder(nnx.Module):
    """Parameters of all layers, stacked on a leading axis, and the forward pass."""

    def __init__(
        self, config: ModelConfig, slots: int, dtype: jnp.dtype, rngs: nnx.Rngs, vocab_split: bool = False
    ) -> None:
        self.config = config
        self.vocab_partition = partition("vocab" if vocab_split else None, None)
        layers, width = config.layers, config.width

        def normal(shape: tuple[int, ...], scale: float, spec: P) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * scale, out_sharding=spec)

        def ones(*shape: int) -> nnx.Param:
            return nnx.Param(jnp.ones(shape, dtype), out_sharding=P())

        self.embed = normal((config.vocab_size, width), 0.02, self.vocab_partition)
        self.attention_norm = ones(layers, width)
        self.attention = Attention(config, dtype, rngs)
        self.expert_norm = ones(layers, width)
        self.router = normal((layers, width, config.experts), width**-0.5, P())
        self.experts = Experts(layers, slots, width, config.expert_width, config.activation, dtype, rngs)
        self.norm = ones(width)
        if not config.tie_embeddings:
            self.lm_head = normal((config.vocab_size, width), width**-0.5, self.vocab_partition)

    def __call__(
        self,
        tokens: Tokens,
        positions: Positions,
        placement: Placement,
        context: PagedContext | None = None,
        execution: Execution = Execution(),
    ) -> tuple[Hidden, PagedContext | None, Routed]:
        """Hidden states after the final norm, N = B * T rows a rank. Padding has position -1 and is routed nowhere.

        Without a context, row t attends to rows of its own sequence at positions up to its own; with one, keys and
        values are written to the cache's pages first and attention runs over the pages.
        """
        tokens, positions = jax.sharding.reshard((tokens, positions), (RANK_ROWS, RANK_ROWS))
        x = self._embed(tokens)

        def one_layer(
            carry: tuple[Array, PagedContext | None], layer: Layer
        ) -> tuple[tuple[Array, PagedContext | None], Routed]:
            x, context = carry
            with jax.named_scope("layer"):
                normed = self._norm(x, self.attention_norm[layer])
                attended, context = self.attention(normed, positions, layer, context)
                x = x + attended
                normed = self._norm(x, self.expert_norm[layer])
                logits, experts, weights, slots = self._route(normed, positions, layer, placement)
                x = x + mixture(
                    normed, slots, weights, self.experts, layer, execution.strategy, execution.capacity_factor
                )
            return (x, context), Routed(logits, experts)

        carry = (x, context)
        if execution.unroll:
            layers = []
            for layer in range(self.config.layers):
                carry, routed = one_layer(carry, layer)
                layers.append(routed)
            stacked = Routed(*(jnp.stack(arrays) for arrays in zip(*layers, strict=True)))
        else:
            carry, stacked = jax.lax.scan(one_layer, carry, jnp.arange(self.config.layers))
        x, context = carry
        return self._norm(x, self.norm[...]), context, stacked

    def logits(self, hidden: Hidden) -> Logits:
        """Next-token logits in the dtype of `hidden`, the whole vocabulary on every device of a rank."""
        table = self.embed if self.config.tie_embeddings else self.lm_head

        def local(hidden: Array, table: Array) -> Array:
            part = jnp.einsum("rnd,vd->rnv", hidden, table)
            return jax.lax.all_gather(part, "tp", axis=2, tiled=True) if self._vocab_is_split else part

        with jax.named_scope("logits"):
            run = jax.shard_map(local, in_specs=(RANK_ROWS, self.vocab_partition), out_specs=RANK_ROWS, check_vma=False)
            return run(hidden, table[...])

    @property
    def _vocab_is_split(self) -> bool:
        return self.vocab_partition[0] == RULES["vocab"] and jax.sharding.get_abstract_mesh().shape["tp"] > 1

    def _embed(self, tokens: Tokens) -> Hidden:
        def local(tokens: Array, table: Array) -> Array:
            flat = tokens.reshape(tokens.shape[0], -1)
            if not self._vocab_is_split:
                return table.at[flat].get(mode="clip")
            here = flat - jax.lax.axis_index("tp") * table.shape[0]
            rows = table.at[here].get(mode="clip")
            mine = (here >= 0) & (here < table.shape[0])
            return jax.lax.psum(jnp.where(mine[..., None], rows, 0), "tp")

        with jax.named_scope("embed"):
            run = jax.shard_map(local, in_specs=(RANK_ROWS, self.vocab_partition), out_specs=RANK_ROWS, check_vma=False)
            return run(tokens, self.embed[...])

    def _norm(self, x: Hidden, weight: Float[Array, "D"]) -> Hidden:
        return rms_norm(x, weight, self.config.norm_eps)

    def _route(self, x: Hidden, positions: Positions, layer: Layer, placement: Placement) -> tuple[Array, ...]:
        def local(x: Array, positions: Array, layer: Array, router: Array, placement: Placement) -> tuple[Array, ...]:
            logits = x[0] @ router[layer]
            experts, weights = softmax_top_k(logits, self.config.experts_per_token, positions.reshape(-1) >= 0)
            slots = choose_slots(experts, placement.replica_slots[layer], placement.replica_count[layer])
            return logits[None], experts[None], weights[None], slots[None]

        with jax.named_scope("route"):
            run = jax.shard_map(
                local,
                in_specs=(RANK_ROWS, RANK_ROWS, P(), P(), P()),
                out_specs=(RANK_ROWS, RANK_ROWS, RANK_ROWS, RANK_ROWS),
                check_vma=False,
            )
            return run(x, positions, jnp.asarray(layer), self.router[...], placement)


def merge(abstract: DecoderT, params: dict[str, Any]) -> DecoderT:
    """The module with these parameters, inside a trace: the engine passes parameters as a plain dict of few leaves."""
    graph, state = nnx.split(abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)
