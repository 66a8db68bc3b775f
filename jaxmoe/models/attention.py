"""Grouped-query attention, data-parallel over attention ranks and split by heads over `tp`."""

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
from jaxmoe.ops.attention import attention, causal_mask
from jaxmoe.ops.norms import rms_norm
from jaxmoe.ops.rope import cos_sin, rotate
from jaxmoe.sharding.mesh import RANKS
from jaxmoe.sharding.rules import Rules

RANK_ROWS = P(RANKS, None, None)
# One layer's parameters by name: shape, and the deviation of the random initial value; 0 for ones.
Shapes: TypeAlias = dict[str, tuple[tuple[int, ...], float]]


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
    table: Int[Array, "*R B pages"]
    first: Int[Array, "*R B"]


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

    def mix(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        kind: LayerKind,
        weights: dict[str, Array],
        cached: Layer,
        paging: Paging | None,
    ) -> tuple[Float[Array, "B T D"], Pages]:
        """On one rank and its part of the heads: the output before its bias, and the pages with what is new."""
        raise NotImplementedError

    def __call__(
        self, x: Hidden, positions: Positions, kind: LayerKind, at: Place, context: PagedContext | None
    ) -> tuple[Hidden, PagedContext | None]:
        """Attends within the batch's own rows (no context), or writes them to the cache and attends over the pages."""
        stacks = {name: getattr(self, name)[...] for name in self.shapes()}

        def local(
            x: Array, positions: Array, layer: Array, cached: Array, stacks: dict[str, Array], paging: Any
        ) -> tuple[Array, Pages]:
            rows = x.reshape(*positions.shape[1:], x.shape[-1])
            weights = {name: stack[layer] for name, stack in stacks.items()}
            own = Paging(paging[0], paging[1][0], paging[2][0]) if paging is not None else None
            result, pages = self.mix(rows, positions[0], kind, weights, cached, own)
            result = jax.lax.psum(result, "tp") if "heads" in self.rules.split else result
            if "out_bias" in weights:
                result = result + weights["out_bias"]
            return result.reshape(x.shape), pages

        pages_specs = kv_cache.cache_partitions(self.config, self.rules) if context is not None else ()
        paging_specs: Any = (pages_specs, RANK_ROWS, P(RANKS, None)) if context is not None else None
        stack_specs = {name: self.rules.partition(*self.SPLIT[name]) for name in stacks}
        run = jax.shard_map(
            local,
            in_specs=(RANK_ROWS, RANK_ROWS, P(), P(), stack_specs, paging_specs),
            out_specs=(RANK_ROWS, pages_specs),
            check_vma=False,
        )
        paging = None
        if context is not None:
            paging = (context.cache[at.group], context.tables[at.group], context.firsts[at.group])
        with jax.named_scope("attention"):
            result, pages = run(x, positions, jnp.asarray(at.layer), jnp.asarray(at.cached), stacks, paging)
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

    def mix(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        kind: LayerKind,
        weights: dict[str, Array],
        cached: Layer,
        paging: Paging | None,
    ) -> tuple[Float[Array, "B T D"], Pages]:
        """See CachedAttention."""
        config = self.config

        def project(name: str) -> Array:
            out = jnp.einsum("btd,dhk->bthk", x, weights[name])
            return out + weights[f"{name}_bias"] if f"{name}_bias" in weights else out

        query, key, value = project("query"), project("key"), project("value")
        if kind.rope:
            cos, sin = cos_sin(config.rope, config.head_dim, jnp.maximum(positions, 0), x.dtype)
            query, key = (rotate(heads, cos, sin, config.rope_interleaved) for heads in (query, key))
            if config.qk_norm:
                query, key = (rms_norm(heads, None, config.norm_eps) for heads in (query, key))
        elif config.temperature is not None:
            query = query * _temperature(config.temperature, positions)[:, :, None, None].astype(query.dtype)
        key_positions = positions
        pages: Pages = ()
        if paging is not None:
            pages = tuple(
                kv_cache.write(old, cached, new, positions, paging.table, paging.first)
                for old, new in zip(paging.pages, (key, value), strict=True)
            )
            key, value = (kv_cache.read(stored, cached, paging.table).astype(x.dtype) for stored in pages)
            key_positions = kv_cache.positions_of(paging.table, paging.first, pages[0].shape[2])
        if "kv_heads" not in self.rules.split and self.rules.parts("heads") > 1:
            # More devices than key-value heads: all of these are on each, and its query heads meet one of them.
            own = jax.lax.axis_index("tp") * config.kv_heads // self.rules.parts("heads")
            key, value = (jax.lax.dynamic_slice_in_dim(heads, own, 1, axis=2) for heads in (key, value))
        mask = causal_mask(positions, key_positions, kind.span)
        mixed = attention(query, key, value, mask, config.score_scale)
        return jnp.einsum("bthk,hkd->btd", mixed, weights["out"]), pages


def _temperature(tuning: TemperatureTuning, positions: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """1 + scale * log(1 + floor((position + 1) / floor_scale)), position counted from 0."""
    steps = jnp.floor((jnp.maximum(positions, 0).astype(jnp.float32) + 1) / tuning.floor_scale)
    return jnp.log1p(steps) * tuning.scale + 1
