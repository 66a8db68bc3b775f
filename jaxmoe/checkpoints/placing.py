"""One parameter onto the devices that hold its shards: each shard is read once, copied, dropped."""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.checkpoints.reading import Piece, Window, dequantise

# Shards of at most so many bytes come at once, which compiles nothing.
SMALL = 1 << 20
# Larger ones come by layers, and experts or rows of a table in portions of about this size: memory of this size is used
# again and again, where the kernel clears pages anew for larger pieces.
PORTION = 16 << 20
AHEAD = 2  # pieces under way: one is read while another is copied

Item = TypeVar("Item")
Result = TypeVar("Result")


def place(
    read: Callable[[Window], Piece],
    shape: tuple[int, ...],
    dtype: Any,
    sharding: NamedSharding,
    stacked: int,
    pool: Executor,
    report: Callable[[int], None] = lambda placed: None,
) -> jax.Array:
    """An array of which every device's shard comes from `read`, once for all devices that hold the same.

    stacked: how many leading axes are layers and slots. Large shards are filled piece by piece, so that the host holds
    a few pieces, and a device as many beside its shard.
    pool: of AHEAD threads, the same for all parameters, since each has memory that it keeps.
    report: called with the bytes that were placed.
    """
    dtype = np.dtype(dtype)
    held = holders(shape, sharding)
    if math.prod(sharding.shard_shape(shape)) * dtype.itemsize > SMALL:
        return _fill(read, shape, dtype, sharding, stacked, held, pool, report)

    def copy(shard: tuple[Window, list[jax.Device]]) -> list[jax.Array]:
        window, devices = shard
        return _on_each(read(window).converted(dtype), devices)

    shards = []
    for copies in _ahead(pool, copy, held.items()):
        shards += copies
        report(sum(array.nbytes for array in copies))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def holders(shape: tuple[int, ...], sharding: NamedSharding) -> dict[Window, list[jax.Device]]:
    """The devices of this host by the shard that they hold, in the order of the sharding."""
    found: dict[Window, list[jax.Device]] = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        found[tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))].append(device)
    return found


def local_bytes(leaf: Any, sharding: NamedSharding) -> int:
    """Of all shards on this host's devices."""
    shard = math.prod(sharding.shard_shape(leaf.shape))
    return shard * np.dtype(leaf.dtype).itemsize * len(sharding.addressable_devices)


def _fill(
    read: Callable[[Window], Piece],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    sharding: NamedSharding,
    stacked: int,
    held: Mapping[Window, list[jax.Device]],
    pool: Executor,
    report: Callable[[int], None],
) -> jax.Array:
    mesh, shard = sharding.mesh, sharding.shard_shape(shape)
    assert isinstance(mesh, Mesh)
    # What devices get may differ in form from what they keep: a row of its own for each, whatever the mesh.
    rows = NamedSharding(mesh, P(mesh.axis_names))

    def copy(part: tuple[Window, list[jax.Device]]) -> tuple[tuple[int, ...], list[list[jax.Array]]]:
        window, devices = part
        piece = read(window)
        return piece.order, jax.block_until_ready([_on_each(array[None], devices) for array in piece.arrays])

    # All shards of a layer, then the next: bytes that shards share on disk are still in memory.
    sizes = _piece_sizes(shard, stacked, dtype.itemsize)
    # The last piece along an axis may overlap the one before, so that all are of one shape.
    along = [
        [min(at, length - size) for at in range(0, length, size)] for length, size in zip(shard, sizes, strict=False)
    ]
    starts = list(itertools.product(*along))
    parts = [(_within(window, start, sizes), devices) for start in starts for window, devices in held.items()]
    filled = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)()
    copied = _ahead(pool, copy, parts)
    total = local_bytes(filled, sharding)
    for number, start in enumerate(starts):
        orders, arrived = zip(*(next(copied) for _ in held), strict=True)
        inputs = []
        for copies in zip(*arrived, strict=True):
            shards = list(itertools.chain(*copies))
            whole = (mesh.size, *shards[0].shape[1:])
            inputs.append(jax.make_array_from_single_device_arrays(whole, rows, shards))
        filled = _update(mesh, sharding.spec, orders[0])(filled, np.array(start, np.int32), *inputs)
        # Pieces lie on their device beside their place; no more of them than are under way.
        filled.block_until_ready()
        report(total * (number + 1) // len(starts) - total * number // len(starts))
    return filled


def _on_each(array: np.ndarray, devices: list[jax.Device]) -> list[jax.Array]:
    """Copied from the host once, and between devices from there."""
    first = jax.device_put(array, devices[0])
    return [first, *(jax.device_put(first, device) for device in devices[1:])]


def _piece_sizes(shard: tuple[int, ...], stacked: int, itemsize: int) -> tuple[int, ...]:
    """Of a piece, along the leading axes: one layer, of all slots or some; without layers some rows."""
    if stacked == 1:
        return (1,)
    axis = max(stacked - 1, 0)
    each = math.prod(shard[axis + 1 :]) * itemsize
    return (*(1,) * axis, max(1, min(shard[axis], PORTION // each)))


def _within(window: Window, start: tuple[int, ...], sizes: tuple[int, ...]) -> Window:
    """The piece of a shard that starts so far into its leading axes."""
    pieces = [(first + at, first + at + size) for (first, _), at, size in zip(window, start, sizes, strict=False)]
    return (*pieces, *window[len(start) :])


@functools.cache
def _update(mesh: Mesh, spec: P, order: tuple[int, ...]) -> Callable[..., jax.Array]:
    """Compiled once for each shape: puts every device's piece, dequantised, into its shard in place."""

    def local(filled: jax.Array, start: jax.Array, *arrays: jax.Array) -> jax.Array:
        bits = {2: jnp.uint16, 4: jnp.uint32}[filled.dtype.itemsize]
        own = [array[0] for array in arrays]
        values = own[0] if len(own) == 1 else dequantise(*own, order=order, np=jnp)
        at = [*start, *(0,) * (filled.ndim - start.size)]
        # As bits: an update in bfloat16 makes XLA:CPU convert the whole array to float32 and back.
        into, piece = (jax.lax.bitcast_convert_type(array, bits) for array in (filled, values.astype(filled.dtype)))
        return jax.lax.bitcast_convert_type(jax.lax.dynamic_update_slice(into, piece, at), filled.dtype)

    def update(filled: jax.Array, start: jax.Array, *arrays: jax.Array) -> jax.Array:
        in_specs = (spec, P(), *(P(mesh.axis_names),) * len(arrays))
        run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=spec, check_vma=False)
        return run(filled, start, *arrays)

    return jax.jit(update, donate_argnums=0)


def _ahead(pool: Executor, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Like map, with AHEAD calls under way or done and not yet taken."""
    pending: collections.deque[Future[Result]] = collections.deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) == AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
