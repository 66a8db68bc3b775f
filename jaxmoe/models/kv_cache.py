"""The paged key-value cache on the device, and how a batch addresses it.

Every attention rank owns its run of the pages' axis, which is split over ranks; a block table names, for each sequence
of the batch, the pages that hold its context in order, numbered from 0 on each rank. Token p of a sequence lies in page
table[p // page_size], place p % page_size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from jaxmoe.axes import Layer
from jaxmoe.models.config import ModelConfig
from jaxmoe.sharding.mesh import spec_of
from jaxmoe.sharding.rules import partition

CACHE_PARTITION = partition(None, "ranks", None, "kv_heads", None)


class KVCache(NamedTuple):
    """Keys (already rotated) and values of all layers."""

    keys: Float[Array, "L pages_of_all_ranks page Kv d"]
    values: Float[Array, "L pages_of_all_ranks page Kv d"]


class PagedContext(NamedTuple):
    """The cache and where the batch's sequences live in it. A table row's unused tail may hold any page."""

    cache: KVCache
    block_table: Int[Array, "R B pages"]


def make_cache(
    config: ModelConfig, mesh: jax.sharding.Mesh, pages_per_rank: int, page_size: int, dtype: jnp.dtype
) -> KVCache:
    """An empty cache, allocated on its devices."""
    shape = (config.layers, spec_of(mesh).num_ranks * pages_per_rank, page_size, config.kv_heads, config.head_dim)
    sharding = NamedSharding(mesh, CACHE_PARTITION)
    zeros = jax.jit(lambda: jnp.zeros(shape, dtype, out_sharding=CACHE_PARTITION), out_shardings=sharding)
    with jax.set_mesh(mesh):
        return KVCache(zeros(), zeros())


def bytes_per_page(config: ModelConfig, page_size: int, dtype: jnp.dtype) -> int:
    """Keys and values of one page over all layers, before `tp` splits it."""
    return 2 * config.layers * page_size * config.kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def write(
    pages: Float[Array, "L P page Kv d"],
    layer: Layer,
    new: Float[Array, "B T Kv d"],
    positions: Int[Array, "B T"],
    block_table: Int[Array, "B pages"],
) -> Float[Array, "L P page Kv d"]:
    """Puts every token's vector in its place on one rank. Padding (position -1) is written nowhere."""
    page_size = pages.shape[2]
    page = jnp.take_along_axis(block_table, jnp.maximum(positions, 0) // page_size, axis=1)
    page = jnp.where(positions < 0, pages.shape[1], page)
    return pages.at[layer, page, positions % page_size].set(new.astype(pages.dtype), mode="drop")


def read(
    pages: Float[Array, "L P page Kv d"], layer: Layer, block_table: Int[Array, "B pages"]
) -> Float[Array, "B Tk Kv d"]:
    """The whole context that the table names, in order of position."""
    gathered = pages[layer, block_table]
    batch, count, page_size, *vector = gathered.shape
    return gathered.reshape(batch, count * page_size, *vector)
