"""What XLA compiled: the collectives of a program, read from its HLO text."""

import collections as containers
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
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
    r"\((?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) (?:\(.*\) -> .* )?\{$")
# The computations that an instruction runs: body=%a, calls=%b, branch_computations={%c, %d}.
_CALLED = re.compile(r"\b(?:condition|body|to_apply|calls|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_NAME = re.compile(r"[\w.-]+")
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]\w*)\[(?P<shape>[\d,]*)\]")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_COUNTED = re.compile(r"replica_groups=(?P<shape>\[[\d,]+\])<=(?P<ids>\[[\d,]+\](?:T\([\d,]+\))?)")
_ALONG = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\](?:, device_ids=\((?P<ids>[^()]*(?:\([\d,]*\))?)\))? \{(?P<axes>[^}]*)\}"
)
_PART = re.compile(r"'(?P<name>[^']*)'(?::\((?P<before>\d+)\)(?P<size>\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction of a compiled program that moves data between devices.

    kind: one of KINDS.
    dtype: HLO's name of the element type, "f32"; of several types, all of them: "bf16,f32".
    shapes: of the arrays that one device has when it is done; an all-to-all may hold one array for each device.
    bytes: of all these arrays together.
    axes: of the mesh, along which the devices lie that exchange; () if they are no such set, or the mesh is not known.
    in_loop: whether it stands in a loop, so that a run comes by more than once, or never.
    """

    kind: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    axes: tuple[str, ...] = ()
    in_loop: bool = False


def collectives(
    fn: Callable[..., Any] | jax.stages.Lowered | jax.stages.Compiled,
    *args: Any,
    mesh: jax.sharding.Mesh | None = None,
    **kwargs: Any,
) -> list[Collective]:
    """The collectives of `fn` compiled for these arguments. Runs nothing.

    fn: a function, jitted or not; or what `jax.jit(...).lower(...)` or its `compile()` returns, without arguments.
    args, kwargs: arrays, or `jax.ShapeDtypeStruct` with a sharding, on the mesh.
    mesh: None is the one in use (`jax.set_mesh`).

    >>> with jax.set_mesh(mesh): collectives(jax.shard_map(lambda x: jax.lax.psum(x, "ep"), in_specs=..., ...), x)
    [Collective(kind='all-reduce', dtype='f32', shapes=((4,),), bytes=16, axes=('ep',), in_loop=False)]
    """
    if mesh is not None:
        with jax.set_mesh(mesh):
            return collectives(fn, *args, **kwargs)
    staged: Any = fn
    if not isinstance(fn, jax.stages.Lowered | jax.stages.Compiled):
        jitted: Any = fn if hasattr(fn, "lower") else jax.jit(fn)
        staged = jitted.lower(*args, **kwargs)
    elif args or kwargs:
        raise TypeError(f"a {type(fn).__name__} has its arguments already")
    compiled: Any = staged.compile() if isinstance(staged, jax.stages.Lowered) else staged
    return read_collectives(compiled.as_text(), jax.sharding.get_abstract_mesh().shape)


def read_collectives(hlo: str, mesh: Mapping[str, int] | None = None) -> list[Collective]:
    """The collectives in `jax.stages.Compiled.as_text()`, in the order of the text. One in a loop's body counts once.

    mesh: the sizes of its axes, as in `Mesh.shape`.

    >>> read_collectives("%all-to-all.2 = (f32[4,8]{1,0}, f32[4,8]{1,0}) all-to-all(%a, %b), channel_id=1")
    [Collective(kind='all-to-all', dtype='f32', shapes=((4, 8), (4, 8)), bytes=256, axes=(), in_loop=False)]
    """
    found: list[Collective] = []
    starts: dict[str, str] = {}
    looped, computation = _looped(hlo), ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header["name"]
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        if match["part"] == "-start":
            starts[match["name"]] = match["rest"]
            continue
        devices = match["rest"]
        if match["part"] == "-done":
            devices = next((starts[name] for name in _NAME.findall(devices) if name in starts), "")
        axes = _axes(devices, dict(mesh or {}))
        found.append(_collective(match["kind"], match["type"], axes, computation in looped))
    return found


def summarise(found: Sequence[Collective]) -> str:
    """A table of collectives, equal ones in one line; bytes are those of one of them on one device.

    >>> print(summarise(read_collectives("%a = f32[4,8]{1,0} all-gather(%b), replica_groups={{0,1}}", {"ep": 2})))
    count  kind        axes  in a loop  bytes  arrays
        1  all-gather  ep    no           128  f32[4,8]
    """
    rows = [("count", "kind", "axes", "in a loop", "bytes", "arrays")]
    for one, count in containers.Counter(found).items():
        shapes = containers.Counter(f"[{','.join(map(str, shape))}]" for shape in one.shapes)
        arrays = ", ".join((f"{times} x " if times > 1 else "") + one.dtype + shape for shape, times in shapes.items())
        looped = "yes" if one.in_loop else "no"
        rows.append((str(count), one.kind, ",".join(one.axes) or "-", looped, f"{one.bytes:,}", arrays))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, "><<<><", widths, strict=True)).rstrip()
        for row in rows
    )


def _looped(hlo: str) -> set[str]:
    """The computations that loops run, however deep."""
    calls: dict[str, set[str]] = containers.defaultdict(set)
    looped: set[str] = set()
    computation = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header["name"]
        called = {name for names in _CALLED.findall(line) for name in _NAME.findall(names)}
        calls[computation] |= called
        if " while(" in line:
            looped |= called
    waiting = list(looped)
    while waiting:
        further = calls[waiting.pop()] - looped
        looped |= further
        waiting += further
    return looped


def _collective(kind: str, result: str, axes: tuple[str, ...], in_loop: bool) -> Collective:
    arrays = [(array["dtype"], _shape(array["shape"])) for array in _ARRAY.finditer(result)]
    return Collective(
        kind,
        ",".join(sorted({dtype for dtype, _ in arrays})),
        tuple(shape for _, shape in arrays),
        sum(-(-math.prod(shape) * _bits(dtype) // 8) for dtype, shape in arrays),
        axes,
        in_loop,
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
        return _sets(_ids(counted["ids"]).reshape(_shape(counted["shape"])))
    if along := _ALONG.search(instruction):
        return _groups_on_mesh(along)
    listed = _LISTED.search(instruction)
    if listed is None:
        return frozenset()
    # An empty list means all of them.
    groups = [_shape(group) for group in re.findall(r"\{[\d,]+\}", listed[1])] or [tuple(range(devices))]
    return frozenset(map(frozenset, groups))


def _groups_on_mesh(found: re.Match[str]) -> frozenset[frozenset[int]]:
    """Of axes of a mesh that the compiler made, or parts of them: 'b':(2)4 is the 4 after the first 2 of b."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", found["sizes"])}
    parts = {
        part["name"]: (int(part["before"]), int(part["size"])) if part["size"] else (1, sizes[part["name"]])
        for part in _PART.finditer(found["axes"])
    }
    split = [(*parts.get(name, (size, 1)), size) for name, size in sizes.items()]
    shape = [length for before, size, whole in split for length in (before, size, whole // (before * size))]
    joined = list(range(1, len(shape), 3))
    ids = np.arange(math.prod(shape)) if found["ids"] is None else _ids(found["ids"])
    last = np.moveaxis(ids.reshape(shape), joined, range(-len(joined), 0))
    return _sets(last.reshape(-1, math.prod(shape[at] for at in joined)))


def _ids(text: str) -> np.ndarray:
    """[2,4]T(1,0): 0, 1, 2, ... in that shape, transposed. Or a list."""
    if not text.startswith("["):
        return np.array(_shape(text))
    shape, _, order = text.partition("T")
    ids = np.arange(math.prod(_shape(shape))).reshape(_shape(shape))
    return ids.transpose(_shape(order)) if order else ids


def _sets(rows: np.ndarray) -> frozenset[frozenset[int]]:
    return frozenset(map(frozenset, rows.tolist()))


@functools.lru_cache(maxsize=8)
def _groups_along(mesh: tuple[tuple[str, int], ...]) -> dict[tuple[str, ...], frozenset[frozenset[int]]]:
    """For all sets of axes, the small ones first: the devices that differ along these axes alone."""
    names = [name for name, _ in mesh]
    ids = np.arange(math.prod(size for _, size in mesh)).reshape([size for _, size in mesh])
    found = {}
    for count in range(1, len(names) + 1):
        for axes in itertools.combinations(names, count):
            last = np.moveaxis(ids, [names.index(axis) for axis in axes], range(-count, 0))
            found[axes] = _sets(last.reshape(-1, math.prod(dict(mesh)[axis] for axis in axes)))
    return found


def _shape(text: str) -> tuple[int, ...]:
    """The numbers in "[2,3]", "{2,3}" or "2,3"."""
    return tuple(map(int, re.findall(r"\d+", text)))


def _bits(dtype: str) -> int:
    """Of one element: the first number in its name, f8e4m3fn and c64 alike; a pred takes a byte."""
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8
