"""Any window of one parameter, read from the bytes of the tensors that it touches and no others."""

import itertools
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jaxmoe.checkpoints.safetensors import DTYPES, StoredTensor
from jaxmoe.models.keys import EXPERT, PART, Key

QUANTISED = {"F8_E4M3", "F8_E5M2"}
SCALE = "_scale_inv"  # what follows a quantised tensor's name in that of its scales

Block: TypeAlias = tuple[int, int]  # rows and columns that share a scale
Window: TypeAlias = tuple[tuple[int, int], ...]  # start and stop on every axis in memory


def is_quantised(tensor: StoredTensor) -> bool:
    """Whether a scale belongs to it."""
    return tensor.dtype in QUANTISED


def scale_shape(shape: Sequence[int], block: Block) -> tuple[int, int]:
    """One number a block; blocks at the edges may be partial."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


class Piece(NamedTuple):
    """A window of a parameter; of a quantised one, with what it takes to dequantise it.

    values: in memory order, perhaps a strided view of stored order. order: what took them there.
    scale: in stored order, for every row one number a block of columns. columns: every column's block.
    """

    values: np.ndarray
    order: tuple[int, ...] = ()
    scale: np.ndarray | None = None
    columns: np.ndarray | None = None

    @property
    def arrays(self) -> list[np.ndarray]:
        return [array for array in (self.values, self.scale, self.columns) if array is not None]

    def converted(self, dtype: np.dtype[Any]) -> np.ndarray:
        """Dequantised on the host."""
        arrays = self.arrays
        values = arrays[0] if len(arrays) == 1 else dequantise(*arrays, order=self.order, np=np)
        return values.astype(dtype, copy=False)


def dequantise(values: Any, scale: Any, columns: Any, *, order: Sequence[int], np: ModuleType) -> Any:
    """float32(value) * scale of its block, of a Piece. np: numpy or jax.numpy."""
    return values.astype(np.float32) * np.take(scale, columns, axis=-1).transpose(order)


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
        # The axis `part` is one of memory alone where its halves are tensors of their own.
        self.split = PART in key.memory_axes and PART not in key.stored_axes
        self.stored = [axis for axis in key.stored_axes if axis != EXPERT]
        names = [PART, *self.stored] if self.split else self.stored
        self.order = (*range(key.stacked), *(key.stacked + names.index(axis) for axis in key.memory_axes))

    def __call__(self, window: Window) -> np.ndarray:
        """The window in the parameter's dtype, perhaps as a strided view."""
        return self.read(window).converted(self.dtype)

    def read(self, window: Window) -> Piece:
        """The window as it is best brought to a device: in the parameter's dtype, or quantised as it is stored."""
        key, ranges = self.key, [range(*bounds) for bounds in window]
        leading, inner = ranges[: key.stacked], dict(zip(key.memory_axes, ranges[key.stacked :], strict=True))
        if self.split:
            leading = [*leading, inner[PART]]
        sources = [self._source(place) for place in itertools.product(*leading)]
        rows = [len(part) for part in leading]
        # Judged by whole layers, so that all shards of a layer are alike.
        dtypes = self._dtypes(ranges[0] if key.per_layer else range(1))
        quantised = bool(dtypes & QUANTISED)
        dtype = self.dtype if not quantised else DTYPES[dtypes.pop()] if len(dtypes) == 1 else np.dtype(np.float32)
        # In stored order, since what is transposed here an element at a time is transposed well on its way to a device.
        values = np.empty([*rows, *(len(inner[axis]) for axis in self.stored)], dtype)
        self._copy(sources, inner, values.reshape(len(sources), *values.shape[len(rows) :]))
        if not quantised:
            return Piece(values.transpose(self.order), self.order)
        scale, columns = self._scale(sources, inner)
        return Piece(values.transpose(self.order), self.order, scale.reshape(*rows, *scale.shape[1:]), columns)

    def _source(self, place: tuple[int, ...]) -> tuple[str, int]:
        """The tensor's name, and the expert within it where it holds all, at an index of the leading axes."""
        at = iter(place)
        row = next(at) if self.key.per_layer else 0
        expert = int(self.slot_expert[row, next(at)]) if self.key.per_expert else 0
        name = self.key.tensors[next(at) if self.split else 0]
        return name.format(layer=self.layers[row], expert=expert), expert

    def _dtypes(self, rows: range) -> set[str]:
        """Of all tensors of these layers."""
        stacks = {self.key.stack: [self.layers[row] for row in rows]}
        return {self.tensors[name].dtype for name in self.key.tensor_names(stacks, self.sizes[EXPERT])}

    def _copy(self, sources: list[tuple[str, int]], inner: Mapping[str, range], out: np.ndarray) -> None:
        unmerged = [self.sizes[axis] for axis in self.key.stored_axes]
        for target, (name, expert) in zip(out, sources, strict=True):
            at = tuple(expert if axis == EXPERT else _slice(inner[axis]) for axis in self.key.stored_axes)
            target[...] = self.tensors[name].view().reshape(unmerged)[at]

    def _scale(self, sources: list[tuple[str, int]], inner: Mapping[str, range]) -> tuple[np.ndarray, np.ndarray]:
        """Scales of the window's rows across all blocks of columns, whatever the window, and each column's block."""
        assert self.block is not None
        rows, columns = (
            self._blocks(axes, inner, size) for axes, size in zip(self.key.stored_groups, self.block, strict=True)
        )
        across = -(-math.prod(self.sizes[axis] for axis in self.key.stored_groups[1]) // self.block[1])
        scale = np.ones((len(sources), *rows.shape, across), np.float32)
        for target, (name, _) in zip(scale, sources, strict=True):
            if is_quantised(self.tensors[name]):
                target[...] = self.tensors[name + SCALE].view()[rows]
        return scale, columns

    def _blocks(self, axes: list[str], inner: Mapping[str, range], size: int) -> np.ndarray:
        """The block of every row, or column, of the window; axes that are merged on disk taken apart."""
        lengths = [self.sizes[axis] for axis in axes]
        places = np.arange(math.prod(lengths), dtype=np.int32).reshape(lengths)
        return places[tuple(_slice(inner[axis]) for axis in axes)] // size


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)
