"""What XLA compiled: the collectives of a program, read from its HLO text."""

import dataclasses
import math
import re

KINDS = (
    "all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
# `%name = type kind(operands), ...`. An asynchronous pair is read at its end: the type of its start has operands too.
_INSTRUCTION = re.compile(
    rf"^\s*(?:ROOT )?%?[\w.-]+ = (?P<type>.*?) (?P<kind>{'|'.join(KINDS)})(?:-done)?\(", re.MULTILINE
)
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]\w*)\[(?P<shape>[\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction of a compiled program that moves data between devices.

    kind: one of KINDS.
    dtype: HLO's name of the element type, "f32"; of several types, all of them: "bf16,f32".
    shapes: of the arrays that one device has when it is done; an all-to-all may hold one array for each device.
    bytes: of all these arrays together.
    """

    kind: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int


def read_collectives(hlo: str) -> list[Collective]:
    """The collectives in `jax.stages.Compiled.as_text()`, in the order of the text. One in a loop's body counts once.

    >>> read_collectives("%all-to-all.2 = (f32[4,8]{1,0}, f32[4,8]{1,0}) all-to-all(%a, %b), channel_id=1")
    [Collective(kind='all-to-all', dtype='f32', shapes=((4, 8), (4, 8)), bytes=256)]
    """
    return [_collective(found["kind"], found["type"]) for found in _INSTRUCTION.finditer(hlo)]


def _collective(kind: str, result: str) -> Collective:
    arrays = [(array["dtype"], _shape(array["shape"])) for array in _ARRAY.finditer(result)]
    return Collective(
        kind,
        ",".join(sorted({dtype for dtype, _ in arrays})),
        tuple(shape for _, shape in arrays),
        sum(-(-math.prod(shape) * _bits(dtype) // 8) for dtype, shape in arrays),
    )


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",")) if text else ()


def _bits(dtype: str) -> int:
    """Of one element: the first number in its name, f8e4m3fn and c64 alike; a pred takes a byte."""
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8
