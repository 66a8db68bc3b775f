"""How a parameter lies in a checkpoint: names, and the axes on disk and in memory. Read in both directions."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

EXPERT, PART = "expert", "part"


@dataclasses.dataclass(frozen=True)
class Key:
    """One parameter of a module.

    names: the tensor's name, with `{layer}` and `{expert}` where one parameter stacks many tensors; two names when two
        tensors lie side by side along the axis called `part`.
    axes: "stored -> memory" or one side when both are the same. Parentheses merge axes on disk: "(H d) D -> D H d".
        The stacked layer and expert axes lead in memory and are not spelled there. Two axes have meanings of their own:
        `part` (of two: gate and up), and on disk `expert`, where one tensor holds all experts of a layer:
        "expert D (part F) -> D part F".
    stack: which layers `{layer}` runs over, a name in `ModelConfig.stacks`.
    other: how some checkpoints have the same parameter instead.
    """

    names: str | tuple[str, ...]
    axes: str
    stack: str = "all"
    other: "Key | None" = None

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.names,) if isinstance(self.names, str) else self.names

    @property
    def alternatives(self) -> Iterator["Key"]:
        """This key, which is the one that is written, and its others."""
        key: Key | None = self
        while key is not None:
            yield key
            key = key.other

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.tensors[0]

    @property
    def per_expert(self) -> bool:
        """Memory has a slot axis after the layer axis, whether experts are tensors of their own on disk or not."""
        return "{expert}" in self.tensors[0] or self.experts_together

    @property
    def experts_together(self) -> bool:
        return EXPERT in self.stored_axes

    @property
    def stacked(self) -> int:
        """Leading axes in memory that `axes` does not spell."""
        return int(self.per_layer) + int(self.per_expert)

    @property
    def stored_groups(self) -> list[list[str]]:
        """Axes on disk as they are merged there: [["H", "d"], ["D"]] for "(H d) D"."""
        stored = self.axes.split("->")[0]
        return [(merged or single).split() for merged, single in re.findall(r"\(([^)]*)\)|(\w+)", stored)]

    @property
    def stored_axes(self) -> list[str]:
        """Axes on disk, unmerged."""
        return [axis for group in self.stored_groups for axis in group]

    @property
    def memory_axes(self) -> list[str]:
        """Axes in memory after the stacked ones."""
        return self.axes.split("->")[-1].replace("(", " ").replace(")", " ").split()

    @property
    def part_axis(self) -> int | None:
        """Index of the `part` axis among the axes after the stacked ones."""
        return self.memory_axes.index(PART) if PART in self.memory_axes else None

    def sizes(self, memory: Sequence[int], experts: int) -> dict[str, int]:
        """Sizes of all axes by name. memory: the shape in memory after the stacked axes."""
        return {**dict(zip(self.memory_axes, memory, strict=True)), EXPERT: experts}

    def stored_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape on disk of one tensor."""
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.stored_groups)

    def tensor_names(self, stacks: Mapping[str, Sequence[int]], experts: int) -> Iterator[str]:
        """Every tensor of this parameter by its name on disk."""
        for name in self.tensors:
            for layer in stacks[self.stack] if self.per_layer else (0,):
                for expert in range(experts) if "{expert}" in name else (0,):
                    yield name.format(layer=layer, expert=expert)

    def to_stored(self, memory: np.ndarray) -> np.ndarray:
        """One tensor as it lies on disk, contiguous.

        memory: its axes in memory; led by all experts where they lie together on disk, without `part` where its two
        halves are tensors of their own.
        """
        stored = self.stored_axes
        names = [axis for axis in self.memory_axes if axis in stored]
        if self.experts_together:
            names.insert(0, EXPERT)
        sizes = dict(zip(names, memory.shape, strict=True))
        unmerged = memory.transpose([names.index(axis) for axis in stored])
        return np.ascontiguousarray(unmerged).reshape(self.stored_shape(sizes))


Keys: TypeAlias = Mapping[str, Key]

# What all families name alike.
LAYER = "model.layers.{layer}."
SKELETON: Keys = {
    "embed": Key("model.embed_tokens.weight", "V D"),
    "attention_norm": Key(LAYER + "input_layernorm.weight", "D"),
    "feed_forward_norm": Key(LAYER + "post_attention_layernorm.weight", "D"),
    "norm": Key("model.norm.weight", "D"),
    "lm_head": Key("lm_head.weight", "V D -> D V"),
}
GROUPED_QUERY: Keys = {
    "attention.query": Key(LAYER + "self_attn.q_proj.weight", "(H d) D -> D H d"),
    "attention.key": Key(LAYER + "self_attn.k_proj.weight", "(H d) D -> D H d"),
    "attention.value": Key(LAYER + "self_attn.v_proj.weight", "(H d) D -> D H d"),
    "attention.out": Key(LAYER + "self_attn.o_proj.weight", "D (H d) -> H d D"),
}


def gated(parameter: str, prefix: str, stack: str) -> Keys:
    """Of a gated MLP whose tensors' names begin with `prefix`."""
    return {
        f"{parameter}.gate_up": Key((prefix + "gate_proj.weight", prefix + "up_proj.weight"), "F D -> D part F", stack),
        f"{parameter}.down": Key(prefix + "down_proj.weight", "D F -> F D", stack),
    }


def flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dict by dotted path, as key tables name parameters."""
    for name, node in tree.items():
        if isinstance(node, Mapping):
            yield from flat(node, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", node


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`: {"experts": {"down": x}} of {"experts.down": x}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
