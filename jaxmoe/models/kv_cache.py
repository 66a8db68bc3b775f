"""The paged cache of attention on the device, and how a batch addresses it.

Layers whose attention looks equally far back form a *group* with pages of its own, in the order of `ModelConfig.spans`,
so that layers that see only a window or a chunk keep no more than that. Every attention rank owns its run of a group's
pages, which are split over ranks and numbered from 0 on each. A block table names, for each sequence of the batch,
the pages that hold its context in order, beginning at position `first`, a multiple of the page size: token p of a
sequence lies in page table[(p - first) // page_size], place p % page_size.
"""

import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxmoe.models.config import ModelConfig
from jaxmoe.ops.linear import TPU_LANES
from jaxmoe.ops.paged_attention import Pieces
from jaxmoe.sharding.rules import Rules
from jaxmoe.spans import Span

# Arrays of one group: keys (already rotated) and values [L, pages of all ranks, page, Kv, d], or where attention is
# latent a single one, of the normed latent and the rotated key of all heads [L, pages of all ranks, page, r + dr], on a
# TPU with room behind it up to a multiple of 128.
# The axes with an underscore differ from group to group, so no two arrays of a cache are held to the same.
Pages: TypeAlias = tuple[Float[Array, "_L _pages_of_all_ranks page *vector"], ...]
KVCache: TypeAlias = tuple[Pages, ...]
CacheShapes: TypeAlias = tuple[tuple[jax.ShapeDtypeStruct, ...], ...]


class PagedContext(NamedTuple):
    """The cache and where the batch's sequences live in it, by group.

    A table row's unused tail may hold any page: what lies there is at positions that no query has reached.
    pieces: of a batch whose tokens lie in one row.
    """

    cache: KVCache
    tables: tuple[Int[Array, "R S pages"], ...]
    firsts: tuple[Int[Array, "R S"], ...]
    pieces: Pieces | None = None

    @property
    def in_use(self) -> Int[Array, "R"] | None:
        """How many of a rank's rows are not padding, if that comes last."""
        # The last, and so the largest: of a slice, JAX 0.12 forgets over which ranks it is spread.
        return None if self.pieces is None else jnp.max(self.pieces.begins, axis=-1)


def cache_vectors(config: ModelConfig, platform: str = "cpu") -> tuple[tuple[int, ...], ...]:
    """Shape of what each array keeps for a token and layer. platform: by JAX's name, "cpu", "gpu" or "tpu".

    A TPU pads the last axis to whole tiles, or else XLA puts another axis last, in whose order nothing can be written:
    every step would copy the whole cache there and back. So the room is asked for.
    """
    if config.latent is not None:
        width = config.latent.kv_lora_rank + config.latent.rope_dim
        return ((width + -width % TPU_LANES if platform == "tpu" else width,),)
    return ((config.kv_heads, config.head_dim),) * 2


def cache_partitions(config: ModelConfig, rules: Rules) -> tuple[P, ...]:
    """How each array of a group is split: pages over ranks, key-value heads over `tp`, a latent not at all."""
    if config.latent is not None:
        return (rules.partition(None, "ranks", None, None),)
    return (rules.partition(None, "ranks", None, "kv_heads", None),) * 2


def cache_shapes(
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    rules: Rules,
    pages_per_rank: tuple[int, ...],
    page_size: int,
    dtype: jnp.dtype,
) -> CacheShapes:
    """The arrays of a cache, with their shardings. pages_per_rank: of each group."""
    vectors = cache_vectors(config, mesh.devices.flat[0].platform)
    arrays = list(zip(vectors, cache_partitions(config, rules), strict=True))

    def shape(span: Span, pages: int, vector: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
        axes = (len(config.layers_of(span)), rules.spec.num_ranks * pages, page_size, *vector)
        return jax.ShapeDtypeStruct(axes, dtype, sharding=NamedSharding(mesh, spec))

    return tuple(
        tuple(shape(span, pages, vector, spec) for vector, spec in arrays)
        for span, pages in zip(config.spans, pages_per_rank, strict=True)
    )


def make_cache(
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    rules: Rules,
    pages_per_rank: tuple[int, ...],
    page_size: int,
    dtype: jnp.dtype,
) -> KVCache:
    """An empty cache, allocated on its devices. pages_per_rank: of each group."""

    def zeros(of: jax.ShapeDtypeStruct) -> Array:
        make = jax.jit(lambda: jnp.zeros(of.shape, dtype, out_sharding=of.sharding.spec), out_shardings=of.sharding)
        return make()

    with jax.set_mesh(mesh):
        return jax.tree.map(zeros, cache_shapes(config, mesh, rules, pages_per_rank, page_size, dtype))


def bytes_per_page(
    config: ModelConfig, group: int, page_size: int, dtype: jnp.dtype, rules: Rules, platform: str = "cpu"
) -> int:
    """Bytes on one device of one page of a group, over all the group's layers."""
    numbers = sum(math.prod(vector) for vector in cache_vectors(config, platform))
    split = 1 if config.latent is not None else rules.parts("kv_heads")
    return len(config.layers_of(config.spans[group])) * page_size * numbers // split * jnp.dtype(dtype).itemsize
