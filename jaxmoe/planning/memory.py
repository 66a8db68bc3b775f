"""Bytes of a device: weights by kind, KV pages, room to move experts, and what the largest step needs beside them.

All but the last are counted exactly, from the axes that the modules and the cache give their arrays. The workspace is
an estimate: the largest of a layer's parts, as XLA lays them out.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

from jaxmoe.engine.batch import StepShape
from jaxmoe.engine.config import ACCELERATOR_SHARE
from jaxmoe.engine.pages import pages_reached
from jaxmoe.models.config import ModelConfig
from jaxmoe.models.kv_cache import bytes_per_page, cache_vectors
from jaxmoe.models.latent_attention import absorbs
from jaxmoe.models.parameters import Parameter
from jaxmoe.models.segments import segments
from jaxmoe.ops.grouped_mlp import implementation_for
from jaxmoe.planning.deployment import Deployment
from jaxmoe.planning.hardware import Device
from jaxmoe.spans import Span

KINDS = ("experts", "shared experts", "dense feed-forward", "attention", "router", "embedding, lm_head", "norms", "mtp")
_KIND_OF = {
    "experts": "experts", "shared": "shared experts", "dense": "dense feed-forward", "attention": "attention",
    "router": "router", "router_bias": "router", "embed": "embedding, lm_head", "lm_head": "embedding, lm_head",
    "attention_norm": "norms", "feed_forward_norm": "norms", "norm": "norms", "mtp": "mtp",
}  # fmt: skip
FLOAT32 = 4


def kind_of(path: str) -> str:
    """The kind, one of KINDS, of a parameter by its dotted path."""
    return _KIND_OF[path.split(".")[0]]


def weight_bytes(deployment: Deployment) -> dict[str, int]:
    """Bytes of weights on each device by kind; of a layer that predicts a token more, all are "mtp"."""
    total = dict.fromkeys(KINDS, 0)
    for path, parameter in deployment.subject.parameters.items():
        size = _held(deployment, parameter)
        own, further = parameter.layers or (1, 0)
        total[kind_of(path)] += size // (own + further) * own
        total["mtp"] += size // (own + further) * further
    return total


def loading_bytes(deployment: Deployment) -> int:
    """Bytes of weights on each device at the worst moment of a start: experts arrive in the dtype that is computed in,
    and are put in the one that they are kept in stack by stack, in order of their names."""
    subject, kept = deployment.subject, sum(weight_bytes(deployment).values())
    if subject.expert_dtype is None:
        return kept
    whole = dataclasses.replace(subject, expert_dtype=None)
    now = most = sum(weight_bytes(dataclasses.replace(deployment, subject=whole)).values())
    for path in sorted(path for path in whole.parameters if kind_of(path) == "experts"):
        replaced = [name for name in subject.parameters if name.removesuffix("_scale") == path]
        now += sum(_held(deployment, subject.parameters[name]) for name in replaced)
        most = max(most, now)
        now -= _held(deployment, whole.parameters[path])
    return most


def _held(deployment: Deployment, parameter: Parameter) -> int:
    """Bytes of a parameter on each device."""
    return math.prod(parameter.shard_shape(deployment.rules, deployment.slots)) * parameter.dtype.itemsize


def moving_bytes(deployment: Deployment) -> int:
    """Bytes on each device that a mover of experts keeps: one layer's stacks, and one slot that is on its way."""
    if deployment.limits.rebalance is None:
        return 0
    layer = sum(
        _held(deployment, parameter) // parameter.shape[0]
        for path, parameter in deployment.subject.parameters.items()
        if kind_of(path) == "experts"
    )
    return layer + layer // (deployment.slots // deployment.spec.expert_devices)


