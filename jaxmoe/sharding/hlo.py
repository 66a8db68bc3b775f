"""What XLA compiled: the collectives of a program, read from its HLO text."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

KINDS = (
    "all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
# `%name = type kind(operands), ...`. An asynchronous pair is read at its end, since the type of its start has operands
# too, and its devices at its start.
_INSTRUCTION = re.compile(
    rf"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.*?) (?P<kind>{'|'.join(KINDS)})(?P<part>-start|-done)?"
    r"\((?P<rest>.*)$",
    re.MULTILINE,
)
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]\w*)\[(?P<shape>[\d,]*)\]")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_ALONG = re.compile(r"replica_groups=mesh\[(?P<sizes>[^\]]*)\] \{(?P<axes>[^}]*)\}")
_COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction of a compiled program that moves data between devices.

    kind: one of KINDS.
    dtype: HLO's name of the element type, "f32"; of several types, all of them: "bf16,f32".
    shapes: of the arrays that one device has when it is done; an all-to-all may hold one array for each device.
    bytes: of all these arrays together.
    axes: of the mesh, along which the devices lie that exchange; () if they are no such set, or the mesh is not known.
    """

    kind: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    axes: tuple[str, ...] = ()


def collectives(fn: Callable[..., Any] | jax.stages.Compiled, *args: Any, **kwargs: Any) -> list[Collective]:
    """The collectives of `fn` compiled for these arguments, on the mesh in use (`jax.set_mesh`). Runs nothing.

    fn: a function, jitted or not, or what `jax.jit(...).lower(...).compile()` returns, which needs no arguments.
    args, kwargs: arrays, or `jax.ShapeDtypeStruct` with a sharding, on the mesh.

    >>> with jax.set_mesh(mesh): collectives(jax.shard_map(lambda x: jax.lax.psum(x, "ep"), in_specs=..., ...), x)
    [Collective(kind='all-reduce', dtype='f32', shapes=((4,),), bytes=16, axes=('ep',))]
    """
    compiled: Any = fn
    if not isinstance(fn, jax.stages.Compiled):
        jitted: Any = fn if hasattr(fn, "lower") else jax.jit(fn)
        compiled = jitted.lower(*args, **kwargs).compile()
    return read_collectives(compiled.as_text(), jax.sharding.get_abstract_mesh().shape)


def read_collectives(hlo: str, mesh: Mapping[str, int] | None = None) -> list[Collective]:
    """The collectives in `jax.stages.Compiled.as_text()`, in the order of the text. One in a loop's body counts once.

    mesh: the sizes of its axes, as in `Mesh.shape`.

    >>> read_collectives("%all-to-all.2 = (f32[4,8]{1,0}, f32[4,8]{1,0}) all-to-all(%a, %b), channel_id=1")
    [Collective(kind='all-to-all', dtype='f32', shapes=((4, 8), (4, 8)), bytes=256, axes=())]
    """
    found, starts = [], {}
    for match in _INSTRUCTION.finditer(hlo):
        if match["part"] == "-start":
            starts[match["name"]] = match["rest"]
            continue
        devices = match["rest"]
        if match["part"] == "-done":
            devices = next((starts[name] for name in re.findall(r"%?([\w.-]+)", devices) if name in starts), "")
        found.append(_collective(match["kind"], match["type"], _axes(devices, dict(mesh or {}))))
    return found


def _collective(kind: str, result: str, axes: tuple[str, ...]) -> Collective:
    arrays = [(array["dtype"], _shape(array["shape"])) for array in _ARRAY.finditer(result)]
    return Collective(
        kind,
        ",".join(sorted({dtype for dtype, _ in arrays})),
        tuple(shape for _, shape in arrays),
        sum(-(-math.prod(shape) * _bits(dtype) // 8) for dtype, shape in arrays),
        axes,
    )


def _axes(instruction: str, mesh: dict[str, int]) -> tuple[str, ...]:
    """The fewest axes of the mesh along which the instruction's devices lie."""
    groups = _groups(instruction, math.prod(mesh.values()))
    pairs = "source_target_pairs" in instruction
    by_axes = _groups_along(tuple((name, size) for name, size in mesh.items() if size > 1))
    for axes, along in by_axes.items():
        if along == groups or (pairs and groups and all(any(pair <= group for group in along) for pair in groups)):
            return axes
    return ()


def _groups(instruction: str, devices: int) -> frozenset[frozenset[int]]:
    """The sets of devices that exchange with each other."""
    if counted := _COUNTED.search(instruction):
        shape, source, order = (tuple(map(int, text.split(","))) if text else None for text in counted.groups())
        ids = np.arange(math.prod(source or ())).reshape(source or ())
        rows = (ids.transpose(order) if order else ids).reshape(shape or ())
        return frozenset(frozenset(row.tolist()) for row in rows)
    if along := _ALONG.search(instruction):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", along["sizes"])}
        return _groups_along(tuple(sizes.items())).get(tuple(re.findall(r"'(\w+)'(?!:)", along["axes"])), frozenset())
    listed = _LISTED.search(instruction)
    if listed is None:
        return frozenset()
    # An empty list means all of them.
    groups = re.findall(r"\{([\d,]+)\}", listed[1]) or [",".join(map(str, range(devices)))]
    return frozenset(frozenset(map(int, group.split(","))) for group in groups)


@functools.lru_cache(maxsize=8)
def _groups_along(mesh: tuple[tuple[str, int], ...]) -> dict[tuple[str, ...], frozenset[frozenset[int]]]:
    """For all sets of axes, the small ones first: the devices that differ along these axes alone."""
    names = [name for name, _ in mesh]
    ids = np.arange(math.prod(size for _, size in mesh)).reshape([size for _, size in mesh])
    found = {}
    for count in range(1, len(names) + 1):
        for axes in itertools.combinations(names, count):
            last = np.moveaxis(ids, [names.index(axis) for axis in axes], range(-count, 0))
            rows = last.reshape(-1, math.prod(dict(mesh)[axis] for axis in axes))
            found[axes] = frozenset(frozenset(row.tolist()) for row in rows)
    return found


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",")) if text else ()


def _bits(dtype: str) -> int:
    """Of one element: the first number in its name, f8e4m3fn and c64 alike; a pred takes a byte."""
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8
