"""Experts from the slots of one placement to those of another, between devices, one layer at a time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Shaped

from jaxmoe.sharding.rules import Rules


def slot_sources(old: Int[np.ndarray, "S"], new: Int[np.ndarray, "S"], devices: int) -> Int[np.ndarray, "S"]:
    """For each slot of a layer, a slot that holds its next expert now: itself, else one on its own device, else any.

    old, new: the expert of every slot before and after.

    >>> slot_sources(np.array([0, 1, 2, 0]), np.array([1, 0, 2, 1]), 2)
    [1, 0, 2, 1]
    """
    own = len(old) // devices
    sources = np.empty(len(new), np.int32)
    for slot, expert in enumerate(new):
        holding = np.flatnonzero(old == expert)
        device = slot // own
        sources[slot] = min(holding, key=lambda held: (held != slot, held // own != device, held))
    return sources


@functools.lru_cache(maxsize=8)
def mover(mesh: jax.sharding.Mesh, rules: Rules, specs: tuple[P, ...]) -> Any:
    """A compiled `(stacks, layer, sources) -> stacks` that fills a layer's slots from `sources` and moves nothing else.

    stacks: arrays [L, S, ...] of those partitions: an expert's weights and whatever belongs to them, such as scales.
    They are updated in place. Beside them a device holds its slots of the layer, and one slot of each other device.
    """
    axes, devices = rules.spec.expert_axes, rules.spec.expert_devices

    def local(stacks: tuple[Array, ...], layer: Array, sources: Array) -> tuple[Array, ...]:
        return tuple(_moved(stack, layer, sources, axes, devices) for stack in stacks)

    run = jax.shard_map(local, mesh=mesh, in_specs=(specs, P(), P()), out_specs=specs, check_vma=False)
    return jax.jit(run, donate_argnums=0)


def _moved(
    stack: Shaped[Array, "L S *rest"], layer: Array, sources: Array, axes: tuple[str, ...], devices: int
) -> Shaped[Array, "L S *rest"]:
    # As bits: XLA:CPU converts a whole array of bfloat16 to update a part of it.
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[stack.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(stack, words)
    held = bits[layer]
    own, me = held.shape[0], jax.lax.axis_index(axes)
    # Row j: which slot each device wants in its own slot j. One slot a device travels at a time.
    wanted = sources.reshape(devices, own).T

    def fill(index: Array, filled: Array) -> Array:
        wants = wanted[index]
        mine = (wants // own == me).reshape(-1, *(1,) * (held.ndim - 1))
        sent = jnp.where(mine, held[wants % own], 0)
        arrived = jax.lax.all_to_all(sent, axes, 0, 0, tiled=True) if devices > 1 else sent
        return filled.at[index].set(arrived[wants[me] // own])

    moved = jax.lax.fori_loop(0, own, fill, held)
    return jax.lax.bitcast_convert_type(bits.at[layer].set(moved), stack.dtype)
