"""Which physical slot holds which logical expert.

Placement is data: an argument of the compiled step, never a constant. All placements of one model on one mesh have the
same shapes, so that changing one for another compiles nothing.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxmoe.errors import ConfigError


class Placement(NamedTuple):
    """Slots and replicas of every layer. Replica lists are padded with slot 0 beyond `replica_count`.

    An expert may have as many replicas as there are slots that no other expert needs: the axis has S - E + 1 places.
    """

    slot_expert: Int[Array | np.ndarray, "L S"]
    replica_slots: Int[Array | np.ndarray, "L E replicas"]
    replica_count: Int[Array | np.ndarray, "L E"]


def initial_placement(num_layers: int, num_experts: int, num_slots: int) -> Placement:
    """Expert s % E in slot s, in every layer; experts whose turn comes again get a further replica. Host arrays.

    >>> initial_placement(1, 3, 4).slot_expert
    [[0, 1, 2, 0]]
    """
    of_layer = np.arange(num_slots, dtype=np.int32) % num_experts
    return placement_of(np.tile(of_layer, (num_layers, 1)), num_experts)


def placement_of(slot_expert: Int[np.ndarray, "L S"], num_experts: int) -> Placement:
    """The placement in which slot s of layer l holds expert slot_expert[l, s]; replicas in order of slots. Host arrays.

    Raises ConfigError unless every layer holds every expert and none other.

    >>> placement_of(np.array([[2, 0, 1, 0]]), 3).replica_slots
    [[[1, 3], [2, 0], [0, 0]]]
    """
    layers, slots = slot_expert.shape
    slot_expert = slot_expert.astype(np.int32)
    every = np.arange(num_experts)
    for layer, row in enumerate(slot_expert):
        if missing := np.setdiff1d(every, row).tolist():
            raise ConfigError(f"layer {layer} of the placement has no slot for experts {missing[:20]}")
        if unknown := np.setdiff1d(row, every).tolist():
            raise ConfigError(f"layer {layer} of the placement names experts {unknown[:20]}; there are {num_experts}")
    count = (slot_expert[:, :, None] == every).sum(axis=1, dtype=np.int32)
    replica_slots = np.zeros((layers, num_experts, max(1, slots - num_experts + 1)), np.int32)
    by_expert = np.argsort(slot_expert, axis=1, kind="stable").astype(np.int32)
    expert = np.take_along_axis(slot_expert, by_expert, axis=1)
    first = np.cumsum(count, axis=1) - count
    replica = np.arange(slots) - np.take_along_axis(first, expert, axis=1)
    replica_slots[np.arange(layers)[:, None], expert, replica] = by_expert
    return Placement(slot_expert, replica_slots, count)


def choose_slots(
    experts: Int[Array, "N K"], replica_slots: Int[Array, "E replicas"], replica_count: Int[Array, "E"]
) -> Int[Array, "N K"]:
    """The slot that serves each routed expert; -1 (a padded row's expert) stays -1.

    Replicas take turns by the token's place in its rank's batch: no random key, the same on every rank.
    """
    turn = jnp.arange(experts.shape[0])[:, None] % jnp.maximum(replica_count[experts], 1)
    return jnp.where(experts < 0, -1, replica_slots[experts, turn])