def pages_of_a_sequence(deployment: Deployment) -> list[int]:
    """KV pages of a sequence at full context, by group of layers with one span."""
    limits = deployment.limits
    total = -(-deployment.context // limits.page_size)
    return [pages_reached(span, limits.max_prefill_tokens, limits.page_size, total) for span in deployment.config.spans]


def page_bytes(deployment: Deployment) -> list[int]:
    """Bytes of a page of each group, on each device of a rank."""
    config, limits, platform = deployment.config, deployment.limits, deployment.execution.platform
    return [
        bytes_per_page(config, group, limits.page_size, deployment.subject.dtype, deployment.rules, platform)
        for group in range(len(config.spans))
    ]


def sequence_bytes(deployment: Deployment) -> int:
    """Bytes of KV pages of a sequence at full context, on each device of its rank."""
    return sum(map(math.prod, zip(pages_of_a_sequence(deployment), page_bytes(deployment), strict=True)))


class Workspace(NamedTuple):
    """Bytes that a step needs beside weights and pages.

    arguments: placement and batch. layer: the matrices of layers that a turn of the scan slices from their stacks.
    attention, feed_forward, logits: what these parts need, one after the other.
    """

    arguments: int
    layer: int
    attention: int
    feed_forward: int
    logits: int

    @property
    def total(self) -> int:
        return self.arguments + self.layer + max(self.attention, self.feed_forward, self.logits)


def workspace(deployment: Deployment, shape: StepShape) -> Workspace:
    """Of the program of this shape, beside weights and pages."""
    config, itemsize = deployment.config, deployment.itemsize
    tokens, mixtures = shape.rows, len(config.stacks["moe"])
    replicas = config.experts * (deployment.slots - config.experts + 2) + deployment.slots
    packed = deployment.packing.words(shape)
    # Placement and the packed batch; the hidden state, a normed copy and a sum; and what drafting goes on from.
    states = 4 if deployment.limits.speculate else 3
    arguments = FLOAT32 * (mixtures * replicas + packed) + states * tokens * config.width * itemsize
    vocab = config.vocab_size
    return Workspace(
        arguments,
        _sliced(deployment),
        max(_attention(deployment, shape, span) for span in config.spans),
        max(_experts(deployment, shape) if mixtures else 0, _dense(deployment, shape)),
        shape.draws * (vocab * (itemsize + FLOAT32) + config.width * itemsize),
    )


def _sliced(deployment: Deployment) -> int:
    """Of all layers but experts, which are read in place, except by a GPU's `ragged_dot`, and in other than the dtype
    that is computed in: one layer's are then put in that before they are multiplied by, but by tiles of a CPU.

    A scan slices one period of layers at a time; of layers that are written out XLA slices all as soon as it can.
    """
    config, of_layer = deployment.config, {True: 0, False: 0}
    implementation = implementation_for(deployment.execution.platform)
    for path, parameter in deployment.subject.parameters.items():
        kind = kind_of(path)
        if parameter.layers is None or kind in ("norms", "mtp"):
            continue
        itemsize = parameter.dtype.itemsize
        if kind == "experts":
            converted = parameter.dtype != deployment.subject.dtype and implementation != "tiles"
            if implementation != "ragged_dot" and not converted:
                continue
            itemsize = max(itemsize, deployment.itemsize)
        size = math.prod(parameter.shard_shape(deployment.rules, deployment.slots)[1:]) * itemsize
        for moe in of_layer:
            if kind == "attention" or moe == (kind != "dense feed-forward"):
                of_layer[moe] += size
    written_out, scanned = 0, [0]
    for run in segments(config.kinds):
        period = sum(of_layer[kind.moe] for kind in config.kinds[run.start : run.start + run.period])
        if run.repeats == 1:
            written_out += period
        else:
            scanned.append(period)
    return max(written_out, *scanned)


def _keys(deployment: Deployment, shape: StepShape, span: Span) -> int:
    width = deployment.packing.widths(shape)[deployment.config.spans.index(span)]
    return width * deployment.limits.page_size


def _attention(deployment: Deployment, shape: StepShape, span: Span) -> int:
    """Gathered keys and values, scores and their softmax in float32, queries and outputs; and the mask."""
    config, rules = deployment.config, deployment.rules
    heads, keys = config.heads // rules.parts("heads"), _keys(deployment, shape, span)
    tokens, every_key = shape.rows, shape.batch * keys
    scores = tokens * heads * keys
    numbers = tokens * heads * 2 * _head_dim(config)
    if (dims := config.latent) is None:
        kv_heads = config.kv_heads // rules.parts("kv_heads")
        numbers += 2 * every_key * kv_heads * config.head_dim
        if "kv_heads" not in rules.split and rules.parts("heads") > 1 and kv_heads > 1:
            numbers += 2 * every_key * config.head_dim
    else:
        ((entry,),) = cache_vectors(config, deployment.execution.platform)
        numbers += 2 * every_key * entry
        if absorbs(dims, shape.tokens, keys):
            numbers += every_key * dims.kv_lora_rank + tokens * heads * (entry + 2 * dims.kv_lora_rank)
        else:
            made = dims.nope_dim + dims.value_dim
            numbers += every_key * heads * (2 * made + dims.rope_dim)
    return numbers * deployment.itemsize + 2 * scores * FLOAT32 + tokens * keys


def _head_dim(config: ModelConfig) -> int:
    dims = config.latent
    return config.head_dim if dims is None else dims.nope_dim + dims.rope_dim + dims.value_dim


def _experts(deployment: Deployment, shape: StepShape) -> int:
    """Buffers of an exchange, the rows of pairs of tokens and experts, and the sums; what a TPU merges of matrices."""
    config, mixture = deployment.config, deployment.mixture(shape)
    strategy, itemsize = deployment.strategy(shape), deployment.itemsize
    rows = mixture.tokens * mixture.devices
    to, back = mixture.row_bytes
    if strategy.endswith("all_to_all") and mixture.devices > 1:
        rows = mixture.devices * mixture.capacity
        moved = 2 * rows * (to + back) + mixture.tokens * mixture.lanes * config.width * (itemsize + FLOAT32)
    else:
        moved = (rows * (to + back) + mixture.tokens * to) if mixture.devices > 1 else 0
    inner = config.expert_width // deployment.rules.parts("expert_width")
    pairs = rows * min(config.experts_per_token, deployment.slots // mixture.devices)
    if deployment.execution.platform == "cpu":
        # Tiles of rows, gathered as they are needed.
        computed = rows * config.experts_per_token * inner * itemsize
    else:
        computed = pairs * (2 * config.width + 3 * inner) * itemsize + pairs * config.width * FLOAT32
    if implementation_for(deployment.execution.platform) == "megablox":
        # Sliced, and merged by a copy.
        computed += 2 * (deployment.slots // mixture.devices) * config.width * 2 * inner * itemsize
    return moved + computed + rows * config.width * FLOAT32


def _dense(deployment: Deployment, shape: StepShape) -> int:
    config, rules = deployment.config, deployment.rules
    widths = [config.shared_width // rules.parts("shared_width")] if config.stacks["moe"] else []
    widths += [config.dense_width // rules.parts("dense_width")] if config.stacks["dense"] else []
    return shape.rows * 3 * max(widths, default=0) * deployment.itemsize


@dataclasses.dataclass(frozen=True)
class Memory:
    """How the memory of each device is used. All in bytes.

    limit: what can be used. weights: by kind. loading: weights at the worst moment of a start, before there are pages.
    sequence: KV pages of one sequence at full context. kv: of a full batch. moving: room to move experts.
    workspace: of the largest step. capacity: KV pages that the server would make, for as many sequences as there are.
    """

    limit: int
    weights: dict[str, int]
    loading: int
    sequence: int
    kv: int
    moving: int
    workspace: Workspace
    largest: StepShape

    @property
    def all_weights(self) -> int:
        return sum(self.weights.values())

    @property
    def needed(self) -> int:
        """While it serves."""
        return self.all_weights + self.kv + self.moving + self.workspace.total

    @property
    def fits(self) -> bool:
        return max(self.needed, self.loading) <= self.limit

    @functools.cached_property
    def kv_capacity(self) -> int:
        """What KV pages can take: the engine leaves a share of what the weights leave to temporaries, or more."""
        left = self.limit - self.all_weights
        return max(0, min(int(left * ACCELERATOR_SHARE), left - self.moving - self.workspace.total))


def memory(deployment: Deployment, device: Device) -> Memory:
    sequence = sequence_bytes(deployment)
    spaces = {shape: workspace(deployment, shape) for shape in deployment.shapes}
    largest = max(spaces, key=lambda shape: spaces[shape].total)
    return Memory(
        int(device.memory * device.usable),
        weight_bytes(deployment),
        loading_bytes(deployment),
        sequence,
        sequence * deployment.limits.max_batch,
        moving_bytes(deployment),
        spaces[largest],
        largest,
    )
