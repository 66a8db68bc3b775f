"""Grouped-query attention, data-parallel over attention ranks and split by heads over `tp`."""

import dataclasses
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxmoe.axes import Hidden, Layer, Positions
from jaxmoe.models import kv_cache
from jaxmoe.models.config import LayerKind, ModelConfig, TemperatureTuning
from jaxmoe.models.kv_cache import PagedContext, Pages
from jaxmoe.ops import paged_attention
from jaxmoe.ops.linear import Compute, Kernels, linear, linear_by_head
from jaxmoe.ops.norms import rms_norm
from jaxmoe.ops.rope import cos_sin, rotate
from jaxmoe.sharding.mesh import RANKS
from jaxmoe.sharding.rules import Rules
from jaxmoe.spans import Span

RANK_ROWS = P(RANKS, None, None)
# One layer's parameters by name: shape, and the deviation of the random initial value; 0 for ones.
Shapes: TypeAlias = dict[str, tuple[tuple[int, ...], float]]
Queries: TypeAlias = tuple[Float[Array, "B T H _d"], ...]  # in as many parts as a kind of attention makes of them


class Place(NamedTuple):
    """Where a layer's arrays lie: its number, and its place among those with the same feed-forward part and span.

    group is static; the others may be traced, as in a scan over layers.
    """

    layer: Layer
    feed_forward: Layer
    group: int
    cached: Layer


class Paging(NamedTuple):
    """One group's part of a PagedContext."""

    pages: Pages
    table: Int[Array, "*R S pages"]
    first: Int[Array, "*R S"]
    pieces: paged_attention.Pieces | None


class Seen(NamedTuple):
    """What the queries of one layer on one rank attend over.

    positions: of the queries; -1 is padding, whose rows mean nothing. pages: what the cache holds of each token, those
        of the queries included. where: see `ops.paged_attention`. span: how far back a query sees.
    """

    positions: Int[Array, "B T"]
    pages: Pages
    where: paged_attention.Where
    span: Span

    def attend(
        self, query: Float[Array, "B T H d"], scale: float, value_dim: int, kernels: Kernels = "xla"
    ) -> Float[Array, "B T H dv"]:
        """See `ops.paged_attention.attend`."""
        return paged_attention.attend(
            query, self.positions, self.pages, self.where, scale, self.span, value_dim, kernels
        )


@dataclasses.dataclass(frozen=True)
class Weights:
    """One layer's parameters among those of all layers, stacked; matrices are used where they lie in their stacks."""

    stacks: dict[str, Array]
    layer: Int[Array, ""]
    compute: Compute

    def __contains__(self, name: str) -> bool:
        return name in self.stacks

    def __getitem__(self, name: str) -> Array:
        """A parameter, copied."""
        return self.stacks[name][self.layer]

    def project(self, x: Float[Array, "B T K"], *names: str) -> list[Array]:
        """x times each of these matrices, plus its bias if there is one."""
        outs = linear(x, [self.stacks[name] for name in names], self.layer, self.compute)
        biases = (f"{name}_bias" for name in names)
        return [out + self[bias] if bias in self else out for out, bias in zip(outs, biases, strict=True)]

    def by_head(
        self, x: Float[Array, "B T H K"], name: str, columns: slice, transposed: bool = False
    ) -> Float[Array, "B T H N"]:
        """Each head times a matrix of its own: see `linear_by_head`."""
        return linear_by_head(x, self.stacks[name], self.layer, columns, transposed, self.compute.kernels)

    def join(self, heads: Float[Array, "B T H d"]) -> Float[Array, "B T D"]:
        """The output projection of all heads together, before its bias."""
        out = self.stacks["out"]
        flat = heads.reshape(*heads.shape[:2], -1)
        stack = out.reshape(out.shape[0], -1, out.shape[-1])
        return linear(flat, [stack], self.layer, self.compute)[0]


