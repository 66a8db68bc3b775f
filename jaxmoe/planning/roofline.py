"""How long a step must take at least: what it reads over the memory's bandwidth, what it multiplies over the peak, what
it sends over the network. No step is faster; how close one comes is for measurements to say.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from jaxmoe.engine.batch import StepShape
from jaxmoe.models.kv_cache import cache_vectors
from jaxmoe.models.latent_attention import absorbs
from jaxmoe.planning.collectives import Exchange, exchanges
from jaxmoe.planning.deployment import Deployment
from jaxmoe.planning.hardware import Device
from jaxmoe.planning.memory import KINDS, kind_of
from jaxmoe.spans import FULL


class Part(NamedTuple):
    """One part of a step on one device: bytes it reads, floating-point operations, and seconds of collectives.

    drafts: whether it is a part of drafting rather than of the forward pass.
    """

    name: str
    bytes: float
    flops: float
    network: float = 0.0
    drafts: bool = False


@dataclasses.dataclass(frozen=True)
class StepTime:
    """A step's parts and what they come to on `device`.

    tokens: that all ranks together advance by, if every draft is right. drafts: how many of these are drafts.
    """

    device: Device
    itemsize: int
    parts: tuple[Part, ...]
    exchanges: tuple[Exchange, ...]
    active_slots: float
    tokens: int
    devices: int
    drafts: int = 0

    def memory(self, part: Part) -> float:
        return part.bytes / self.device.bandwidth

    def compute(self, part: Part) -> float:
        return part.flops / self.device.flops[self.itemsize]

    def of_part(self, part: Part) -> float:
        """Memory and compute overlap; a collective waits for what it sends."""
        return max(self.memory(part), self.compute(part)) + part.network

    @property
    def seconds(self) -> float:
        return sum(map(self.of_part, self.parts))

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds during which each limit is the one that holds."""
        found = {"memory": 0.0, "compute": 0.0, "network": 0.0}
        for part in self.parts:
            memory, compute = self.memory(part), self.compute(part)
            found["memory" if memory >= compute else "compute"] += max(memory, compute)
            found["network"] += part.network
        return found

    @property
    def bound(self) -> str:
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def active_slots(deployment: Deployment, shape: StepShape) -> float:
    """How many of a device's expert slots a mixture layer is expected to touch, experts being chosen evenly.

    A slot stays untouched by each of T tokens with probability 1 - K / S; a device's T are those of all ranks that
    share its copy of the experts.
    """
    mixture, slots = deployment.mixture(shape), deployment.slots
    missed = (1 - mixture.choices / slots) ** (mixture.tokens * mixture.devices)
    return slots / mixture.devices * (1 - missed)


def step_time(deployment: Deployment, shape: StepShape, device: Device) -> StepTime:
    """Every row of the shape a token, every sequence at full context, routing balanced; and drafting if steps draft."""
    parts: list[Part] = []
    found: list[Exchange] = []
    for drafts in (False, True)[: 2 if deployment.limits.speculate else 1]:
        own = exchanges(deployment, shape, drafts)
        parts += _parts(deployment, shape, device, own, drafts)
        found += (each._replace(what=f"mtp: {each.what}") for each in own) if drafts else own
    ranks = deployment.spec.num_ranks
    return StepTime(
        device,
        deployment.itemsize,
        tuple(parts),
        tuple(found),
        active_slots(deployment, shape) if deployment.config.stacks["moe"] else 0.0,
        ranks * shape.rows,
        deployment.spec.num_devices,
        ranks * (shape.draws - shape.batch),
    )


