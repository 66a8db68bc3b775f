"""One parameter onto the devices that hold its shards: each shard is read once, copied, dropped."""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.checkpoints.reading import ParameterReader, Window, dequantise

# Shards of at most so many bytes come with all their layers at once, which compiles nothing.
SMALL = 1 << 20
# Larger ones come a layer at a time, and experts in portions of about this size: memory of this size is used again and
# again, where the kernel clears pages anew for larger pieces.
PORTION = 16 << 20
AHEAD = 2  # pieces under way: one is read while another is copied

Item = TypeVar("Item")
Result = TypeVar("Result")


def place(
    read: ParameterReader,
    shape: tuple[int, ...],
    sharding: NamedSharding,
    pool: Executor,
    advance: Callable[[int], None] = lambda size: None,
) -> jax.Array:
    """The whole parameter, its shards where `sharding` says; an axis over layers is never split.

    A shard is read once for all devices that hold it. Large shards of stacked parameters are filled piece by piece, so
    that the host holds little of them, and a device a piece or two beside the shard.
    advance: called with the bytes that were placed since the last call, of the whole parameter.
    """
    holders: dict[Window, list[jax.Device]] = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders[tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))].append(device)
    if read.key.per_layer and math.prod(sharding.shard_shape(shape)) * read.dtype.itemsize > SMALL:
        return _fill(read, shape, sharding, holders, pool, advance)

    def copy(shard: tuple[Window, list[jax.Device]]) -> list[jax.Array]:
        window, devices = shard
        return _on_each(read(window), devices)

    shards = [array for copies in _ahead(pool, copy, holders.items()) for array in copies]
    advance(math.prod(shape) * read.dtype.itemsize)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _fill(
    read: ParameterReader,
    shape: tuple[int, ...],
    sharding: NamedSharding,
    holders: dict[Window, list[jax.Device]],
    pool: Executor,
    advance: Callable[[int], None],
) -> jax.Array:
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    # What devices get may differ in form from what they keep: a row of its own for each, whatever the mesh.
    rows = NamedSharding(mesh, P(mesh.axis_names))

    def copy(part: tuple[Window, list[jax.Device]]) -> list[list[jax.Array]]:
        window, devices = part
        return jax.block_until_ready([_on_each(array[None], devices) for array in read.read(window).arrays])

    # All shards of a layer, then the next: what they share on disk is read once.
    steps = list(_steps(sharding.shard_shape(shape), read))
    parts = [(_within(window, start, stop), devices) for start, stop in steps for window, devices in holders.items()]
    filled = jax.jit(functools.partial(jnp.zeros, shape, read.dtype), out_shardings=sharding)()
    update = _update(mesh, sharding.spec, read.order)
    copied = _ahead(pool, copy, parts)
    for start, _ in steps:
        inputs = []
        for copies in zip(*(next(copied) for _ in holders), strict=True):
            shards = [array for of_part in copies for array in of_part]
            whole = (mesh.size, *shards[0].shape[1:])
            inputs.append(jax.make_array_from_single_device_arrays(whole, rows, shards))
        filled = update(filled, np.array(start, np.int32), *inputs)
        # A piece lies twice on its device until it is in its place; this keeps others from coming meanwhile.
        filled.block_until_ready()
        advance(filled.nbytes // len(steps))
    return filled


def _on_each(array: np.ndarray, devices: list[jax.Device]) -> list[jax.Array]:
    """Copied from the host once, and between devices from there."""
    first = jax.device_put(array, devices[0])
    return [first, *(jax.device_put(first, device) for device in devices[1:])]


def _steps(shard: tuple[int, ...], read: ParameterReader) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Where the pieces of a shard start and stop along its leading axes: layers, and slots if it has any."""
    stacked = shard[: read.key.stacked]
    slots = stacked[1] if read.key.per_expert else 1
    each = math.prod(shard[1:]) * read.dtype.itemsize // slots
    portion = max(size for size in range(1, slots + 1) if slots % size == 0 and (size == 1 or size * each <= PORTION))
    sizes = (1, portion)[: len(stacked)]
    for start in itertools.product(*(range(0, length, size) for length, size in zip(stacked, sizes, strict=True))):
        yield start, tuple(at + size for at, size in zip(start, sizes, strict=True))


def _within(window: Window, start: tuple[int, ...], stop: tuple[int, ...]) -> Window:
    """The part of a shard's window between these places of the shard's own leading axes."""
    leading = zip(window, start, stop)  # noqa: B905 - the shorter ends it
    return (*((first + begin, first + end) for (first, _), begin, end in leading), *window[len(start) :])


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
