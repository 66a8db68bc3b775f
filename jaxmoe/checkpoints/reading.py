"""Any window of one parameter, read from the bytes of the tensors that it touches and no others."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from jaxmoe.checkpoints.safetensors import DTYPES, StoredTensor
from jaxmoe.models.keys import EXPERT, PART, Key

SCALE = "_scale_inv"  # what follows a quantised tensor's name in that of its scales

Block: TypeAlias = tuple[int, int]  # rows and columns that share a scale
Window: TypeAlias = tuple[tuple[int, int], ...]  # start and stop on every axis in memory

# The value of every byte, which is quicker to look up than to convert.
_FP8 = {name: np.arange(256, dtype=np.uint8).view(DTYPES[name]).astype(np.float32) for name in ("F8_E4M3", "F8_E5M2")}


def is_quantised(tensor: StoredTensor) -> bool:
    """Whether a scale belongs to it."""
    return tensor.dtype in _FP8


def scale_shape(shape: Sequence[int], block: Block) -> tuple[int, int]:
    """One number a block; blocks at the edges may be partial."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


class ParameterReader:
    """Reads windows of one parameter of a checkpoint that was checked.

    tensors: by name on disk. shape: the parameter's in memory. layers: numbers of the stacked layers.
    slot_expert [L, S]: the expert of every slot. block: of tensors in fp8.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        key: Key,
        shape: Sequence[int],
        layers: Sequence[int],
        slot_expert: np.ndarray,
        experts: int,
        dtype: Any,
        block: Block | None = None,
    ) -> None:
        self.tensors, self.key, self.layers = tensors, key, layers
        self.slot_expert, self.dtype, self.block = slot_expert, np.dtype(dtype), block
        self.sizes = key.sizes(shape[key.stacked :], experts)

    def __call__(self, window: Window) -> np.ndarray:
        """The window in memory order, cast to the parameter's dtype."""
        key, ranges = self.key, [range(*bounds) for bounds in window]
        leading, inner = ranges[: key.stacked], dict(zip(key.memory_axes, ranges[key.stacked :], strict=True))
        # Gate and up are tensors of their own where `part` is an axis of memory alone.
        parts = inner[PART] if len(key.tensors) > 1 else (0,)
        out = np.empty([len(part) for part in ranges], self.dtype)
        for place in itertools.product(*(enumerate(part) for part in leading)):
            row = place[0][1] if key.per_layer else 0
            expert = int(self.slot_expert[row, place[-1][1]]) if key.per_expert else 0
            target = out[tuple(at for at, _ in place)]
            for at, part in enumerate(parts):
                name = key.tensors[part].format(layer=self.layers[row], expert=expert)
                if len(key.tensors) > 1:
                    assert key.part_axis is not None
                    np.moveaxis(target, key.part_axis, 0)[at] = self._read(name, expert, inner)
                else:
                    target[...] = self._read(name, expert, inner)
        return out

    def _read(self, name: str, expert: int, inner: Mapping[str, range]) -> np.ndarray:
        """A window of one tensor, in memory order; where it needs no scale a view, from which nothing is read yet."""
        stored = self.key.stored_axes
        tensor = self.tensors[name]
        at = tuple(expert if axis == EXPERT else slice(inner[axis].start, inner[axis].stop) for axis in stored)
        values = tensor.view().reshape([self.sizes[axis] for axis in stored])[at]
        if is_quantised(tensor):
            values = self._dequantised(values, tensor, self.tensors[name + SCALE], inner)
        left = [axis for axis in stored if axis != EXPERT]
        return values.transpose([left.index(axis) for axis in self.key.memory_axes if axis in left])

    def _dequantised(
        self, values: np.ndarray, tensor: StoredTensor, scales: StoredTensor, inner: Mapping[str, range]
    ) -> np.ndarray:
        """float32(value) * scale of its block, in stored order."""
        assert self.block is not None
        blocks = []
        for group, size in zip(self.key.stored_groups, self.block, strict=True):
            # Where each row (or column) of the window lies on disk, axes that are merged there taken apart.
            lengths = [self.sizes[axis] for axis in group]
            places = np.arange(np.prod(lengths)).reshape(lengths)
            places = places[tuple(slice(inner[axis].start, inner[axis].stop) for axis in group)].ravel()
            blocks.append(places // size)
        rows, columns = blocks
        scale = np.take(np.asarray(scales.view(), np.float32)[rows], columns, axis=1)
        out = np.take(_FP8[tensor.dtype], values.view(np.uint8)).reshape(len(rows), len(columns))
        out *= scale
        return out.reshape(values.shape)
