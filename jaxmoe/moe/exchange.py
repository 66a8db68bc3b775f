"""Tokens to the devices that hold their experts, and back: exact at any skew, with shapes that never depend on it.

A token waits once for every device that holds any of its experts, in that device's queue; its row carries its slots
and weights, so that the device can sum over all of its own experts before it answers. A *round* fills a buffer of
`capacity` rows a destination, reshards it from the token layout to the expert layout, which XLA compiles to one
all-to-all, runs the experts, and reshards back by another. Rounds go on until the longest queue anywhere is empty.
A queue is never longer than the rank's batch, so that a capacity of the batch needs one round and no loop; capacity
tunes speed, never a result.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxmoe.axes import Hidden
from jaxmoe.moe.experts import Experts
from jaxmoe.moe.strategy import Mixture
from jaxmoe.ops.quantised import Stack
from jaxmoe.sharding.mesh import RANKS
from jaxmoe.sharding.words import from_words, to_words

LocalExperts: TypeAlias = Callable[..., Array]
TOKENS, QUEUE = P(RANKS, None, None), P(RANKS, None)


def exchange(
    x: Hidden,
    slots: Int[Array, "R N K"],
    weights: Float[Array, "R N K"],
    experts: Experts,
    layer: Int[Array, ""],
    shape: Mixture,
    run: LocalExperts,
    ragged: bool,
) -> Hidden:
    """What `dispatch.mixture` gives, before its sum over `tp`.

    run: `grouped_mlp` up to its layer. ragged: rows travel that are there, and no others.
    """
    rules, dtype = experts.rules, x.dtype
    axes, devices, capacity, lanes = rules.spec.expert_axes, shape.devices, shape.capacity, shape.lanes
    slots_per_device = experts.num_slots // devices
    layout = _Layout(axes, devices, capacity)
    fields = [(shape.width, dtype), (shape.choices, jnp.int32), (shape.choices, jnp.float32)]
    on_devices = functools.partial(jax.shard_map, check_vma=False)

    def queue(slots: Array) -> tuple[Array, Array, Array, Array]:
        """Where each lane of a token waits: destination and place in its queue; and how long the queues are."""
        destination = _destinations(slots[0], devices, slots_per_device).reshape(-1)
        waiting = jnp.cumsum(destination[:, None] == jnp.arange(devices), axis=0, dtype=jnp.int32)
        place = jnp.take_along_axis(waiting, jnp.minimum(destination, devices - 1)[:, None], axis=1)[:, 0] - 1
        rounds = jnp.int32(1)
        if shape.most_rounds > 1:
            rounds = jax.lax.pmax(-(-jnp.max(waiting[-1]) // capacity), RANKS)
        return destination[None], place[None], waiting[-1][None], rounds

    def in_buffer(destination: Array, place: Array, turn: Array) -> Array:
        """Buffer row of each lane in round `turn`; one past the end if it waits, went before or goes nowhere."""
        goes = (destination < devices) & (place // capacity == turn)
        return jnp.where(goes, destination * capacity + place % capacity, devices * capacity)

    def pack(x: Array, slots: Array, weights: Array, destination: Array, place: Array, turn: Array) -> Array:
        index = in_buffer(destination[0], place[0], turn)
        nowhere = jnp.full(devices * capacity, shape.tokens, jnp.int32)
        tokens = nowhere.at[index].set(jnp.arange(index.size, dtype=jnp.int32) // lanes, mode="drop")
        rows, of_rows = (array[0].at[tokens].get(mode="fill", fill_value=0) for array in (x, weights))
        chosen = slots[0].at[tokens].get(mode="fill", fill_value=-1)
        there = chosen // slots_per_device == jnp.arange(devices * capacity)[:, None] // capacity
        # Counted from 1: what was never written, as in a ragged exchange, reads as 0, no slot.
        local = jnp.where((chosen >= 0) & there, chosen % slots_per_device + 1, 0)
        words = jnp.concatenate([to_words(array, dtype) for array in (rows, local, of_rows)], axis=1)
        return words.reshape(1, 1, devices * capacity, -1)

    def compute(words: Array, gate_up: Stack, down: Stack, layer: Array) -> Array:
        rows, local, of_rows = from_words(words.reshape(devices * capacity, -1), fields)
        out = run(rows, local - 1, of_rows, gate_up, down, layer)
        return to_words(out, dtype).reshape(*words.shape[:-1], -1)

    def unpack(out: Array, words: Array, destination: Array, place: Array, turn: Array) -> Array:
        index = in_buffer(destination[0], place[0], turn)
        (rows,) = from_words(words.reshape(devices * capacity, -1), fields[:1])
        return out + rows.at[index].get(mode="fill", fill_value=0)[None]

    def combine(out: Array) -> Array:
        of_lanes = out.reshape(shape.tokens, lanes, shape.width).astype(jnp.float32)
        return jnp.sum(of_lanes, axis=1).astype(dtype)[None]

    where = (QUEUE, QUEUE, P())
    destination, place, waiting, rounds = on_devices(queue, in_specs=TOKENS, out_specs=(QUEUE, QUEUE, QUEUE, P()))(
        slots
    )
    pack_all = on_devices(pack, in_specs=(TOKENS, TOKENS, TOKENS, *where), out_specs=layout.at_source)
    compute_all = on_devices(
        compute, in_specs=(layout.at_experts, *experts.partitions, P()), out_specs=layout.at_experts
    )
    unpack_all = on_devices(unpack, in_specs=(TOKENS, layout.at_source, *where), out_specs=TOKENS)
    travel = _Ragged(layout, waiting) if ragged else _Resharded(layout)

    def one_round(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        turn, out = carry
        packed = pack_all(x, slots, weights, destination, place, turn)
        arrived = travel.to_experts(packed, turn)
        computed = compute_all(arrived, *experts.stacks, layer)
        return turn + 1, unpack_all(out, travel.to_source(computed, turn), destination, place, turn)

    start = (jnp.int32(0), jnp.zeros((x.shape[0], shape.tokens * lanes, shape.width), dtype, out_sharding=TOKENS))
    if shape.most_rounds == 1:
        _, out = one_round(start)
    else:
        _, out = jax.lax.while_loop(lambda carry: carry[0] < rounds, one_round, start)
    return on_devices(combine, in_specs=TOKENS, out_specs=TOKENS)(out)


def _destinations(slots: Int[Array, "N K"], devices: int, slots_per_device: int) -> Int[Array, "N lanes"]:
    """The device that each lane of a token goes to, each at most once; `devices` for none.

    Where there are no more devices than choices a lane is a device, else a choice. Slots [[0, 1, 5]], two a device:
        of 3 devices:  [[0, 3, 2]]   nothing goes to device 1
        of 4 devices:  [[0, 4, 2]]   the second choice goes where the first went
    """
    device = jnp.where(slots < 0, devices, slots // slots_per_device)
    choices = slots.shape[1]
    if devices <= choices:
        every = jnp.arange(devices)
        return jnp.where(jnp.any(device[:, :, None] == every, axis=1), every, devices)
    before = jnp.tril(jnp.ones((choices, choices), bool), -1)
    again = jnp.any((device[:, :, None] == device[:, None, :]) & before, axis=2)
    return jnp.where(again, devices, device)


class _Layout(NamedTuple):
    """Where buffers [groups, ranks of a group, devices * capacity, words] lie.

    A group is the devices that share one copy of the experts; nothing crosses it. A group's ranks are its devices too.
    """

    axes: tuple[str, ...]
    devices: int
    capacity: int

    @property
    def group(self) -> str | None:
        return next((axis for axis in RANKS if axis not in self.axes), None)

    @property
    def at_source(self) -> P:
        """Every rank has what it sends or sent, by destination."""
        return P(self.group, self.axes, None, None)

    @property
    def at_experts(self) -> P:
        """Every device has what it was sent, by sender."""
        return P(self.group, None, self.axes, None)


class _Resharded(NamedTuple):
    """Whole buffers: XLA makes an all-to-all of each reshard."""

    layout: _Layout

    def to_experts(self, buffer: Array, turn: Array) -> Array:
        return jax.sharding.reshard(buffer, self.layout.at_experts)

    def to_source(self, buffer: Array, turn: Array) -> Array:
        return jax.sharding.reshard(buffer, self.layout.at_source)


class _Ragged:
    """As much of each destination's rows as there are; the rest stays 0."""

    def __init__(self, layout: _Layout, waiting: Int[Array, "R devices"]) -> None:
        """waiting: the length of every queue of every rank."""
        self.layout = layout
        ranks = (waiting.shape[0] // layout.devices, layout.devices)
        self.sent = waiting.reshape(*ranks, layout.devices, 1, out_sharding=layout.at_source)
        self.received = jax.sharding.reshard(self.sent, layout.at_experts)

    def to_experts(self, buffer: Array, turn: Array) -> Array:
        return self._travel(buffer, turn, self.sent, self.received, self.layout.at_source, self.layout.at_experts)

    def to_source(self, buffer: Array, turn: Array) -> Array:
        return self._travel(buffer, turn, self.received, self.sent, self.layout.at_experts, self.layout.at_source)

    def _travel(self, buffer: Array, turn: Array, sent: Array, received: Array, source: P, target: P) -> Array:
        devices, capacity, axes = self.layout.devices, self.layout.capacity, self.layout.axes

        def local(buffer: Array, turn: Array, sent: Array, received: Array) -> Array:
            rows = buffer.reshape(devices * capacity, -1)
            send, receive = (jnp.clip(sizes.reshape(-1) - turn * capacity, 0, capacity) for sizes in (sent, received))
            mine = jnp.full(devices, jax.lax.axis_index(axes) * capacity, jnp.int32)
            starts = jnp.arange(devices, dtype=jnp.int32) * capacity
            arrived = jax.lax.ragged_all_to_all(rows, jnp.zeros_like(rows), starts, send, mine, receive, axis_name=axes)
            shape = (1, 1, devices * capacity) if target == self.layout.at_source else (1, devices, capacity)
            return arrived.reshape(*shape, -1)

        run = jax.shard_map(local, in_specs=(source, P(), source, target), out_specs=target, check_vma=False)
        return run(buffer, turn, sent, received)
