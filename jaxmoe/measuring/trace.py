"""Recording steps with JAX's profiler, and reading back which operation ran when."""

import bisect
import collections
import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

STEP = "engine_step"


class Op(NamedTuple):
    """One run of one operation, in nanoseconds since the recording began. program: name of its HLO module.

    run: tells one launch of the program from the next.
    """

    start: float
    end: float
    device: int
    program: str
    name: str
    run: int


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a trace says of an engine's steps. steps: start and end of each, in the nanoseconds of `ops`."""

    steps: tuple[tuple[float, float], ...]
    ops: tuple[Op, ...]


def start(folder: Path) -> None:
    """Begins to record into `folder`, without Python's own calls: they would slow the steps down several times."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(folder, profiler_options=options)


stop = jax.profiler.stop_trace


@contextlib.contextmanager
def recording(folder: Path) -> Iterator[None]:
    """Records what runs inside into `folder`, for `read` and for people's tools."""
    start(folder)
    try:
        yield
    finally:
        stop()


def step(number: int) -> jax.profiler.StepTraceAnnotation:
    """The context in which a step runs, so that it is found in a trace."""
    return jax.profiler.StepTraceAnnotation(STEP, step_num=number)


def read(folder: Path) -> Recording:
    """The newest recording under `folder`. Raises FileNotFoundError if there is none."""
    files = sorted(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"{folder} holds no recording (plugins/profile/*/*.xplane.pb)")
    with warnings.catch_warnings():
        # Python 3.12 has one for how JAX makes the type of events' stats; made an error, it aborts the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        return _read(files[-1])


def _read(file: Path) -> Recording:
    steps: list[tuple[float, float]] = []
    ops: list[Op] = []
    # An operation and its end, which may be recorded by another thread, share a number.
    launches: dict[int, int] = {}
    ends: dict[int, tuple[float, str]] = {}
    starts: dict[str, list[float]] = collections.defaultdict(list)  # of operations, by line
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            where = f"{plane.name} {line.name}"
            for event in line.events:
                if event.name == STEP:
                    steps.append((event.start_ns, event.start_ns + event.duration_ns))
                    continue
                stats = dict(event.stats)
                if "hlo_op" in stats and "hlo_module" in stats:
                    if (tie := stats.get("_p")) is not None:
                        launches[tie] = len(ops)
                    starts[where].append(event.start_ns)
                    ops.append(
                        Op(
                            event.start_ns,
                            event.start_ns + event.duration_ns,
                            int(stats.get("device_ordinal", 0)),
                            str(stats["hlo_module"]),
                            str(stats["hlo_op"]),
                            int(stats.get("run_id", 0)),
                        )
                    )
                elif event.name.startswith("end: ") and "_c" in stats:
                    ends[stats["_c"]] = (event.start_ns, where)
    for times in starts.values():
        times.sort()
    for tie, index in launches.items():
        if tie in ends:
            ops[index] = _until_done(ops[index], *ends[tie], starts)
    return Recording(tuple(sorted(steps)), tuple(sorted(ops)))


def _until_done(op: Op, end: float, where: str, starts: Mapping[str, list[float]]) -> Op:
    """On a CPU, an operation that left its work to other threads, up to the end of that work.

    Its event is over with the launch. Whichever thread completes the work goes on with the operations that wait for
    it before it records the end, so the first of these on that thread tells better.
    """
    following = starts[where]
    index = bisect.bisect_left(following, op.end)
    first = following[index] if index < len(following) else end
    return op._replace(end=max(op.end, min(first, end)))
