"""The collectives of a step, derived from what the decoder does; tests hold them against compiled programs."""

import math
from typing import NamedTuple

from jaxmoe.engine.batch import StepShape
from jaxmoe.moe.strategy import Mixture, sent_bytes
from jaxmoe.planning.deployment import Deployment
from jaxmoe.sharding.mesh import RANKS

INT32 = 4


class Exchange(NamedTuple):
    """A collective that a step has so many `times`.

    what: whose it is, for people. kind: HLO's name. axes: of the mesh, along which the devices lie that exchange.
    bytes: of the arrays that one device has when it is done, as `read_collectives` counts them.
    sent: bytes that leave a device.
    """

    what: str
    kind: str
    axes: tuple[str, ...]
    times: int
    bytes: int
    sent: int


def exchanges(deployment: Deployment, shape: StepShape, drafts: bool = False) -> list[Exchange]:
    """Of the program of this shape, with one round of every exchange, which is what balanced routing takes.

    drafts: of the program that drafts after it instead.
    """
    config, rules, spec = deployment.config, deployment.rules, deployment.spec
    kinds = deployment.kinds(drafts)
    mixtures, dense = (sum(kind.moe == moe for kind in kinds) for moe in (True, False))
    of_tokens = shape.rows * config.width * deployment.itemsize
    found = []

    def sums(what: str, meaning: str, count: int) -> None:
        if meaning in rules.split and count:
            sent = 2 * of_tokens * (spec.tp - 1) // spec.tp
            found.append(Exchange(what, "all-reduce", ("tp",), count, of_tokens, sent))

    sums("embedding", "vocab", 1)
    sums("attention", "heads", len(kinds))
    sums("dense feed-forward", "dense_width", dense)
    if mixtures and spec.expert_devices > 1:
        found += _of_mixture(deployment, shape, mixtures)
    sums("experts", "expert_width", mixtures)
    if config.shared_width and mixtures:
        sums("shared experts", "shared_width", mixtures)
    if "vocab" in rules.split:
        logits = (shape.batch if drafts else shape.draws) * config.vocab_size * deployment.itemsize
        found.append(Exchange("logits", "all-gather", ("tp",), 1, logits, logits * (spec.tp - 1) // spec.tp))
    return found


def _of_mixture(deployment: Deployment, shape: StepShape, count: int) -> list[Exchange]:
    strategy, mixture, axes = deployment.strategy(shape), deployment.mixture(shape), deployment.spec.expert_axes
    axes = tuple(axis for axis in axes if getattr(deployment.spec, axis) > 1)
    ranks = tuple(axis for axis in RANKS if getattr(deployment.spec, axis) > 1)
    if strategy == "dense":
        return _of_oracle(deployment, axes, count)
    to, back = mixture.row_bytes
    sent_to, sent_back = sent_bytes(strategy, mixture)
    devices = mixture.devices
    if strategy == "replicate":
        return [
            Exchange("tokens to experts", "all-gather", axes, count, devices * mixture.tokens * to, sent_to),
            Exchange("sums to tokens", "reduce-scatter", axes, count, mixture.tokens * back, sent_back),
        ]
    ragged = strategy == "ragged_all_to_all"
    kind = "ragged-all-to-all" if ragged else "all-to-all"
    rows = devices * mixture.capacity
    found = [
        Exchange("tokens to experts", kind, axes, count, rows * to, sent_to),
        Exchange("sums to tokens", kind, axes, count, rows * back, sent_back),
    ]
    if ragged:
        lengths = devices * INT32
        found.append(Exchange("how many rows", "all-to-all", axes, count, lengths, lengths - INT32))
    return found + _of_agreement(mixture, ranks, count)


def _of_agreement(mixture: Mixture, ranks: tuple[str, ...], count: int) -> list[Exchange]:
    if mixture.most_rounds == 1:
        return []
    return [Exchange("how many rounds", "all-reduce", ranks, count, INT32, 2 * INT32)]


def _of_oracle(deployment: Deployment, axes: tuple[str, ...], count: int) -> list[Exchange]:
    """All weights of all experts to everyone, for every layer of every step."""
    parameters = deployment.subject.parameters
    found = []
    over = axes + (("tp",) if "expert_width" in deployment.rules.split else ())
    for path, parameter in parameters.items():
        if not path.startswith("experts."):
            continue
        _, _, *of_slot = parameter.shape
        whole = math.prod(of_slot) * deployment.slots * parameter.dtype.itemsize
        held = math.prod(parameter.shard_shape(deployment.rules, deployment.slots)[1:]) * parameter.dtype.itemsize
        found.append(Exchange("weights of all experts", "all-gather", over, count, whole, whole - held))
    return found
