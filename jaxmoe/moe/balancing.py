"""Which expert gets replicas, and which device holds what: from loads to a placement, on the host.

`rebalance_experts` is the published algorithm, EPLB (github.com/deepseek-ai/EPLB, `eplb.py`), to the bit. `plan` is
what serves: it fills devices in the same greedy way, but never with two replicas of an expert, which would spread
nothing; if asked, with at least two replicas of each, so that no device alone holds any; and moves as little as it can.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from jaxmoe.errors import ConfigError

Loads = Float[np.ndarray, "L E"] | Int[np.ndarray, "L E"]


class Packing(NamedTuple):
    """The pack that each item of a row is in, and its place there."""

    pack: Int[np.ndarray, "X n"]
    rank: Int[np.ndarray, "X n"]


class Replicas(NamedTuple):
    """expert, rank: of each slot, and which replica of it that is. of_expert: replicas of each expert."""

    expert: Int[np.ndarray, "X P"]
    rank: Int[np.ndarray, "X P"]
    of_expert: Int[np.ndarray, "X E"]


def balanced_packing(weight: Float[np.ndarray, "X n"], packs: int) -> Packing:
    """As many items in every pack: the heaviest first, each into the lightest pack with room, of equals the first.

    >>> balanced_packing(np.array([[10, 9, 8, 7, 6, 5, 4, 3.0]]), 4).pack
    [[0, 1, 2, 3, 3, 2, 1, 0]]
    """
    rows, items = weight.shape
    room = items // packs
    if room == 1:
        return Packing(np.tile(np.arange(items), (rows, 1)), np.zeros((rows, items), np.int64))
    pack, rank = np.empty((rows, items), np.int64), np.empty((rows, items), np.int64)
    for row, order in enumerate(np.argsort(-weight, axis=1, kind="stable")):
        load, held = np.zeros(packs, weight.dtype), np.zeros(packs, np.int64)
        for item in order:
            chosen = np.argmin(np.where(held < room, load, np.inf))
            pack[row, item], rank[row, item] = chosen, held[chosen]
            load[chosen] += weight[row, item]
            held[chosen] += 1
    return Packing(pack, rank)


def replicate_experts(weight: Float[np.ndarray, "X E"], slots: int) -> Replicas:
    """One slot for each expert; every further one for the expert whose replicas carry the most, of equals the first."""
    rows, experts = weight.shape
    expert = np.tile(np.arange(slots), (rows, 1))
    rank = np.zeros((rows, slots), np.int64)
    count = np.ones((rows, experts), np.int64)
    every = np.arange(rows)
    for slot in range(experts, slots):
        heaviest = (weight / count.astype(weight.dtype)).argmax(axis=1)
        expert[:, slot], rank[:, slot] = heaviest, count[every, heaviest]
        count[every, heaviest] += 1
    return Replicas(expert, rank, count)


def rebalance_experts(
    weight: Loads, slots: int, groups: int, nodes: int, devices: int
) -> tuple[Int[np.ndarray, "L P"], Int[np.ndarray, "L E most"], Int[np.ndarray, "L E"]]:
    """EPLB: slot to expert, expert to its slots by replica (-1 beyond `count`), and replicas of each expert.

    Where `nodes` divides `groups` of experts, whole groups are given to nodes and replicated within them; else one
    policy for all. Sorts are stable and of equals the lowest index is taken, in float32, as in the reference.
    Raises ConfigError on numbers that do not divide.
    """
    layers, experts = weight.shape
    weight = weight.astype(np.float32)
    if groups % nodes:
        groups, nodes = 1, 1
    for whole, part, what in (
        (experts, groups, "experts into groups"),
        (devices, nodes, "devices into nodes"),
        (slots, devices, "slots into devices"),
    ):
        if whole % part:
            raise ConfigError(f"{whole} {what} does not go: {part} does not divide {whole}")
    if slots < experts:
        raise ConfigError(f"{slots} slots cannot hold {experts} experts; use at least as many")
    size, of_node = experts // groups, experts // nodes

    of_groups = balanced_packing(weight.reshape(layers, groups, size).sum(axis=2, dtype=np.float32), nodes)
    first = (of_groups.pack * (groups // nodes) + of_groups.rank) * size
    # Experts renumbered so that those of a node follow each other.
    renumbered = (first[:, :, None] + np.arange(size)).reshape(layers, experts)
    original = _inverse(renumbered)

    by_node = np.take_along_axis(weight, original, axis=1).reshape(layers * nodes, of_node)
    replicas = replicate_experts(by_node, slots // nodes)
    share = np.take_along_axis(by_node / replicas.of_expert.astype(np.float32), replicas.expert, axis=1)
    packed = balanced_packing(share, devices // nodes)
    place = _inverse(packed.pack * (slots // devices) + packed.rank)

    def in_place(array: np.ndarray) -> np.ndarray:
        return np.take_along_axis(array, place, axis=1).reshape(layers, nodes, -1)

    within = in_place(replicas.expert) + np.arange(nodes)[:, None] * of_node
    slot_expert = np.take_along_axis(original, within.reshape(layers, slots), axis=1)
    rank = in_place(replicas.rank).reshape(layers, slots)
    count = np.take_along_axis(replicas.of_expert.reshape(layers, experts), renumbered, axis=1)
    expert_slots = np.full((layers, experts, int(count.max())), -1, np.int64)
    expert_slots[np.arange(layers)[:, None], slot_expert, rank] = np.arange(slots)
    return slot_expert, expert_slots, count


def _inverse(permutations: Int[np.ndarray, "X n"]) -> Int[np.ndarray, "X n"]:
    inverse = np.empty_like(permutations)
    np.put_along_axis(inverse, permutations, np.arange(permutations.shape[1])[None], axis=1)
    return inverse


def device_loads(slot_expert: Int[np.ndarray, "L S"], loads: Loads, devices: int) -> Float[np.ndarray, "L D"]:
    """What each device carries if replicas of an expert share its load evenly."""
    layers, experts = loads.shape
    count = (slot_expert[:, :, None] == np.arange(experts)).sum(axis=1)
    share = np.take_along_axis(loads / np.maximum(count, 1), slot_expert, axis=1)
    return share.reshape(layers, devices, -1).sum(axis=2)


def plan(
    loads: Loads,
    devices: int,
    present: Int[np.ndarray, "L S"],
    copies_at_least: int = 1,
    least_gain: float = 0.0,
) -> Int[np.ndarray, "L S"]:
    """The expert of every slot, for these loads, by as few moves from the `present` placement as that takes.

    copies_at_least: devices that hold each expert; with 2, any one of them can go. No expert is on a device twice.
    least_gain: a layer stays as it is unless its balancedness rises by more, or its placement is not such a one; as
        does a layer that has no loads. Without any, what must change is planned for even loads.
    Raises ConfigError if the slots do not suffice, saying what would.
    """
    layers, slots = present.shape
    experts = loads.shape[1]
    check_room(experts, slots, devices, copies_at_least)
    planned = present.copy()
    for layer in range(layers):
        of_layer = loads[layer].astype(np.float64)
        fits = _is_spread(present[layer], devices, experts, copies_at_least)
        if not of_layer.any():
            if fits:
                continue
            of_layer = np.ones(experts)
        count = _replica_counts(of_layer, slots, devices, copies_at_least)
        fresh = least_movement(present[layer], _spread(of_layer, count, devices))
        if fits and _balance(fresh, of_layer, devices) <= _balance(present[layer], of_layer, devices) + least_gain:
            continue
        planned[layer] = fresh
    return planned


def check_room(experts: int, slots: int, devices: int, least: int) -> None:
    if least < 1 or least > devices:
        raise ConfigError(f"{least} devices cannot hold each expert: there are {devices} devices of one copy")
    if slots < least * experts:
        needed = -(-least * experts // devices) * devices
        raise ConfigError(
            f"{slots} slots cannot hold {experts} experts {least} times; use --redundant-experts {needed - experts}"
        )
    if slots > experts * devices:
        most = experts * (devices - 1)
        raise ConfigError(
            f"{slots} slots are more than {experts} experts on each of {devices} devices; "
            f"use --redundant-experts {most} or fewer"
        )


def _is_spread(of_layer: Int[np.ndarray, "S"], devices: int, experts: int, least: int) -> bool:
    """Whether no device holds an expert twice and every expert has enough of them."""
    held = [set(row) for row in of_layer.reshape(devices, -1).tolist()]
    count = np.bincount(of_layer, minlength=experts)
    return all(len(each) * devices == len(of_layer) for each in held) and int(np.min(count)) >= least


def _balance(of_layer: Int[np.ndarray, "S"], loads: Float[np.ndarray, "E"], devices: int) -> float:
    carried = device_loads(of_layer[None], loads[None], devices)[0]
    return float(carried.mean() / carried.max())


def _replica_counts(loads: Float[np.ndarray, "E"], slots: int, devices: int, least: int) -> Int[np.ndarray, "E"]:
    """As EPLB replicates, but from `least` replicas of each, and of none more than there are devices.

    Of equally loaded experts the one with the fewest replicas comes first: without load they all get as many.
    """
    count = np.full(len(loads), least)
    for _ in range(slots - least * len(loads)):
        share = np.where(count < devices, loads / count, -1.0)
        count[np.lexsort((np.arange(len(loads)), count, -share))[0]] += 1
    return count


def _spread(loads: Float[np.ndarray, "E"], count: Int[np.ndarray, "E"], devices: int) -> list[set[int]]:
    """The experts of each device: as EPLB packs, but never an expert onto a device twice.

    That it goes: let all devices with room hold an expert that is to be placed. Some device without it is full, and
    holds more experts that a device with room lacks than it has; one of them changes places.
    """
    room = int(count.sum()) // devices
    held: list[set[int]] = [set() for _ in range(devices)]
    carried = np.zeros(devices)
    share = loads / count
    for expert in np.argsort(-share, kind="stable").tolist():
        for _ in range(count[expert]):
            free = [at for at in range(devices) if len(held[at]) < room and expert not in held[at]]
            if free:
                at = min(free, key=lambda device: (carried[device], device))
            else:
                swaps = (
                    (
                        max(carried[full] - share[other] + share[expert], carried[roomy] + share[other]),
                        full,
                        roomy,
                        other,
                    )
                    for roomy in range(devices)
                    if len(held[roomy]) < room
                    for full in range(devices)
                    if expert not in held[full]
                    for other in sorted(held[full] - held[roomy])
                )
                _, at, roomy, other = min(swaps)
                held[at].remove(other)
                held[roomy].add(other)
                carried[at] -= share[other]
                carried[roomy] += share[other]
            held[at].add(expert)
            carried[at] += share[expert]
    return held


def least_movement(present: Int[np.ndarray, "S"], held: list[set[int]]) -> Int[np.ndarray, "S"]:
    """The expert of every slot of a layer, with these sets of experts on devices, most of them where they are.

    Which set goes to which device is free, since devices are equal: it is chosen so that the fewest experts move
    (optimal assignment). On its device, an expert keeps its slot.

    >>> least_movement(np.array([0, 1, 2, 3]), [{2, 1}, {0, 3}])
    [0, 3, 2, 1]
    """
    slots = present.reshape(len(held), -1)
    kept = np.array([[len(wanted & set(row)) for wanted in held] for row in slots.tolist()])
    _, chosen = linear_sum_assignment(kept, maximize=True)
    placed = np.empty_like(slots)
    for device, row in enumerate(slots.tolist()):
        wanted = set(held[chosen[device]])
        stays = []
        for expert in row:
            stays.append(expert in wanted)
            wanted.discard(expert)
        moved = iter(sorted(wanted))
        placed[device] = [expert if stay else next(moved) for expert, stay in zip(row, stays, strict=True)]
    return placed.reshape(-1)