class CachedAttention(nnx.Module):
    """What kinds of attention share: parameters of all layers, stacked, and the passage through the paged cache."""

    SPLIT: ClassVar[dict[str, tuple[str | None, ...]]]

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs, rules: Rules) -> None:
        self.config, self.rules = config, rules
        for name, (shape, scale) in self.shapes().items():
            full = (len(config.all_kinds), *shape)
            value = jax.random.normal(rngs.params(), full, dtype) * scale if scale else jnp.ones(full, dtype)
            setattr(self, name, nnx.Param(value, out_sharding=rules.partition(*self.SPLIT[name])))

    def shapes(self) -> Shapes:
        """Of one layer."""
        raise NotImplementedError

    def project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], kind: LayerKind, weights: Weights
    ) -> tuple[Queries, tuple[Float[Array, "B T *_vector"], ...]]:
        """On one rank and its part of the heads: queries, and what the arrays of the cache keep of each token."""
        raise NotImplementedError

    def attend(self, queries: Queries, seen: Seen, weights: Weights) -> Float[Array, "B T H dv"]:
        """What each head's queries bring from all that they see."""
        raise NotImplementedError

    def __call__(
        self,
        x: Hidden,
        positions: Positions,
        kind: LayerKind,
        at: Place,
        context: PagedContext | None,
        compute: Compute = Compute(),  # noqa: B008 - frozen
    ) -> tuple[Hidden, PagedContext | None]:
        """Attends within the batch's own rows (no context), or writes them to the cache and attends over the pages."""
        stacks = {name: getattr(self, name)[...] for name in self.shapes()}

        def local(
            x: Array,
            positions: Array,
            layer: Array,
            cached: Array,
            stacks: dict[str, Array],
            compute: Compute,
            paging: Any,
        ) -> tuple[Array, Pages]:
            by_sequence = x.reshape(*positions.shape[1:], x.shape[-1])
            own = Paging(paging[0], *jax.tree.map(lambda each: each[0], paging[1:])) if paging else None
            weights = Weights(stacks, layer, compute.of_rank)
            queries, new = self.project(by_sequence, positions[0], kind, weights)
            seen = _cached(new, positions[0], kind.span, cached, own, weights.compute.kernels)
            result = weights.join(self.attend(queries, seen, weights))
            result = jax.lax.psum(result, "tp") if "heads" in self.rules.split else result
            if "out_bias" in weights:
                result = result + weights["out_bias"]
            return result.reshape(x.shape), seen.pages if own else ()

        pages_specs = kv_cache.cache_partitions(self.config, self.rules) if context is not None else ()
        paging_specs: Any = None
        if context is not None:
            of_pieces = None if context.pieces is None else P(RANKS)
            paging_specs = (pages_specs, RANK_ROWS, P(RANKS, None), of_pieces)
        stack_specs = {name: self.rules.partition(*self.SPLIT[name]) for name in stacks}
        run = jax.shard_map(
            local,
            in_specs=(RANK_ROWS, RANK_ROWS, P(), P(), stack_specs, P(RANKS), paging_specs),
            out_specs=(RANK_ROWS, pages_specs),
            check_vma=False,
        )
        paging = None
        if context is not None:
            paging = (context.cache[at.group], context.tables[at.group], context.firsts[at.group], context.pieces)
        with jax.named_scope("attention"):
            result, pages = run(x, positions, jnp.asarray(at.layer), jnp.asarray(at.cached), stacks, compute, paging)
        if context is not None:
            cache = (*context.cache[: at.group], pages, *context.cache[at.group + 1 :])
            context = context._replace(cache=cache)
        return result, context


