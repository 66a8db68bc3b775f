"""`python -m jaxmoe.bench`: what an engine's steps take, how far they are from what the machine allows, and why."""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmoe.cli import (
    StartProgress,
    add_limit_arguments,
    add_model_arguments,
    add_profile_arguments,
    add_random_weights,
    add_speculate_argument,
    engine_config,
    model_options,
    profile_folder,
    use_compile_cache,
)
from jaxmoe.errors import JaxmoeError

if TYPE_CHECKING:
    from jaxmoe.engine.engine import Engine
    from jaxmoe.measuring.phases import Driver, Phase

PHASES = "prefill:512,prefill:2048,decode:1,decode:8,decode:32"
CONTEXT, PREFILLS, DECODES = 256, 5, 24


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jaxmoe.bench", description=__doc__)
    add_model_arguments(parser)
    add_random_weights(parser)
    add_speculate_argument(parser)
    parser.add_argument(
        "--phases",
        default=PHASES,
        help="what to time on each rank: prefill of so many tokens, decode of so many sequences (default: %(default)s)",
    )
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens of decoding sequences (%(default)s)")
    parser.add_argument("--prefills", type=int, default=PREFILLS, help="how often a prefill is timed (%(default)s)")
    parser.add_argument("--decodes", type=int, default=DECODES, help="how many decode steps are timed (%(default)s)")
    parser.add_argument(
        "--floor",
        action="store_true",
        help="measure the machine too, and show what each phase must take on it and where the rest goes",
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="compile what a server with these limits does, show what it cost, and end",
    )
    add_profile_arguments(parser)
    add_limit_arguments(parser)
    args = parser.parse_args(argv)
    if args.model and args.random_weights:
        parser.error("--model and --random-weights exclude each other")
    if min(args.prefills, args.decodes) < 1:
        parser.error("--prefills and --decodes must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """0, or 2 for what cannot be measured."""
    args = parse(argv)
    try:
        return run(args)
    except JaxmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    # Imported late: JAX takes a second, and --help need not.
    from jaxmoe.api import load
    from jaxmoe.engine.engine import Engine
    from jaxmoe.engine.programs import table
    from jaxmoe.measuring.phases import Phase

    phases = [Phase.parse(text) for text in args.phases.split(",")]
    config, folder = engine_config(args, warm_up=args.compiled, speculate=args.speculate), profile_folder(args)
    use_compile_cache(args.compile_cache)
    progress = StartProgress()
    model = load(args.model, random_weights=args.random_weights, progress=progress, **model_options(args))
    engine = Engine(model, config, progress)
    print(f"{model.describe()}; {engine.describe()}", file=sys.stderr, flush=True)
    if args.compiled:
        print("\n".join([engine.describe_programs(), *table(engine.programs)]))
        return 0
    if args.floor or folder:
        with contextlib.ExitStack() as ending:
            folder = folder or Path(ending.enter_context(tempfile.TemporaryDirectory()))
            profile_phases(args, engine, phases, folder)
    else:
        time_phases(args, engine, phases)
    return 0


def time_phases(args: argparse.Namespace, engine: "Engine", phases: "list[Phase]") -> None:
    from jaxmoe.measuring.floors import phases_table
    from jaxmoe.measuring.phases import Driver

    driver = Driver(engine)
    possible = _possible(driver, phases, args.context)
    print("\n".join(phases_table([driver.run(phase, args.context, _times(args, phase)) for phase in possible])))


def profile_phases(args: argparse.Namespace, engine: "Engine", phases: "list[Phase]", folder: Path) -> None:
    """Times each phase, then records it; prints floors, or where the time went."""
    from jaxmoe.measuring import floors, trace
    from jaxmoe.measuring.breakdown import break_down, table
    from jaxmoe.measuring.machine import measure_machine
    from jaxmoe.measuring.phases import Driver

    machine = measure_machine() if args.floor else None
    driver, found, timed = Driver(engine), [], []
    for phase in _possible(driver, phases, args.context):
        timed.append(driver.run(phase, args.context, _times(args, phase)))
        into = folder / f"{phase.kind}-{phase.size}"
        steps = 1 if phase.kind == "prefill" else args.profile_steps
        recorded = driver.run(phase, args.context, steps, trace.step, trace.recording(into))
        where = break_down(trace.read(into), engine.programs)
        if machine:
            found.append(
                floors.floor_of(
                    engine.model,
                    machine,
                    timed[-1],
                    recorded,
                    where,
                    args.page_size,
                    args.redundant_experts,
                    args.speculate,
                )
            )
        if args.profile:
            print("\n".join([f"{phase}, profile in {into}:", *table(where), ""]), flush=True)
    if machine is None:
        print("\n".join(floors.phases_table(timed)))
        return
    for each in found:
        print("\n".join([*floors.parts_table(each), ""]))
    print("\n".join([machine.describe(), *floors.cache_notes(machine, engine.model)]))
    print("\n".join(floors.summary_table(found)))


def _times(args: argparse.Namespace, phase: "Phase") -> int:
    times: int = args.prefills if phase.kind == "prefill" else args.decodes
    return times


def _possible(driver: "Driver", phases: "list[Phase]", context: int) -> "list[Phase]":
    """Those that the engine's limits allow; tells of the others."""
    refused = {phase: driver.refusal(phase, context) for phase in phases}
    for phase, why in refused.items():
        if why:
            print(f"left out: {phase}; {why}", file=sys.stderr)
    return [phase for phase in phases if not refused[phase]]


if __name__ == "__main__":
    raise SystemExit(main())
