"""The skeleton that all families share: embed, layers of attention and experts, final norm, logits."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.axes import Hidden, Layer, Logits, Positions, Tokens
from jaxmoe.models.attention import RANK_ROWS, Attention, Place
from jaxmoe.models.config import ModelConfig
from jaxmoe.models.feed_forward import FeedForward
from jaxmoe.models.keys import Keys
from jaxmoe.models.kv_cache import PagedContext
from jaxmoe.models.latent_attention import LatentAttention
from jaxmoe.models.segments import Segment, segments
from jaxmoe.moe.dispatch import mixture
from jaxmoe.moe.experts import Experts
from jaxmoe.moe.placement import Placement, choose_slots
from jaxmoe.moe.routing import Routing
from jaxmoe.moe.simulation import simulated_routing
from jaxmoe.ops.linear import Compute, Kernels, linear, linear_transposed
from jaxmoe.ops.norms import rms_norm
from jaxmoe.sharding.mesh import RANKS
from jaxmoe.sharding.rules import Rules

EVERYWHERE = P()
DecoderT = TypeVar("DecoderT", bound="Decoder")


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the same mathematics is laid out in a compiled program; never changes a token.

    strategy, capacity_factor, platform: see `moe.dispatch.mixture`.
    kernels: of linear layers, experts and attention (`implementation` of these ops): "xla", or on a CPU "native".
    record_routing: have steps give out each token's experts as well.
    unroll: write the layers out instead of scanning over them. Steps are equally fast on a CPU and programs three times
        longer to compile, so only training (whose gradients would pass through the scan) asks for it.
    """

    strategy: str = "auto"
    capacity_factor: float = 2.0
    platform: str = "cpu"
    kernels: Kernels = "xla"
    record_routing: bool = False
    unroll: bool = False


class Routed(NamedTuple):
    """What the routers decided, for losses and statistics, by layer of the stack "moe".

    Padded rows have experts and slots -1.
    """

    logits: Float[Array, "L R N E"]
    experts: Int[Array, "L R N K"]
    slots: Int[Array, "L R N K"]