def _parts(
    deployment: Deployment, shape: StepShape, device: Device, found: list[Exchange], drafts: bool
) -> Iterator[Part]:
    """Of the forward pass or of drafting, whose exchanges these are."""
    config, mixture = deployment.config, deployment.mixture(shape)
    bytes_of, flops_of = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    for path, parameter in deployment.subject.parameters.items():
        kind = kind_of(path)
        held = parameter.shard_shape(deployment.rules, deployment.slots)
        numbers: float = math.prod(held)
        if parameter.layers is not None:
            own, further = parameter.layers
            numbers *= (min(further, 1) if drafts else own) / (own + further)
        if kind == "experts":
            in_slot = numbers / held[1]
            numbers = in_slot * active_slots(deployment, shape)
            # Every copy of the experts serves tokens * devices rows, K slots each, spread over its devices.
            flops_of[kind] += 2 * in_slot * mixture.tokens * mixture.choices
        elif path == "embed" and not config.tie_embeddings:
            numbers = shape.rows * config.width
        elif kind == "embedding, lm_head":
            flops_of[kind] += 2 * numbers * (shape.batch if drafts else shape.draws)
        elif path == "attention.key_value":
            flops_of[kind] += 2 * numbers * _rows_of_key_value(deployment, shape)
        elif kind != "norms":
            flops_of[kind] += 2 * numbers * shape.rows
        bytes_of[kind] += numbers * parameter.dtype.itemsize
    network = {
        "attention": _seconds(found, device, deployment, "attention"),
        "experts": _seconds(found, device, deployment, "experts", "tokens to experts", "sums to tokens",
                            "how many rows", "how many rounds", "weights of all experts"),
        "shared experts": _seconds(found, device, deployment, "shared experts"),
        "dense feed-forward": _seconds(found, device, deployment, "dense feed-forward"),
        "embedding, lm_head": _seconds(found, device, deployment, "embedding", "logits"),
    }  # fmt: skip
    kv_bytes, kv_flops = _attended(deployment, shape, drafts)
    if kv_bytes:
        yield Part("KV and scores", kv_bytes, kv_flops, drafts=drafts)
    for kind in KINDS:
        if bytes_of[kind]:
            yield Part(kind, bytes_of[kind], flops_of[kind], network.get(kind, 0.0), drafts)


def _seconds(found: list[Exchange], device: Device, deployment: Deployment, *whats: str) -> float:
    return sum(
        each.times * device.seconds(each.kind, each.sent, each.axes, deployment.spec)
        for each in found
        if each.what in whats
    )


def _rows_of_key_value(deployment: Deployment, shape: StepShape) -> int:
    """How many rows of latent attention meet the matrix that makes keys and values: of queries, or of all keys."""
    dims = deployment.config.latent
    assert dims is not None
    keys = deployment.context
    return shape.rows if absorbs(dims, shape.tokens, keys) else shape.batch * keys


def _attended(deployment: Deployment, shape: StepShape, drafts: bool) -> tuple[float, float]:
    """Bytes of KV pages that a device reads once, and operations of scores and mixing, over all layers."""
    config, rules, limits = deployment.config, deployment.rules, deployment.limits
    heads = config.heads // rules.parts("heads")
    read = operations = 0.0
    for span, width in zip(config.spans, deployment.packing.widths(shape), strict=True):
        layers = sum(kind.span == span for kind in deployment.kinds(drafts))
        keys = width * limits.page_size
        if (dims := config.latent) is None:
            numbers = 2 * config.kv_heads // rules.parts("kv_heads") * config.head_dim
            each = 2 * config.head_dim
        else:
            ((numbers,),) = cache_vectors(config, deployment.execution.platform)
            absorbed = absorbs(dims, shape.tokens, keys)
            each = dims.rope_dim + (2 * dims.kv_lora_rank if absorbed else dims.nope_dim + dims.value_dim)
        read += layers * shape.batch * keys * numbers * deployment.itemsize
        # Each token sees one key more than the token before it, the last of them all; none more than its span.
        pairs = shape.tokens * keys - shape.tokens * (shape.tokens - 1) // 2
        if span != FULL:
            pairs = min(pairs, shape.tokens * span.size)
        operations += layers * 2 * shape.batch * pairs * heads * each
    return read, operations
