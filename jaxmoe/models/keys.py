"""How a parameter lies in a checkpoint: names, and the axes on disk and in memory. Read in both directions."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Key:
    """One parameter of a module.

    names: the tensor's name, with `{layer}` and `{expert}` where one parameter stacks many tensors; two names when two
        tensors lie side by side along the axis called `part`.
    axes: "stored -> memory" or one side when both are the same. Parentheses merge axes on disk: "(H d) D -> D H d".
        The stacked layer and expert axes lead in memory and are not spelled.
    """

    names: str | tuple[str, ...]
    axes: str

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.names,) if isinstance(self.names, str) else self.names

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.tensors[0]

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.tensors[0]

    @property
    def _stored(self) -> list[str]:
        return self.axes.split("->")[0].replace("(", " ( ").replace(")", " ) ").split()

    @property
    def _memory(self) -> list[str]:
        return self.axes.split("->")[-1].split()

    @property
    def part_axis(self) -> int | None:
        """Index of the `part` axis among the axes after the stacked ones."""
        return self._memory.index("part") if "part" in self._memory else None

    def _split_axes(self) -> list[str]:
        return [axis for axis in self._stored if axis not in "()"]

    def stored_shape(self, memory: tuple[int, ...]) -> tuple[int, ...]:
        """Shape on disk of one tensor whose memory axes (without `part`) have these sizes."""
        sizes = dict(zip((axis for axis in self._memory if axis != "part"), memory, strict=True))
        shape, merged = [], None
        for axis in self._stored:
            if axis == "(":
                merged = 1
            elif axis == ")":
                shape.append(merged)
                merged = None
            elif merged is None:
                shape.append(sizes[axis])
            else:
                merged *= sizes[axis]
        return tuple(size for size in shape if size is not None)

    def to_memory(self, stored: np.ndarray, memory: tuple[int, ...]) -> np.ndarray:
        """A view of one stored tensor with memory's axes (without `part`); nothing is read from disk yet."""
        names = [axis for axis in self._memory if axis != "part"]
        sizes = dict(zip(names, memory, strict=True))
        split = self._split_axes()
        unmerged = stored.reshape([sizes[axis] for axis in split])
        return unmerged.transpose([split.index(axis) for axis in names])

    def to_stored(self, memory: np.ndarray) -> np.ndarray:
        """The inverse of `to_memory`, contiguous."""
        names = [axis for axis in self._memory if axis != "part"]
        split = self._split_axes()
        unmerged = memory.transpose([names.index(axis) for axis in split])
        shape = self.stored_shape(memory.shape)
        assert math.prod(shape) == memory.size
        return np.ascontiguousarray(unmerged).reshape(shape)