class Decoder(nnx.Module):
    """Parameters of all layers, stacked on a leading axis, and the forward pass.

    A family derives from it: how its config reads, how its checkpoints name parameters, how its routers choose.
    """

    keys: ClassVar[Keys]
    ignored: ClassVar[str] = ""  # pattern of the names of tensors in checkpoints that the model does without
    prefix: ClassVar[str] = ""  # before the names of tensors in some checkpoints
    weigh_input: ClassVar[bool] = False  # whether a routing weight belongs on the expert's input
    router_dtype: ClassVar[jnp.dtype | None] = None  # of the routers' parameters, if not the model's

    @classmethod
    def wide(cls) -> frozenset[str]:
        """Parameters that are float32 whatever the model computes in."""
        return frozenset({"router", "router_bias"}) if cls.router_dtype == jnp.float32 else frozenset()

    @staticmethod
    def read_config(hf: Mapping[str, Any]) -> ModelConfig:
        """From `config.json`. Raises CheckpointError naming what is missing, malformed or not understood."""
        raise NotImplementedError

    def route(
        self,
        logits: Float[Array, "N E"],
        bias: Float[Array, "E"] | None,
        valid: Bool[Array, "N"],
    ) -> Routing:
        """What the router chooses on one rank. logits: in `router_dtype`, or the model's."""
        raise NotImplementedError

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        rules: Rules = Rules(),  # noqa: B008 - frozen
        expert_dtype: jnp.dtype | None = None,
    ) -> None:
        """expert_dtype: what experts' weights are kept in, if not in `dtype`."""
        self.config, self.rules = config, rules
        self.vocab_partition, self.head_partition = rules.partition("vocab", None), rules.partition(None, "vocab")
        width = config.width
        layers, mixtures, dense, mtp = (len(config.stacks[name]) for name in ("all", "moe", "dense", "mtp"))

        def normal(
            shape: tuple[int, ...], scale: float, spec: P = EVERYWHERE, of: jnp.dtype | None = None
        ) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), shape, of or dtype) * scale, out_sharding=spec)

        def ones(*shape: int) -> nnx.Param:
            return nnx.Param(jnp.ones(shape, dtype), out_sharding=P())

        def feed_forward(count: int, inner: int, meaning: str) -> FeedForward:
            return FeedForward(count, width, inner, config.activation, layers, dtype, rngs, rules, meaning)

        self.embed = normal((config.vocab_size, width), 0.02, self.vocab_partition)
        self.attention_norm = ones(layers, width)
        self.attention = (LatentAttention if config.latent else Attention)(config, dtype, rngs, rules)
        self.feed_forward_norm = ones(layers, width)
        if dense:
            self.dense = feed_forward(dense, config.dense_width, "dense_width")
        if mixtures:
            self.router = normal((mixtures, width, config.experts), width**-0.5, of=self.router_dtype)
            self.experts = Experts(
                mixtures,
                slots,
                width,
                config.expert_width,
                config.activation,
                dtype,
                rngs,
                rules,
                depth=layers,
                stored=expert_dtype,
            )
            if config.groups is not None:
                self.router_bias = nnx.Param(jnp.zeros((mixtures, config.experts), jnp.float32), out_sharding=P())
            if config.shared_width:
                self.shared = feed_forward(mixtures, config.shared_width, "shared_width")
        self.norm = ones(width)
        if not config.tie_embeddings:
            self.lm_head = normal((width, config.vocab_size), width**-0.5, self.head_partition)
        if mtp:
            self.mtp = NextTokens(mtp, width, dtype, rngs)

    def __call__(
        self,
        tokens: Tokens,
        positions: Positions,
        placement: Placement,
        context: PagedContext | None = None,
        execution: Execution = Execution(),
    ) -> tuple[Hidden, PagedContext | None, Routed | None]:
        """Hidden states after the final norm, N = B * T rows a rank. Padding has position -1 and is routed nowhere.

        Without a context, row t attends to rows of its own sequence at positions up to its own; with one, keys and
        values are written to the cache's pages first and attention runs over the pages. Routed is that of the main
        model's mixture layers, None if it has none.
        """
        tokens, positions = jax.sharding.reshard((tokens, positions), (RANK_ROWS, RANK_ROWS))
        x = self._embed(tokens)
        kinds = self.config.kinds
        found: list[Routed] = []
        for segment in segments(kinds):
            x, context, routed = self._run(segment, x, positions, placement, context, execution)
            found += routed
        joined = Routed(*(jnp.concatenate(arrays) for arrays in zip(*found, strict=True))) if found else None
        return self._norm(x, self.norm[...]), context, joined

    def predict_next(
        self,
        hidden: Hidden,
        next_tokens: Tokens,
        positions: Positions,
        placement: Placement,
        context: PagedContext | None = None,
        execution: Execution = Execution(),
    ) -> tuple[Hidden, PagedContext | None, Routed]:
        """Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, sec. 2.2), one token deep.

        hidden: of the main model, after its final norm. next_tokens: the token after each row's own.
        Returns hidden states whose `logits` are of the token after next, from a layer with a cache of its own.
        """
        tokens, positions = jax.sharding.reshard((next_tokens, positions), (RANK_ROWS, RANK_ROWS))
        x = self.mtp.join(self._embed(tokens), hidden, self.config.norm_eps, _compute(context, execution))
        last = self.config.layers
        x, context, routed = self._layer(x, positions, placement, self._place(last), last, context, execution)
        assert routed is not None
        return self._norm(x, self.mtp.norm[0]), context, routed

    def _run(
        self,
        segment: Segment,
        x: Hidden,
        positions: Positions,
        placement: Placement,
        context: PagedContext | None,
        execution: Execution,
    ) -> tuple[Hidden, PagedContext | None, list[Routed]]:
        """The layers of one segment; what was routed, with a layer axis."""

        def period(
            carry: tuple[Array, PagedContext | None], turn: Layer
        ) -> tuple[tuple[Array, PagedContext | None], list[Routed]]:
            x, context = carry
            found = []
            for layer in range(segment.start, segment.start + segment.period):
                place = self._place(layer, segment, turn)
                x, context, routed = self._layer(x, positions, placement, place, layer, context, execution)
                if routed is not None:
                    found.append(routed)
            return (x, context), found

        carry = (x, context)
        if segment.repeats == 1 or execution.unroll:
            turns = []
            for turn in range(segment.repeats):
                carry, found = period(carry, turn)
                turns += [jax.tree.map(lambda array: array[None], routed) for routed in found]
            return *carry, turns
        carry, stacked = jax.lax.scan(period, carry, jnp.arange(segment.repeats))
        if not stacked:
            return *carry, []
        # [turns, ...] of each mixture layer of a period to [turns * mixtures, ...] in order of layers.
        joined = Routed(
            *(
                jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:], out_sharding=P(None, *RANK_ROWS))
                for arrays in zip(*stacked, strict=True)
            )
        )
        return *carry, [joined]

    def _place(self, layer: int, segment: Segment | None = None, turn: Layer = 0) -> Place:
        """Where the arrays of a layer lie, `turn` periods further on in its segment."""
        kinds, spans = self.config.all_kinds, self.config.spans
        kind = kinds[layer]
        inside = kinds[segment.start : segment.start + segment.period] if segment else ()
        alike = sum(other.moe == kind.moe for other in kinds[:layer])
        cached = sum(other.span == kind.span for other in kinds[:layer])
        return Place(
            layer + turn * len(inside),
            alike + turn * sum(other.moe == kind.moe for other in inside),
            spans.index(kind.span),
            cached + turn * sum(other.span == kind.span for other in inside),
        )

    def _layer(
        self,
        x: Hidden,
        positions: Positions,
        placement: Placement,
        place: Place,
        number: int,
        context: PagedContext | None,
        execution: Execution,
    ) -> tuple[Hidden, PagedContext | None, Routed | None]:
        """One layer of the kind that layer `number` has, with the arrays of `place`."""
        kind = self.config.all_kinds[number]
        compute, routed = _compute(context, execution), None
        with jax.named_scope("layer"):
            normed = self._norm(x, self.attention_norm[place.layer])
            attended, context = self.attention(normed, positions, kind, place, context, compute)
            x = x + attended
            normed = self._norm(x, self.feed_forward_norm[place.layer])
            if kind.moe:
                mixed, routed = self._mixture(normed, positions, place.feed_forward, placement, execution, compute)
                x = x + mixed
            else:
                x = x + self.dense(normed, place.feed_forward, compute)
        return x, context, routed

    def _mixture(
        self,
        x: Hidden,
        positions: Positions,
        layer: Layer,
        placement: Placement,
        execution: Execution,
        compute: Compute,
    ) -> tuple[Hidden, Routed]:
        logits, experts, weights, slots = self._route(x, positions, layer, placement, compute)
        mixed = mixture(
            x,
            slots,
            weights,
            self.experts,
            layer,
            execution.strategy,
            execution.capacity_factor,
            self.weigh_input,
            execution.platform,
            execution.kernels,
        )
        if self.config.shared_width:
            mixed = mixed + self.shared(x, layer, compute)
        return mixed, Routed(logits, experts, slots)

    def logits(self, hidden: Hidden, compute: Compute = Compute()) -> Logits:  # noqa: B008 - frozen
        """Next-token logits in the dtype of `hidden`, the whole vocabulary on every device of a rank."""
        tied = self.config.tie_embeddings
        table, partition = (self.embed, self.vocab_partition) if tied else (self.lm_head, self.head_partition)

        def local(hidden: Array, table: Array, compute: Compute) -> Array:
            if tied:
                part = linear_transposed(hidden, table, compute.kernels)
            else:
                (part,) = linear(hidden, [table[None]], compute=compute.of_rank)
            return jax.lax.all_gather(part, "tp", axis=2, tiled=True) if "vocab" in self.rules.split else part

        with jax.named_scope("logits"):
            in_specs = (RANK_ROWS, partition, P(RANKS))
            run = jax.shard_map(local, in_specs=in_specs, out_specs=RANK_ROWS, check_vma=False)
            return run(hidden, table[...], compute)

    def _embed(self, tokens: Tokens) -> Hidden:
        def local(tokens: Array, table: Array) -> Array:
            flat = tokens.reshape(tokens.shape[0], -1)
            if "vocab" not in self.rules.split:
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

    def _route(
        self, x: Hidden, positions: Positions, layer: Layer, placement: Placement, compute: Compute
    ) -> tuple[Array, ...]:
        def local(
            x: Array,
            positions: Array,
            layer: Array,
            router: Array,
            bias: Array | None,
            placement: Placement,
            compute: Compute,
        ) -> tuple[Array, ...]:
            of_layer = None if bias is None else bias[layer]
            (logits,) = linear(x[0].astype(router.dtype), [router], layer, compute.of_rank)
            valid = positions.reshape(-1) >= 0
            experts, weights = self.route(logits, of_layer, valid)
            if placement.simulated is not None:
                rank = jax.lax.axis_index(RANKS)
                experts, weights = simulated_routing(placement.simulated, layer, rank, experts.shape[1], valid)
            slots = choose_slots(experts, placement.replica_slots[layer], placement.replica_count[layer])
            return logits[None], experts[None], weights[None], slots[None]

        with jax.named_scope("route"):
            run = jax.shard_map(
                local,
                in_specs=(RANK_ROWS, RANK_ROWS, P(), P(), P(), P(), P(RANKS)),
                out_specs=(RANK_ROWS, RANK_ROWS, RANK_ROWS, RANK_ROWS),
                check_vma=False,
            )
            bias = self.router_bias[...] if self.config.groups is not None else None
            return run(x, positions, jnp.asarray(layer), self.router[...], bias, placement, compute)


