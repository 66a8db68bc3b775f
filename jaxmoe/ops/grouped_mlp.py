"""The gated MLPs that rows name, and only those: the local experts of a mixture.

`implementation` selects, all equal:

* "tiles": walks tiles of rows that belong to one MLP, as many as there are non-empty tiles. Only MLPs that received a
  row are read, and only rows that were received are gathered, so that a step pays for what is active however large its
  arrays are. Any backend; the default on a CPU.
* "ragged_dot": sorts the rows and calls `jax.lax.ragged_dot`: the reference, and the default on a GPU. XLA computes all
  MLPs on a CPU.
* "native": `ops/native.py`, by kernels for a CPU; touches what "tiles" does.
* "megablox": sorts the rows and calls the grouped matmul kernel for TPUs that comes with JAX (Pallas); the default
  there. Elsewhere it is interpreted, which only tests want.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.ops import native
from jaxmoe.ops.gating import swiglu
from jaxmoe.ops.linear import Compute, of_layer
from jaxmoe.ops.quantised import Quantised, Stack, pick, times

Implementation = Literal["tiles", "native", "ragged_dot", "megablox"]
MAX_TILE_ROWS = 512
KERNEL_ROWS = 128  # of a tile of the Pallas kernel, which divides its rows


def implementation_for(platform: str) -> Implementation:
    """The default of a platform by JAX's name: "cpu", "gpu", "tpu"."""
    defaults: dict[str, Implementation] = {"gpu": "ragged_dot", "tpu": "megablox"}
    return defaults.get(platform, "tiles")


def grouped_mlp(
    x: Float[Array, "N D"],
    slots: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    gate_up: Stack,
    down: Stack,
    layer: int | Int[Array, ""] = 0,
    activation: str = "silu",
    *,
    weigh_input: bool = False,
    implementation: str = "tiles",
    expected: int | None = None,
) -> Float[Array, "N D"]:
    """sum_k weights[n, k] * mlp[layer, slots[n, k]](x[n]), summed in float32 and cast to x's dtype.

    gate_up, down: [L, S, D, 2, F] and [L, S, F, D], arrays or `Quantised`, the former in any dtype.
    MLP s of a layer is down[s].T @ (activation(gate[s].T @ x) * (up[s].T @ x)), gate and up being gate_up[s, :, 0] and
    gate_up[s, :, 1]. Slot -1 adds nothing.

    weigh_input: the weight is on the MLP's input instead: mlp(weights[n, k] * x[n]).
    layer: of stacked MLPs; indexed within, so that no layer is copied.
    implementation: see above; `implementation_for` names a platform's default.
    expected: how many of the N * K slots will be others than -1, if that is not most of them; tunes speed only.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation={implementation!r} is not one of {', '.join(get_args(Implementation))}")
    if implementation == "native":
        return native.grouped_mlp(x, slots, weights, gate_up, down, layer, activation, weigh_input)
    _, num_slots, width, _, inner = gate_up.shape
    static = _Static(activation, weigh_input, num_slots, _tile_rows(expected or slots.size, num_slots))
    offset = jnp.asarray(layer, jnp.int32) * num_slots
    if implementation == "tiles":
        stacks = (_flat(gate_up, 2 * inner), _flat(down, width))
        # Only arrays have gradients, and 8 bits need none.
        run = _tiles if isinstance(gate_up, Quantised) else _tiled
        out = run(x, slots, weights, *stacks, offset, static)
    else:
        matmul = _ragged_dot if implementation == "ragged_dot" else _megablox
        # On a TPU the two last axes do not merge without a copy: of this layer's weights rather than of all.
        of_layer = _flat(jax.tree.map(lambda array: array[layer][None], gate_up), 2 * inner)
        out = _sorted(x, slots, weights, of_layer, _flat(down, width), offset, static, matmul)
    return out.astype(x.dtype)


def gated_mlp(
    x: Float[Array, "N D"],
    gate_up: Float[Array, "L D two F"],
    down: Float[Array, "L F D"],
    layer: int | Int[Array, ""],
    activation: str,
    compute: Compute = Compute(),  # noqa: B008 - frozen
) -> Float[Array, "N D"]:
    """One MLP for all rows: the layer's of a stack. gate_up and down as in `grouped_mlp`."""
    if compute.kernels == "native":
        slots = jnp.zeros((x.shape[0], 1), jnp.int32)
        if compute.in_use is not None:
            slots = jnp.where(jnp.arange(x.shape[0])[:, None] < compute.in_use, slots, -1)
        ones = jnp.ones((x.shape[0], 1), jnp.float32)
        return native.grouped_mlp(x, slots, ones, gate_up, down, layer, activation, weigh_input=False)
    hidden = swiglu(jnp.tensordot(x, of_layer(gate_up, layer), 1), activation)
    return hidden @ of_layer(down, layer)


