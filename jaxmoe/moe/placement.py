"""Which physical slot holds which logical expert.

Placement is data: an argument of the compiled step, never a constant. All placements of one model on one mesh have the
same shapes, so that changing one for another compiles nothing.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxmoe.errors import ConfigError
from jaxmoe.moe.simulation import Simulated

FORMAT = "jaxmoe-placement-1"


class Placement(NamedTuple):
    """Slots and replicas of every layer. Replica lists are padded with slot 0 beyond `replica_count`.

    An expert may have as many replicas as there are slots that no other expert needs: the axis has S - E + 1 places.
    simulated: in benchmarks, where tokens go instead of where the routers send them.
    """

    slot_expert: Int[Array | np.ndarray, "L S"]
    replica_slots: Int[Array | np.ndarray, "L E replicas"]
    replica_count: Int[Array | np.ndarray, "L E"]
    simulated: Simulated | None = None


def initial_placement(num_layers: int, num_experts: int, num_slots: int) -> Placement:
    """Expert s % E in slot s, in every layer; experts whose turn comes again get a further replica. Host arrays.

    >>> initial_placement(1, 3, 4).slot_expert
    [[0, 1, 2, 0]]
    """
    of_layer = np.arange(num_slots, dtype=np.int32) % num_experts
    return placement_of(np.tile(of_layer, (num_layers, 1)), num_experts)


def placement_of(
    slot_expert: Int[np.ndarray, "L S"], num_experts: int, masked: Bool[np.ndarray, "S"] | None = None
) -> Placement:
    """The placement in which slot s of layer l holds expert slot_expert[l, s]; replicas in order of slots. Host arrays.

    masked: slots that serve nobody, whatever they hold.
    Raises ConfigError unless every layer holds every expert and none other.

    >>> placement_of(np.array([[2, 0, 1, 0]]), 3).replica_slots
    [[[1, 3], [2, 0], [0, 0]]]
    """
    layers, slots = slot_expert.shape
    slot_expert = slot_expert.astype(np.int32)
    serving = np.arange(slots) if masked is None else np.flatnonzero(~masked)
    every = np.arange(num_experts)
    for layer, row in enumerate(slot_expert):
        if missing := np.setdiff1d(every, row[serving]).tolist():
            raise ConfigError(f"layer {layer} of the placement has no slot for experts {missing[:20]}")
        if unknown := np.setdiff1d(row, every).tolist():
            raise ConfigError(f"layer {layer} of the placement names experts {unknown[:20]}; there are {num_experts}")
    served = slot_expert[:, serving]
    count = (served[:, :, None] == every).sum(axis=1, dtype=np.int32)
    replica_slots = np.zeros((layers, num_experts, max(1, slots - num_experts + 1)), np.int32)
    by_expert = np.argsort(served, axis=1, kind="stable")
    expert = np.take_along_axis(served, by_expert, axis=1)
    first = np.cumsum(count, axis=1) - count
    replica = np.arange(len(serving)) - np.take_along_axis(first, expert, axis=1)
    replica_slots[np.arange(layers)[:, None], expert, replica] = serving[by_expert]
    return Placement(slot_expert, replica_slots, count)


def write_placement(path: str | Path, slot_expert: Int[np.ndarray, "L S"], num_experts: int, devices: int) -> None:
    """As JSON, whole or not at all. Raises ConfigError if it cannot be written."""
    path = Path(path)
    told = {"format": FORMAT, "experts": num_experts, "devices": devices, "slot_expert": slot_expert.tolist()}
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(json.dumps(told))
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"the placement cannot be written to {path}: {error.strerror}; name another file") from error


def read_placement(path: str | Path, layers: int, num_experts: int, devices: int) -> Int[np.ndarray, "L S"]:
    """Of `write_placement`, for a model of so many mixture layers. Raises ConfigError if it is none, or does not fit.

    devices: as many as now hold a copy of the experts; those of the file may have been others, if its slots divide.
    """
    try:
        told = json.loads(Path(path).read_text())
        if not isinstance(told, dict) or told.get("format") != FORMAT:
            raise ConfigError(f"{path} is not a placement: its format is not {FORMAT!r}")
        slot_expert = np.array(told["slot_expert"], np.int32)
    except OSError as error:
        raise ConfigError(f"the placement {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is not a placement: {error}") from error
    if slot_expert.ndim != 2 or len(slot_expert) != layers:
        raise ConfigError(f"{path} is a placement of {list(slot_expert.shape)}; the model has {layers} mixture layers")
    if slot_expert.shape[1] % devices:
        raise ConfigError(f"{path} has {slot_expert.shape[1]} slots, which {devices} devices cannot share evenly")
    placement_of(slot_expert, num_experts)
    return slot_expert


def choose_slots(
    experts: Int[Array, "N K"], replica_slots: Int[Array, "E replicas"], replica_count: Int[Array, "E"]
) -> Int[Array, "N K"]:
    """The slot that serves each routed expert; -1 (a padded row's expert) stays -1.

    Replicas take turns by the token's place in its rank's batch: no random key, the same on every rank.
    """
    turn = jnp.arange(experts.shape[0])[:, None] % jnp.maximum(replica_count[experts], 1)
    return jnp.where(experts < 0, -1, replica_slots[experts, turn])