class Attention(CachedAttention):
    """Projections of all layers: query [L, D, H, d], key and value [L, D, Kv, d], out [L, H, d, D]; maybe biases."""

    SPLIT: ClassVar = {
        "query": (None, None, "heads", None),
        "key": (None, None, "kv_heads", None),
        "value": (None, None, "kv_heads", None),
        "out": (None, "heads", None, None),
        "query_bias": (None, "heads", None),
        "key_bias": (None, "kv_heads", None),
        "value_bias": (None, "kv_heads", None),
        "out_bias": (None, None),
    }  # fmt: skip

    def shapes(self) -> Shapes:
        c = self.config
        shapes: Shapes = {
            "query": ((c.width, c.heads, c.head_dim), c.width**-0.5),
            "key": ((c.width, c.kv_heads, c.head_dim), c.width**-0.5),
            "value": ((c.width, c.kv_heads, c.head_dim), c.width**-0.5),
            "out": ((c.heads, c.head_dim, c.width), (2 * c.layers * c.heads * c.head_dim) ** -0.5),
        }
        if c.attention_bias:
            shapes |= {"query_bias": ((c.heads, c.head_dim), 0.02), "out_bias": ((c.width,), 0.02)}
            shapes |= dict.fromkeys(("key_bias", "value_bias"), ((c.kv_heads, c.head_dim), 0.02))
        return shapes

    def project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], kind: LayerKind, weights: Weights
    ) -> tuple[Queries, tuple[Float[Array, "B T *_vector"], ...]]:
        """See CachedAttention."""
        config = self.config
        query, key, value = weights.project(x, "query", "key", "value")
        if kind.rope:
            cos, sin = cos_sin(config.rope, config.head_dim, jnp.maximum(positions, 0), x.dtype)
            query, key = (rotate(heads, cos, sin, config.rope_interleaved) for heads in (query, key))
            if config.qk_norm:
                query, key = (rms_norm(heads, None, config.norm_eps) for heads in (query, key))
        elif config.temperature is not None:
            query = query * _temperature(config.temperature, positions)[:, :, None, None].astype(query.dtype)
        return (query,), (key, value)

    def attend(self, queries: Queries, seen: Seen, weights: Weights) -> Float[Array, "B T H dv"]:
        """See CachedAttention."""
        config, where, (query,) = self.config, seen.where, queries
        if "kv_heads" not in self.rules.split and self.rules.parts("heads") > 1:
            # More devices than key-value heads: all of these are on each, and its query heads meet one of them.
            own = jax.lax.axis_index("tp") * config.kv_heads // self.rules.parts("heads")
            # Only the pages that the tables name: a slice of the cache itself would be a copy of all of it.
            read = [paged_attention.read(array, where) for array in seen.pages]
            pair = tuple(jax.lax.dynamic_slice_in_dim(array, own, 1, axis=2)[None] for array in read)
            beside = paged_attention.side_by_side(where.first)._replace(pieces=where.pieces)
            return seen._replace(pages=pair, where=beside).attend(query, config.score_scale, config.head_dim)
        return seen.attend(query, config.score_scale, config.head_dim, weights.compute.kernels)


def _cached(
    new: tuple[Array, ...],
    positions: Int[Array, "B T"],
    span: Span,
    layer: Layer,
    paging: Paging | None,
    kernels: Kernels,
) -> Seen:
    """What attention reads: the pages, with what is new [B, T, ...] in them, or that alone if there are none."""
    if paging is None:
        where = paged_attention.side_by_side(jnp.maximum(positions[:, 0], 0))
        return Seen(positions, tuple(array[None] for array in new), where, span)
    where = paged_attention.Where(layer, paging.table, paging.first, paging.pieces)
    return Seen(positions, paged_attention.write(paging.pages, new, positions, where, kernels), where, span)


def _temperature(tuning: TemperatureTuning, positions: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """1 + scale * log(1 + floor((position + 1) / floor_scale)), position counted from 0."""
    steps = jnp.floor((jnp.maximum(positions, 0).astype(jnp.float32) + 1) / tuning.floor_scale)
    return jnp.log1p(steps) * tuning.scale + 1
