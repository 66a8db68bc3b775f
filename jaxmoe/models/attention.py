"""Grouped-query attention, data-parallel over attention ranks and split by heads over `tp`."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxmoe.axes import Hidden, Layer, Positions
from jaxmoe.models import kv_cache
from jaxmoe.models.config import ModelConfig
from jaxmoe.models.kv_cache import CACHE_PARTITION, KVCache, PagedContext
from jaxmoe.ops.attention import attention, causal_mask
from jaxmoe.ops.rope import cos_sin, rotate_half_split
from jaxmoe.sharding.mesh import RANKS
from jaxmoe.sharding.rules import partition


class Attention(nnx.Module):
    """Projections of all layers: query [L, D, H, d], key and value [L, D, Kv, d], out [L, H, d, D]."""

    QUERY = (None, None, "heads", None)
    KEY_VALUE = (None, None, "kv_heads", None)
    OUT = (None, "heads", None, None)

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        layers, width, d = config.layers, config.width, config.head_dim

        def normal(shape: tuple[int, ...], fan_in: int, meaning: tuple[str | None, ...]) -> nnx.Param:
            value = jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5
            return nnx.Param(value, out_sharding=partition(*meaning))

        self.query = normal((layers, width, config.heads, d), width, self.QUERY)
        self.key = normal((layers, width, config.kv_heads, d), width, self.KEY_VALUE)
        self.value = normal((layers, width, config.kv_heads, d), width, self.KEY_VALUE)
        self.out = normal((layers, config.heads, d, width), 2 * layers * config.heads * d, self.OUT)

    def __call__(
        self,
        x: Hidden,
        positions: Positions,
        layer: Layer,
        context: PagedContext | None,
    ) -> tuple[Hidden, PagedContext | None]:
        """Attends within the batch's own rows (no context), or writes them to the cache and attends over the pages."""
        config, paged = self.config, context is not None
        tp = jax.sharding.get_abstract_mesh().shape["tp"]

        def local(
            x: Array, positions: Array, layer: Array, query: Array, key: Array, value: Array, out: Array, *paging: Array
        ) -> tuple[Array, ...]:
            positions = positions[0]
            rows = x.reshape(*positions.shape, x.shape[-1])
            cos, sin = cos_sin(config.rope, config.head_dim, jnp.maximum(positions, 0), x.dtype)
            q = rotate_half_split(jnp.einsum("btd,dhk->bthk", rows, query[layer]), cos, sin)
            k = rotate_half_split(jnp.einsum("btd,dhk->bthk", rows, key[layer]), cos, sin)
            v = jnp.einsum("btd,dhk->bthk", rows, value[layer])
            key_positions = positions
            stores: tuple[Array, ...] = ()
            if paged:
                keys, values, (table,) = paging
                keys = kv_cache.write(keys, layer, k, positions, table)
                values = kv_cache.write(values, layer, v, positions, table)
                k, v = kv_cache.read(keys, layer, table), kv_cache.read(values, layer, table)
                key_positions = jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2])
                stores = (keys, values)
            mask = causal_mask(positions, key_positions, config.sliding_window)
            mixed = attention(q, k.astype(q.dtype), v.astype(q.dtype), mask, config.head_dim**-0.5)
            result = jnp.einsum("bthk,hkd->btd", mixed, out[layer]).reshape(x.shape)
            return (jax.lax.psum(result, "tp") if tp > 1 else result, *stores)

        ranks3 = P(RANKS, None, None)
        weights = (partition(*self.QUERY), partition(*self.KEY_VALUE), partition(*self.KEY_VALUE), partition(*self.OUT))
        cache_specs = (CACHE_PARTITION, CACHE_PARTITION) if paged else ()
        run = jax.shard_map(
            local,
            in_specs=(ranks3, ranks3, P(), *weights, *cache_specs, *((ranks3,) if paged else ())),
            out_specs=(ranks3, *cache_specs),
            check_vma=False,
        )
        paging = (*context.cache, context.block_table) if context is not None else ()
        with jax.named_scope("attention"):
            result, *stores = run(
                x,
                positions,
                jnp.asarray(layer),
                self.query[...],
                self.key[...],
                self.value[...],
                self.out[...],
                *paging,
            )
        return result, context._replace(cache=KVCache(*stores)) if context is not None else None
