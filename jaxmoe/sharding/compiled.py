"""What XLA compiled: the collectives of a program, between which devices they go and how much they carry."""

import collections as containers
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered

from jaxmoe.errors import MeshError

KINDS = (
    "all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_KIND = "|".join(sorted(KINDS, key=len, reverse=True))
# `%name = type kind(operands), attributes`.
_INSTRUCTION = re.compile(
    rf"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.*?) (?P<kind>{_KIND})(?P<part>-start|-done)?\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]\w*)\[(?P<shape>[\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) (?:\(.*\) -> .* )?\{$")
_LOOP = re.compile(r" while\(.*")
# Computations that an instruction runs: body=%b, calls=%c, branch_computations={%d, %e}.
_CALLED = re.compile(r"\b(?:condition|body|to_apply|calls|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_NAME = re.compile(r"[\w.-]+")
_LISTED = re.compile(r"\b(?:replica_groups|source_target_pairs)=\{(?P<groups>(?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"\breplica_groups=(?P<groups>\[[\d,]+\])<=(?P<ids>\[[\d,]+\](?:T\([\d,]+\))?)")
_ON_MESH = re.compile(
    r"\breplica_groups=mesh\[(?P<sizes>[^\]]*)\](?:, device_ids=\((?P<ids>[^)]*(?:\([^)]*\))?)\))? \{(?P<axes>[^}]*)\}"
)
_MESH_AXIS = re.compile(r"'(?P<name>[^']*)'(?:=(?P<size>\d+))?(?::\((?P<before>\d+)\)(?P<part>\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction of a compiled program that moves data between devices.

    kind: one of KINDS.
    dtype: HLO's name of the element type, "f32"; of several types, all of them: "bf16,f32".
    shapes: of the arrays that one device has when it is done; an all-to-all may hold one array for each device.
    bytes: of all these arrays together.
    axes: mesh axes along which it goes, in the mesh's order. Devices that differ in other axes exchange nothing. () if
        the mesh is not known, or if it joins groups of devices that no choice of axes makes.
    in_loop: whether it lies in a loop, so that one run may go through it more than once, or never.
    """

    kind: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    axes: tuple[str, ...] = ()
    in_loop: bool = False


def collectives(fn: Any, *args: Any, mesh: Mesh | None = None, **kwargs: Any) -> list[Collective]:
    """The collectives that XLA puts into `fn(*args, **kwargs)`, compiled and not run.

    fn: a function, with or without `jax.jit` round it; or what `jax.jit(...).lower(...)` or its `compile()` gave,
        without arguments.
    args, kwargs: arrays, or `jax.ShapeDtypeStruct`s in their place.
    mesh: None takes the one in use (`jax.set_mesh`), or else that of a program's own arguments. Raises MeshError if
        there are collectives on devices that it does not have.
    """
    if isinstance(fn, Lowered | Compiled):
        if args or kwargs:
            raise TypeError(f"a {type(fn).__name__} has its arguments already")
        compiled = fn.compile() if isinstance(fn, Lowered) else fn
    else:
        jitted: Callable[..., Any] = fn if hasattr(fn, "lower") else jax.jit(fn)
        if mesh is None:
            compiled = jitted.lower(*args, **kwargs).compile()  # type: ignore[attr-defined]
        else:
            with jax.set_mesh(mesh):
                compiled = jitted.lower(*args, **kwargs).compile()  # type: ignore[attr-defined]
    return read_collectives(compiled.as_text() or "", (mesh or _mesh_of(compiled)).shape)


def _mesh_of(compiled: Compiled) -> Mesh:
    meshes = [jax.sharding.get_mesh()]
    meshes += [getattr(sharding, "mesh", meshes[0]) for sharding in jax.tree.leaves(compiled.input_shardings)]
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def read_collectives(hlo: str, mesh: Mapping[str, int] | None = None) -> list[Collective]:
    """The collectives in `jax.stages.Compiled.as_text()`, in the order of the text. One in a loop's body counts once.

    mesh: its axes and their sizes, as in `Mesh.shape`; without one no axes are told. Raises MeshError if the text tells
        of more devices.

    >>> read_collectives("%all-to-all.2 = (f32[4,8]{1,0}, f32[4,8]{1,0}) all-to-all(%a, %b), channel_id=1")
    [Collective(kind='all-to-all', dtype='f32', shapes=((4, 8), (4, 8)), bytes=256, axes=(), in_loop=False)]
    """
    found: list[Collective] = []
    started: dict[str, str] = {}
    looped, computation = _looped(hlo), ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header["name"]
        if not (one := _INSTRUCTION.match(line)):
            continue
        if one["part"] == "-start":
            started[one["name"]] = one["rest"]
            continue
        rest = one["rest"]
        if one["part"] == "-done":
            # An asynchronous pair is read at its end, whose type has no operands; its groups stand at its start.
            rest = next((started[name] for name in _NAME.findall(rest) if name in started), "")
        axes = _axes(rest, dict(mesh)) if mesh else ()
        found.append(_collective(one["kind"], one["type"], axes, computation in looped))
    return found


def summarise(found: Sequence[Collective]) -> str:
    """A table of collectives, equal ones in one line, with the bytes of one of them on one device.

    >>> print(summarise(read_collectives("%a = f32[4,8]{1,0} all-gather(%b), replica_groups={{0,1}}", {"ep": 2})))
    count  kind        axes  in loop  bytes  arrays
        1  all-gather  ep    no         128  f32[4,8]
    """
    rows = [("count", "kind", "axes", "in loop", "bytes", "arrays")]
    for one, count in containers.Counter(found).items():
        arrays = " + ".join(
            (f"{times} x " if times > 1 else "") + f"{one.dtype}[{','.join(map(str, shape))}]"
            for shape, times in containers.Counter(one.shapes).items()
        )
        loop = "yes" if one.in_loop else "no"
        rows.append((str(count), one.kind, ",".join(one.axes) or "-", loop, f"{one.bytes:,}", arrays))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = {0, 4}
    lines = (
        "  ".join(
            cell.rjust(width) if at in numbers else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _collective(kind: str, result: str, axes: tuple[str, ...], in_loop: bool) -> Collective:
    arrays = [(array["dtype"], _numbers(array["shape"])) for array in _ARRAY.finditer(result)]
    return Collective(
        kind,
        ",".join(sorted({dtype for dtype, _ in arrays})),
        tuple(shape for _, shape in arrays),
        sum(-(-math.prod(shape) * _bits(dtype) // 8) for dtype, shape in arrays),
        axes,
        in_loop,
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def _bits(dtype: str) -> int:
    """Of one element: the first number in its name, f8e4m3fn and c64 alike; a pred takes a byte."""
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8


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
        if _LOOP.search(line):
            looped |= called
    waiting = list(looped)
    while waiting:
        further = calls[waiting.pop()] - looped
        looped |= further
        waiting += further
    return looped


def _axes(attributes: str, mesh: dict[str, int]) -> tuple[str, ...]:
    """The axes whose groups of devices are those of the instruction. A device's number is its place in the mesh."""
    shape = tuple(mesh.values())
    groups = _groups(attributes, math.prod(shape))
    known = math.prod(shape)
    if unknown := {device for group in groups for device in group if device >= known}:
        raise MeshError(
            f"a collective goes to device {max(unknown)} and the mesh {mesh} has {known}; give its own mesh"
        )
    places = [np.stack(np.unravel_index(np.array(group, int), shape)) for group in groups if group]
    moving = [bool(any((place != place[:, :1])[at].any() for place in places)) for at in range(len(shape))]
    axes = tuple(axis for axis, moves in zip(mesh, moving, strict=True) if moves)
    if "source_target_pairs=" in attributes:
        return axes
    along = [at for at, moves in enumerate(moving) if moves]
    size = math.prod(shape[at] for at in along)
    by_axes = np.moveaxis(np.arange(known).reshape(shape), along, range(len(shape) - len(along), len(shape)))
    made = {frozenset(group) for group in by_axes.reshape(-1, size).tolist()}
    return axes if made == {frozenset(group) for group in groups} else ()


def _groups(attributes: str, num_devices: int) -> list[tuple[int, ...]]:
    """Which devices an instruction joins, in any of the ways that HLO writes it; a permutation's pairs as they are.

    {{0,1},{2,3}}            the groups
    {}                       all devices
    [2,2]<=[4]               0, 1, 2, ... in that shape, a group a row
    [2,2]<=[2,2]T(1,0)       the same, after a transposition: {0,2}, {1,3}
    mesh['a'=2,'b'=2] {'b'}  those that differ in their place along b
    """
    if listed := _LISTED.search(attributes):
        return [_numbers(group) for group in re.findall(r"\{[\d,]*\}", listed["groups"])] or [tuple(range(num_devices))]
    if iota := _IOTA.search(attributes):
        return [tuple(group) for group in _iota(iota["ids"]).reshape(_numbers(iota["groups"])).tolist()]
    if on_mesh := _ON_MESH.search(attributes):
        return _groups_on_mesh(on_mesh)
    return []


def _iota(text: str) -> np.ndarray:
    """[2,4]T(1,0): 0, 1, 2, ... in that shape, transposed."""
    shape, _, order = text.partition("T")
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _groups_on_mesh(found: re.Match[str]) -> list[tuple[int, ...]]:
    """Of a mesh that the compiler made, whose axes need not be ours, or parts of axes: 'b':(2)4 is the 4 after 2."""
    sizes = {axis["name"]: int(axis["size"]) for axis in _MESH_AXIS.finditer(found["sizes"])}
    parts = {
        axis["name"]: (int(axis["before"] or 1), int(axis["part"] or sizes[axis["name"]]))
        for axis in _MESH_AXIS.finditer(found["axes"])
    }
    divided = [(name in parts, size, *parts.get(name, (1, size))) for name, size in sizes.items()]
    shape = tuple(itertools.chain(*((before, part, size // before // part) for _, size, before, part in divided)))
    along = [3 * at + 1 for at, (joined, *_) in enumerate(divided) if joined]
    listed = found["ids"]
    if listed is None:
        ids = np.arange(math.prod(shape))
    else:
        ids = _iota(listed) if listed.startswith("[") else np.array(_numbers(listed))
    by_group = np.moveaxis(ids.reshape(shape), along, range(len(shape) - len(along), len(shape)))
    return [tuple(group) for group in by_group.reshape(-1, math.prod(shape[at] for at in along)).tolist()]
