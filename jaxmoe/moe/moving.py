"""Experts from slot to slot of a layer, between devices: beside the layer first, checked there, then into their places.

Nothing of a layer changes before `Mover.commit`, so that steps may run between any two calls, and what was begun may
be dropped at any time.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, UInt32

from jaxmoe.sharding.rules import Rules

DEVICES = P(("dp", "ep", "tp"), None)
Stacks: TypeAlias = Mapping[str, Any]  # arrays [L, S, ...] on their devices


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


class Mover:
    """The compiled programs that move experts of stacks of these shapes and shardings, and the room they need.

    A stack [L, S, ...] holds an expert's weights or what belongs to them, such as scales. The room is as much again as
    one layer of all stacks; beside it a device holds one slot while that travels.

    slot_bytes: of all that belongs to one slot, over its `tp` devices.
    """

    def __init__(self, mesh: jax.sharding.Mesh, rules: Rules, stacks: Stacks) -> None:
        self._names = tuple(stacks)
        self._rules, self._own = rules, next(iter(stacks.values())).shape[1] // rules.spec.expert_devices
        self.slot_bytes = sum(stack.nbytes // stack.shape[0] // stack.shape[1] for stack in stacks.values())
        self._wait = mesh.devices.flat[0].platform == "cpu"
        leaves = tuple(jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=each.sharding) for each in stacks.values())
        specs = tuple(each.sharding.spec for each in stacks.values())
        beside = tuple(P(*spec[1:]) for spec in specs)
        devices = rules.spec.expert_devices
        number, numbers = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((), (devices,)))

        def compiled(fn: Callable[..., Any], ins: Any, outs: Any, donated: int | tuple[()], *arguments: Any) -> Any:
            run = jax.shard_map(fn, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
            return jax.jit(run, donate_argnums=donated).lower(*arguments).compile()

        def empty(leaf: jax.ShapeDtypeStruct, spec: P) -> Array:
            shape, dtype = leaf.shape[1:], _words(leaf.dtype)
            return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=NamedSharding(mesh, spec))()

        with jax.set_mesh(mesh):
            self._room = tuple(map(empty, leaves, beside))
            room = tuple(jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=each.sharding) for each in self._room)
            self._near, self._far = (
                compiled(
                    functools.partial(self._fetch_local, far=far),
                    (beside, specs, P(), P(), P()),
                    (beside, DEVICES),
                    0,
                    room,
                    leaves,
                    *[number] * 3,
                )
                for far in (False, True)
            )
            self._digest = compiled(self._digest_local, (beside, P()), DEVICES, (), room, number)
            self._pick = compiled(
                self._pick_local, (specs, beside, P(), P()), beside, (), leaves, room, number, numbers
            )
            picked = jax.tree.map(
                lambda each: jax.ShapeDtypeStruct((devices, *each.shape[1:]), each.dtype, sharding=each.sharding), room
            )
            self._write = compiled(
                self._write_local, (specs, beside, P(), P()), specs, 0, leaves, picked, number, numbers
            )

    def fetch(self, stacks: Stacks, layer: int, source: int, slot: int) -> tuple[Array, Array]:
        """Copies what slot `source` of the layer holds beside its slot `slot`: what was sent and what lies there now.

        Both as digests [devices, stacks]; equal, apart from the order of devices, if nothing happened on the way.
        """
        # Chosen here: collectives in a branch of a program make XLA:CPU abort.
        run = self._near if source // self._own == slot // self._own else self._far
        where = (np.int32(layer), np.int32(source), np.int32(slot))
        self._room, sent = run(self._room, tuple(stacks.values()), *where)
        there = self._digest(self._room, np.int32(slot))
        if self._wait:
            # Collectives of two programs at once, on more devices than threads, may wait for each other for ever.
            jax.block_until_ready(there)
        return sent, there

    def commit(self, stacks: Stacks, layer: int, slots: Int[np.ndarray, "moved"]) -> dict[str, Array]:
        """The stacks, updated in place, with these slots of the layer as they were fetched."""
        by_device: list[list[int]] = [[] for _ in range(self._rules.spec.expert_devices)]
        for slot in slots.tolist():
            by_device[slot // self._own].append(slot % self._own)
        leaves = tuple(stacks.values())
        # One slot of every device at a time, by a program that writes stacks and one that reads them: in a loop, or
        # where a program does both, XLA:CPU copies them whole.
        for turn in itertools.zip_longest(*by_device, fillvalue=-1):
            owns = np.array(turn, np.int32)
            picked = self._pick(leaves, self._room, np.int32(layer), owns)
            leaves = self._write(leaves, picked, np.int32(layer), owns)
        return dict(zip(self._names, leaves, strict=True))

    @property
    def _me(self) -> Array:
        return jax.lax.axis_index(self._rules.spec.expert_axes)

    def _fetch_local(
        self, room: tuple[Array, ...], stacks: tuple[Array, ...], layer: Array, source: Array, slot: Array, far: bool
    ) -> tuple[tuple[Array, ...], Array]:
        """far: whether it comes from another device."""
        sends, receives = source // self._own == self._me, slot // self._own == self._me
        filled, digests = [], []
        for held, stack in zip(room, stacks, strict=True):
            sent = jnp.where(sends, _bits(stack)[layer, source % self._own], 0)
            digests.append(_digest_of(sent))
            # Only one device sends, so that the sum is what it sent.
            arrived = jax.lax.psum(sent, self._rules.spec.expert_axes) if far else sent
            own = slot % self._own
            filled.append(held.at[own].set(jnp.where(receives, arrived, held[own])))
        return tuple(filled), jnp.stack(digests)[None]

    def _digest_local(self, room: tuple[Array, ...], slot: Array) -> Array:
        mine = slot // self._own == self._me
        return jnp.stack([jnp.where(mine, _digest_of(held[slot % self._own]), 0) for held in room])[None]

    def _pick_local(
        self, stacks: tuple[Array, ...], room: tuple[Array, ...], layer: Array, owns: Array
    ) -> tuple[Array, ...]:
        """What `_write_local` is to write. owns: which of its own slots each device writes; -1: one as it is."""
        own = owns[self._me]
        return tuple(
            jnp.where(own >= 0, held[own], _bits(stack)[layer, jnp.maximum(own, 0)])[None]
            for stack, held in zip(stacks, room, strict=True)
        )

    def _write_local(
        self, stacks: tuple[Array, ...], picked: tuple[Array, ...], layer: Array, owns: Array
    ) -> tuple[Array, ...]:
        own = jnp.maximum(owns[self._me], 0)
        written = []
        for stack, of_slot in zip(stacks, picked, strict=True):
            start = [layer, own, *[jnp.int32(0)] * (stack.ndim - 2)]
            bits = jax.lax.dynamic_update_slice(_bits(stack), of_slot[None], start)
            written.append(jax.lax.bitcast_convert_type(bits, stack.dtype))
        return tuple(written)


def same(
    sent: Int[np.ndarray, "devices stacks"] | UInt32[np.ndarray, "devices stacks"],
    there: Int[np.ndarray, "devices stacks"] | UInt32[np.ndarray, "devices stacks"],
    rules: Rules,
) -> bool:
    """Whether digests of `Mover.fetch` say that in every copy of the experts what lies there is what was sent."""
    spec = rules.spec

    def of_copies(digests: np.ndarray) -> np.ndarray:
        # Only one device along the expert axes has a digest that is not 0.
        axes = {"dp": 0, "ep": 1}
        return digests.reshape(spec.dp, spec.ep, spec.tp, -1).sum(axis=tuple(axes[axis] for axis in spec.expert_axes))

    return bool((of_copies(sent) == of_copies(there)).all())


def _words(dtype: Any) -> Any:
    # As bits: XLA:CPU converts a whole array of bfloat16 to update a part of it.
    return {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[jnp.dtype(dtype).itemsize]


def _bits(array: Array) -> Array:
    return jax.lax.bitcast_convert_type(array, _words(array.dtype))


def _digest_of(words: Array) -> Array:
    """A sum modulo 2^32 in which every word has an odd weight of its own, so that an exchange of two tells as well."""
    flat = words.reshape(-1).astype(jnp.uint32)
    return jnp.sum(flat * (2 * jnp.arange(flat.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)
