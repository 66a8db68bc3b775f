"""Matrix multiplication in which every row names the weight matrix it meets: the local experts of a mixture.

Rows come sorted by group. `implementation` selects:

* "tiles": walks tiles of rows that belong to one group, as many as there are non-empty tiles. Only the matrices of
  groups that received a row are read, so a decode step pays for active experts alone. The default.
* "ragged_dot": `jax.lax.ragged_dot`, the reference. XLA computes all groups on a CPU.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Implementation = Literal["tiles", "ragged_dot"]
MAX_TILE_ROWS = 512


def grouped_matmul(
    rows: Float[Array, "M D"],
    weights: Float[Array, "S D F"],
    group_sizes: Int[Array, "G"],
    group_offset: int | Int[Array, ""] = 0,
    implementation: Implementation = "tiles",
) -> Float[Array, "M F"]:
    """Row m of group g times weights[group_offset + g]; rows beyond sum(group_sizes) give zeros.

    `group_offset` lets weights of many layers, stacked in one array, be used without slicing (and so copying) a layer.

    >>> grouped_matmul(rows=[a, b, c], weights=[W0, W1, W2], group_sizes=[2, 0, 1])
    [a @ W0, b @ W0, c @ W2]
    """
    if implementation == "ragged_dot":
        chosen = jax.lax.dynamic_slice_in_dim(weights, group_offset, group_sizes.shape[0])
        return jax.lax.ragged_dot(rows, chosen, group_sizes)
    if implementation != "tiles":
        raise ValueError(f"implementation={implementation!r} is not 'tiles' or 'ragged_dot'")
    return _tiled(rows, weights, group_sizes, jnp.asarray(group_offset, jnp.int32))


class _Tiles:
    """Which rows each tile covers.

    Tiles follow the sorted rows, so a tile is a contiguous slice that belongs to one group.

    group_sizes [5, 0, 3] in tiles of 4 rows:
        tile 0: group 0, rows 0..3    tile 1: group 0, row 4    tile 2: group 2, rows 5..7
    A tile that its group does not fill reads on into the next group's rows (here tile 1 reads rows 4..7).
    """

    def __init__(self, num_rows: int, group_sizes: Array) -> None:
        mean = max(1, num_rows // group_sizes.shape[0])
        self.size = min(MAX_TILE_ROWS, 1 << (mean - 1).bit_length())
        per_group = -(-group_sizes // self.size)
        self.tile_ends = jnp.cumsum(per_group)
        self.tile_starts = self.tile_ends - per_group
        self.row_ends = jnp.cumsum(group_sizes)
        self.row_starts = self.row_ends - group_sizes
        self.count = self.tile_ends[-1]

    def __call__(self, tile: Array) -> tuple[Array, Array, Array]:
        """Group, first row, and which of the tile's rows are the group's own."""
        group = jnp.sum(tile >= self.tile_ends)
        start = self.row_starts[group] + (tile - self.tile_starts[group]) * self.size
        return group, start, start + jnp.arange(self.size) < self.row_ends[group]

    def pad(self, rows: Array) -> Array:
        """Room for the last tile to read on."""
        return jnp.pad(rows, ((0, self.size), (0, 0)))


@jax.custom_vjp
def _tiled(rows: Array, weights: Array, group_sizes: Array, offset: Array) -> Array:
    num_rows = rows.shape[0]
    tiles = _Tiles(num_rows, group_sizes)
    padded = tiles.pad(rows)

    def multiply(tile: Array, out: Array) -> Array:
        group, start, _ = tiles(tile)
        product = jax.lax.dynamic_slice_in_dim(padded, start, tiles.size) @ weights[offset + group]
        # What lies past the group's end is wrong here and written over by the tile that comes next.
        return jax.lax.dynamic_update_slice_in_dim(out, product, start, 0)

    out = jnp.zeros((padded.shape[0], weights.shape[2]), rows.dtype)
    out = jax.lax.fori_loop(0, tiles.count, multiply, out)[:num_rows]
    return jnp.where(jnp.arange(num_rows)[:, None] < tiles.row_ends[-1], out, 0)


def _forward(rows: Array, weights: Array, group_sizes: Array, offset: Array) -> tuple[Array, tuple[Array, ...]]:
    return _tiled(rows, weights, group_sizes, offset), (rows, weights, group_sizes, offset)


def _backward(saved: tuple[Array, ...], grad: Array) -> tuple[Array, Array, None, None]:
    rows, weights, group_sizes, offset = saved
    num_rows = rows.shape[0]
    tiles = _Tiles(num_rows, group_sizes)
    padded_rows, padded_grad = tiles.pad(rows), tiles.pad(grad)

    def multiply(tile: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        to_rows, to_weights = carry
        group, start, own = tiles(tile)
        grad_tile = jax.lax.dynamic_slice_in_dim(padded_grad, start, tiles.size)
        row_tile = jax.lax.dynamic_slice_in_dim(padded_rows, start, tiles.size)
        to_rows = jax.lax.dynamic_update_slice_in_dim(to_rows, grad_tile @ weights[offset + group].T, start, 0)
        product = row_tile.T @ jnp.where(own[:, None], grad_tile, 0)
        return to_rows, to_weights.at[group].add(product)

    per_group = jnp.zeros((group_sizes.shape[0], *weights.shape[1:]), weights.dtype)
    to_rows, to_weights = jax.lax.fori_loop(0, tiles.count, multiply, (jnp.zeros_like(padded_rows), per_group))
    to_rows = jnp.where(jnp.arange(num_rows)[:, None] < tiles.row_ends[-1], to_rows[:num_rows], 0)
    everywhere = jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(weights), to_weights, offset, 0)
    return to_rows, everywhere, None, None


_tiled.defvjp(_forward, _backward)


def swiglu(gate_up: Float[Array, "*rows two F"], activation: str) -> Float[Array, "*rows F"]:
    """activation(gate) * up of the fused projection."""
    return ACTIVATIONS[activation](gate_up[..., 0, :]) * gate_up[..., 1, :]


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