class NextTokens(nnx.Module):
    """What layers that predict a token more have beside a layer's own parameters.

    embed_norm, hidden_norm, norm [L, D]; project [L, 2 D, D], whose first half meets the embedding.
    """

    def __init__(self, layers: int, width: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        def ones() -> nnx.Param:
            return nnx.Param(jnp.ones((layers, width), dtype), out_sharding=P())

        self.embed_norm, self.hidden_norm, self.norm = ones(), ones(), ones()
        project = jax.random.normal(rngs.params(), (layers, 2 * width, width), dtype) * (2 * width) ** -0.5
        self.project = nnx.Param(project, out_sharding=P())

    def join(
        self,
        embedded: Hidden,
        hidden: Hidden,
        eps: float,
        compute: Compute = Compute(),  # noqa: B008 - frozen
    ) -> Hidden:
        """What goes into the layer."""

        def local(normed: Array, project: Array, compute: Compute) -> Array:
            return linear(normed, [project], 0, compute.of_rank)[0]

        normed = (rms_norm(embedded, self.embed_norm[0], eps), rms_norm(hidden, self.hidden_norm[0], eps))
        run = jax.shard_map(
            local,
            in_specs=(RANK_ROWS, P(), P(RANKS)),
            out_specs=RANK_ROWS,
            check_vma=False,
        )
        return run(jnp.concatenate(normed, axis=-1), self.project[...], compute)


def _compute(context: PagedContext | None, execution: Execution) -> Compute:
    return Compute(execution.kernels, None if context is None else context.in_use)


def merge(abstract: DecoderT, params: dict[str, Any]) -> DecoderT:
    """The module with these parameters, inside a trace: the engine passes parameters as a plain dict of few leaves."""
    graph, state = nnx.split(abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)
