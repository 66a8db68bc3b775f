"""Where the time of recorded steps went: to every scope of the model, between operations, and on the host."""

import bisect
import collections
import dataclasses
import functools
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from jaxmoe.engine.programs import Program
from jaxmoe.measuring.scopes import EXCHANGE, PARTS, part_of, scopes
from jaxmoe.measuring.trace import Op, Recording

K = TypeVar("K")
NS = 1e-9
NO_SCOPE = "(no scope)"
LONGEST = 8
BETWEEN, HOST = "between operations", "host"


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """Seconds of all recorded steps together; operations, `between` and `host` add up to `seconds`.

    ops: by program, scope and operation; of several devices that compute at once, each has its share of the time, and
        collectives have what is left while none does.
    between: from the first operation of a step to its last while none ran: launches, and waiting for them.
    host: the rest, in which no device had anything to do.
    runs: launches of each program.
    """

    steps: int
    seconds: float
    ops: Mapping[tuple[str, str, str], float]
    between: float
    host: float
    runs: Mapping[str, int]

    @functools.cached_property
    def parts(self) -> dict[str, float]:
        """Seconds by part of the model, in the order of PARTS."""
        found = dict.fromkeys(PARTS, 0.0)
        for (_, scope, _), seconds in self.ops.items():
            found[part_of(scope)] += seconds
        return found

    @property
    def shares(self) -> dict[str, float]:
        """Of each part, BETWEEN and HOST in all the time."""
        everything = {**self.parts, BETWEEN: self.between, HOST: self.host}
        return {name: seconds / self.seconds for name, seconds in everything.items()}


def break_down(recording: Recording, programs: Iterable[Program]) -> Breakdown:
    """programs: those that ran, or more. Operations of others count as having no scope."""
    scopes_of = _ScopesOf(programs)
    found: collections.defaultdict[tuple[str, str, str], float] = collections.defaultdict(float)
    runs: collections.defaultdict[str, set[int]] = collections.defaultdict(set)
    starts = [op.start for op in recording.ops]
    busy = active = 0.0
    for begin, end in recording.steps:
        ops = recording.ops[bisect.bisect_left(starts, begin) : bisect.bisect_right(starts, end)]
        if not ops:
            continue
        active += max(op.end for op in ops) - ops[0].start
        for op in ops:
            runs[op.program].add(op.run)
        for op, share in _shares(ops, scopes_of):
            busy += share
            found[op.program, scopes_of(op), op.name] += share * NS
    seconds = sum(end - begin for begin, end in recording.steps)
    return Breakdown(
        len(recording.steps),
        seconds * NS,
        dict(found),
        (active - busy) * NS,
        (seconds - active) * NS,
        {program: len(each) for program, each in runs.items()},
    )


class _ScopesOf:
    """Scopes by operation; a program's text is read when the first of its operations comes."""

    def __init__(self, programs: Iterable[Program]) -> None:
        self._programs = {program.name: program for program in programs}
        self._read: dict[str, dict[str, str]] = {}

    def __call__(self, op: Op) -> str:
        if op.program not in self._read:
            program = self._programs.get(op.program)
            self._read[op.program] = scopes(program.compiled.as_text()) if program else {}
        return self._read[op.program].get(op.name, "")


def _shares(ops: Sequence[Op], scopes_of: _ScopesOf) -> Iterator[tuple[Op, float]]:
    """Nanoseconds for which each operation is accountable.

    On a device it is the one begun last, so that a loop has what its operations leave. Of several devices all that
    compute have equal parts; those in a collective, which mostly wait, only while nobody computes.
    """
    by_device: dict[int, list[Op]] = collections.defaultdict(list)
    for op in ops:
        by_device[op.device].append(op)
    if len(by_device) == 1:
        yield from ((op, end - start) for start, end, op in _begun_last(ops))
        return
    changes = []
    for device, own in by_device.items():
        for start, end, op in _begun_last(own):
            waits = scopes_of(op).endswith(EXCHANGE)
            changes += [(start, 1, waits, device, op), (end, 0, waits, device, op)]
    computing: dict[int, Op] = {}
    waiting: dict[int, Op] = {}
    before = 0.0
    for time, begins, waits, device, op in sorted(changes):
        running = computing or waiting
        for each in running.values():
            yield each, (time - before) / len(running)
        before = time
        if begins:
            (waiting if waits else computing)[device] = op
        else:
            del (waiting if waits else computing)[device]


def _begun_last(ops: Sequence[Op]) -> Iterator[tuple[float, float, Op]]:
    """Start and end of the stretches in which an operation is the one begun last of those running."""
    running: list[tuple[float, int, Op]] = []  # a heap, the one begun last on top
    now = 0.0
    for number, op in enumerate([*ops, None]):
        until = op.start if op else float("inf")
        while running and now < until:
            top = running[0][2]
            stop = min(top.end, until)
            if stop > now:
                yield now, stop, top
                now = stop
            if top.end <= now:
                heapq.heappop(running)
        if op:
            now = max(now, op.start)
            heapq.heappush(running, (-op.start, -number, op))


def table(found: Breakdown) -> list[str]:
    """Programs, scopes and the longest operations: milliseconds, and the share in all steps; the longest first."""
    if not found.steps:
        return ["  no step was recorded"]
    lines = [f"  {found.steps} steps of {found.seconds / found.steps * 1e3:.3f} ms"]
    of_program: collections.defaultdict[str, float] = collections.defaultdict(float)
    of_scope: collections.defaultdict[str, float] = collections.defaultdict(float)
    for (program, scope, _), seconds in found.ops.items():
        of_program[program] += seconds
        of_scope[scope or NO_SCOPE] += seconds
    lines += ["", f"  {'program':<52}{'runs':>6}{'ms each':>10}{'share':>8}"]
    for program, seconds in _longest(of_program):
        runs = found.runs[program]
        lines.append(f"  {program:<52}{runs:>6}{seconds / runs * 1e3:>10.3f}{seconds / found.seconds:>8.1%}")
    lines += ["", f"  {'scope':<40}{'part':<16}{'ms a step':>10}{'share':>8}"]
    rows = [(scope, "" if scope == NO_SCOPE else part_of(scope), seconds) for scope, seconds in _longest(of_scope)]
    rows += [(BETWEEN, "", found.between), (HOST, "", found.host)]
    for scope, part, seconds in rows:
        lines.append(f"  {scope:<40}{part:<16}{seconds / found.steps * 1e3:>10.3f}{seconds / found.seconds:>8.1%}")
    lines += ["", f"  {'operation':<72}{'ms a step':>10}{'share':>8}  scope"]
    for (program, scope, name), seconds in _longest(found.ops)[:LONGEST]:
        each, share = seconds / found.steps * 1e3, seconds / found.seconds
        lines.append(f"  {f'{name} of {program}':<72}{each:>10.3f}{share:>8.1%}  {scope}")
    return lines


def _longest(seconds: Mapping[K, float]) -> list[tuple[K, float]]:
    return sorted(seconds.items(), key=lambda item: -item[1])
