"""Which physical slot holds which logical expert.

Placement is data: an argument of the compiled step, never a constant.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


class Placement(NamedTuple):
    """Slots and replicas of every layer. Replica lists are padded with slot 0 beyond `replica_count`."""

    slot_expert: Int[Array | np.ndarray, "L S"]
    replica_slots: Int[Array | np.ndarray, "L E replicas"]
    replica_count: Int[Array | np.ndarray, "L E"]


def initial_placement(num_layers: int, num_experts: int, num_slots: int) -> Placement:
    """Expert s % E in slot s, in every layer; experts whose turn comes again get a further replica. Host arrays.

    >>> initial_placement(1, 3, 4).slot_expert
    [[0, 1, 2, 0]]
    """
    slot_expert = np.arange(num_slots, dtype=np.int32) % num_experts
    most = -(-num_slots // num_experts)
    slots = np.arange(num_experts)[:, None] + num_experts * np.arange(most)[None, :]
    present = slots < num_slots
    placement = Placement(slot_expert, np.where(present, slots, 0).astype(np.int32), present.sum(1).astype(np.int32))
    return Placement(*(np.broadcast_to(array, (num_layers, *array.shape)).copy() for array in placement))


def choose_slots(
    experts: Int[Array, "N K"], replica_slots: Int[Array, "E replicas"], replica_count: Int[Array, "E"]
) -> Int[Array, "N K"]:
    """The slot that serves each routed expert; -1 (a padded row's expert) stays -1.

    Replicas take turns by the token's place in its rank's batch: no random key, the same on every rank.
    """
    turn = jnp.arange(experts.shape[0])[:, None] % jnp.maximum(replica_count[experts], 1)
    return jnp.where(experts < 0, -1, replica_slots[experts, turn])