class _Static(NamedTuple):
    activation: str
    weigh_input: bool
    num_slots: int
    tile_rows: int


def _tile_rows(expected: int, num_slots: int) -> int:
    """As many as an MLP gets on average, up to a power of two."""
    mean = max(1, expected // num_slots)
    return min(MAX_TILE_ROWS, 1 << (mean - 1).bit_length())


def _by_slot(slots: Int[Array, "N K"], num_slots: int) -> tuple[Int[Array, "M"], Int[Array, "S"]]:
    """The (row, choice) pairs in order of their slots, those without one last; and how many each slot has."""
    keys = jnp.where(slots < 0, num_slots, slots).reshape(-1)
    sizes = jnp.sum(keys[:, None] == jnp.arange(num_slots), axis=0, dtype=jnp.int32)
    return jnp.argsort(keys, stable=True), sizes


class _Tiles:
    """Which sorted pairs each tile covers; all belong to one slot.

    sizes [5, 0, 3] in tiles of 4:
        tile 0: slot 0, pairs 0..3    tile 1: slot 0, pair 4    tile 2: slot 2, pairs 5..7
    A tile that its slot does not fill reads on into the next slot's pairs (here tile 1 reads pairs 4..7).
    """

    def __init__(self, slots: Array, static: _Static) -> None:
        self.size = static.tile_rows
        self.num_rows, self.choices = slots.shape
        order, sizes = _by_slot(slots, static.num_slots)
        self.order = jnp.pad(order, (0, self.size))  # room for the last tile to read on
        per_slot = -(-sizes // self.size)
        self.tile_ends = jnp.cumsum(per_slot)
        self.tile_starts = self.tile_ends - per_slot
        self.pair_ends = jnp.cumsum(sizes)
        self.pair_starts = self.pair_ends - sizes
        self.count = self.tile_ends[-1]

    def __call__(self, tile: Array) -> tuple[Array, Array, Array, Array]:
        """Slot, first pair, the pairs' numbers, and their rows: one past the last where a pair is another slot's."""
        slot = jnp.sum(tile >= self.tile_ends)
        start = self.pair_starts[slot] + (tile - self.tile_starts[slot]) * self.size
        pairs = jax.lax.dynamic_slice_in_dim(self.order, start, self.size)
        own = start + jnp.arange(self.size) < self.pair_ends[slot]
        return slot, start, pairs, jnp.where(own, pairs // self.choices, self.num_rows)


def _flat(stack: Stack, columns: int) -> Stack:
    """Matrices of all layers and slots one after the other: [L * S, K, columns]."""
    if isinstance(stack, Quantised):
        values = stack.values.reshape(-1, stack.shape[2], columns)
        return Quantised(values, stack.scale.reshape(-1, columns))
    return stack.reshape(-1, stack.shape[2], columns)


def _tiles(
    x: Array, slots: Array, weights: Array, gate_up: Stack, down: Stack, offset: Array, static: _Static
) -> Float[Array, "N D"]:
    # Two loops with one matmul each: with both in one XLA:CPU computes the activation on one thread.
    tiles = _Tiles(slots, static)
    of_pairs = weights.reshape(-1)

    def into(tile: Array, hidden: Array) -> Array:
        slot, start, pairs, rows = tiles(tile)
        own = x.at[rows].get(mode="clip")
        if static.weigh_input:
            own = own * of_pairs[pairs, None].astype(x.dtype)
        both = times(own, pick(gate_up, offset + slot))
        inner = swiglu(both.reshape(tiles.size, 2, -1), static.activation)
        # What lies past the slot's end is wrong here and written over by the tile that comes next.
        return jax.lax.dynamic_update_slice_in_dim(hidden, inner, start, 0)

    def out_of(tile: Array, out: Array) -> Array:
        slot, start, pairs, rows = tiles(tile)
        own = times(jax.lax.dynamic_slice_in_dim(hidden, start, tiles.size), pick(down, offset + slot))
        own = own.astype(jnp.float32)
        if not static.weigh_input:
            own = own * of_pairs[pairs, None]
        return out.at[rows].add(own, mode="drop", unique_indices=True)

    hidden = jnp.zeros((tiles.order.shape[0], down.shape[1]), x.dtype)
    hidden = jax.lax.fori_loop(0, tiles.count, into, hidden)
    return jax.lax.fori_loop(0, tiles.count, out_of, jnp.zeros(x.shape, jnp.float32))


_tiled = jax.custom_vjp(_tiles, nondiff_argnums=(6,))


def _forward(
    x: Array, slots: Array, weights: Array, gate_up: Array, down: Array, offset: Array, static: _Static
) -> tuple[Array, tuple[Array, ...]]:
    operands = (x, slots, weights, gate_up, down, offset)
    return _tiled(*operands, static), operands


def _backward(static: _Static, saved: tuple[Array, ...], grad: Array) -> tuple[Array | None, ...]:
    x, slots, weights, gate_up, down, offset = saved
    tiles = _Tiles(slots, static)
    of_pairs = weights.reshape(-1)

    def one_tile(own: Array, weight: Array, gate_up: Array, down: Array) -> Array:
        if static.weigh_input:
            own = own * weight[:, None].astype(own.dtype)
        inner = swiglu((own @ gate_up).reshape(tiles.size, 2, -1), static.activation)
        out = (inner @ down).astype(jnp.float32)
        return out if static.weigh_input else out * weight[:, None]

    def add(tile: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        slot, _, pairs, rows = tiles(tile)
        inputs = (x.at[rows].get(mode="clip"), of_pairs[pairs], gate_up[offset + slot], down[offset + slot])
        _, pull = jax.vjp(one_tile, *inputs)
        to_x, to_weight, to_gate_up, to_down = pull(grad.at[rows].get(mode="fill", fill_value=0))
        in_x, in_weights, in_gate_up, in_down = sums
        return (
            in_x.at[rows].add(to_x, mode="drop"),
            in_weights.at[jnp.where(rows < tiles.num_rows, pairs, of_pairs.size)].add(to_weight, mode="drop"),
            in_gate_up.at[offset + slot].add(to_gate_up),
            in_down.at[offset + slot].add(to_down),
        )

    zeros = tuple(map(jnp.zeros_like, (x, of_pairs, gate_up, down)))
    to_x, to_weights, to_gate_up, to_down = jax.lax.fori_loop(0, tiles.count, add, zeros)
    return to_x, None, to_weights.reshape(weights.shape), to_gate_up, to_down, None


_tiled.defvjp(_forward, _backward)


def _sorted(
    x: Array,
    slots: Array,
    weights: Array,
    gate_up: Stack,
    down: Stack,
    offset: Array,
    static: _Static,
    matmul: Callable[..., Array],
) -> Float[Array, "N D"]:
    order, sizes = _by_slot(slots, static.num_slots)
    slot_of = jnp.minimum(jnp.sum(jnp.arange(order.shape[0])[:, None] >= jnp.cumsum(sizes), axis=1), len(sizes) - 1)

    def meet(rows: Array, stack: Stack, offset: Array) -> Array:
        if not isinstance(stack, Quantised):
            return matmul(rows, stack.astype(rows.dtype), sizes, offset)
        values = jax.lax.dynamic_slice_in_dim(stack.values, offset, len(sizes)).astype(rows.dtype)
        return (matmul(rows, values, sizes, jnp.int32(0)) * stack.scale[offset + slot_of]).astype(rows.dtype)

    rows, of_pairs = order // slots.shape[1], weights.reshape(-1)[order, None]
    own = x[rows]
    if static.weigh_input:
        own = own * of_pairs.astype(x.dtype)
    hidden = swiglu(meet(own, gate_up, jnp.int32(0)).reshape(order.shape[0], 2, -1), static.activation)
    out = meet(hidden, down, offset).astype(jnp.float32)
    if not static.weigh_input:
        out = out * of_pairs
    # Kernels leave what they please in rows that belong to no slot.
    out = jnp.where(jnp.arange(order.shape[0])[:, None] < jnp.sum(sizes), out, 0)
    return jnp.zeros(x.shape, jnp.float32).at[rows].add(out)


def _ragged_dot(rows: Array, stack: Array, sizes: Array, offset: Array) -> Array:
    chosen = jax.lax.dynamic_slice_in_dim(stack, offset, sizes.shape[0])
    return jax.lax.ragged_dot(rows, chosen, sizes)


def _megablox(rows: Array, stack: Array, sizes: Array, offset: Array) -> Array:
    from jax.experimental.pallas.ops.tpu import megablox  # takes a quarter of a second to import

    # Groups of the other layers are empty and cost nothing; a slice of this layer's would be a copy of all its weights.
    everywhere = jax.lax.dynamic_update_slice_in_dim(jnp.zeros(stack.shape[0], jnp.int32), sizes, offset, 0)
    padded = jnp.pad(rows, ((0, -rows.shape[0] % KERNEL_ROWS), (0, 0)))
    kernel: Any = functools.partial(
        megablox.gmm,
        preferred_element_type=rows.dtype,
        tiling=(KERNEL_ROWS, min(512, rows.shape[1]), min(1024, stack.shape[2])),
    )
    # By what the program is compiled for, which need not be what this process runs on.
    out = jax.lax.platform_dependent(
        padded, stack, everywhere, tpu=kernel, default=functools.partial(kernel, interpret=True)
    )
    return out[: rows.shape[0]]
