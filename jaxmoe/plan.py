"""`python -m jaxmoe.plan`: what a model needs on a mesh, and what it can do there, before there is a single device."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmoe.cli import add_layout_arguments, add_rebalance_arguments, add_speculate_argument, rebalance_config
from jaxmoe.engine.config import EngineConfig
from jaxmoe.errors import CheckpointError, JaxmoeError

if TYPE_CHECKING:
    from jaxmoe.planning.ahead import Compiled
    from jaxmoe.planning.deployment import Deployment

CONTEXT = 4096
# Listed here too, so that --help takes no second for JAX; a test holds them against `planning.hardware`.
DEVICES = ("a100", "h100", "h200", "b200", "gb200", "mi300x", "v4", "v5e", "v5p", "v6e", "v7x", "cpu")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jaxmoe.plan", description=__doc__)
    parser.add_argument(
        "--model",
        required=True,
        metavar="PRESET_OR_PATH",
        help="a published model, NAME[:scale=N][,key=value...], for example deepseek-v3; or a folder with config.json",
    )
    add_layout_arguments(parser)
    parser.set_defaults(dtype="bfloat16")
    parser.add_argument(
        "--device", help=f"what the mesh is made of: {', '.join(DEVICES)} (default: h100, or that of --aot)"
    )
    limits = EngineConfig()
    parser.add_argument(
        "--batch",
        "--max-batch",
        type=int,
        default=limits.max_batch,
        help="sequences decoding at once on a rank (%(default)s)",
    )
    parser.add_argument(
        "--context",
        "--max-context",
        type=int,
        default=CONTEXT,
        help="tokens of every sequence, prompt and answer (%(default)s)",
    )
    parser.add_argument(
        "--prefill-tokens",
        "--max-prefill-tokens",
        type=int,
        default=limits.max_prefill_tokens,
        help="prompt tokens a step on a rank (%(default)s)",
    )
    parser.add_argument("--page-size", type=int, default=limits.page_size, help="tokens of a KV page (%(default)s)")
    add_speculate_argument(parser)
    add_rebalance_arguments(parser)
    parser.add_argument("--json", action="store_true", help="the same figures for machines, in bytes and seconds")
    parser.add_argument(
        "--aot",
        metavar="tpu:NAME:TOPOLOGY",
        help="compile the real steps for a slice, for example tpu:v5p:4x4x8, and tell what its compiler says; "
        "needs jaxmoe[tpu], but no TPU",
    )
    args = parser.parse_args(argv)
    if args.json and args.aot:
        parser.error("--json and --aot exclude each other")
    return args


def main(argv: list[str] | None = None) -> int:
    """0 where the model fits, by the compiler's word too if it is asked; 1 where it does not, 2 for no plan at all."""
    args = parse(argv)
    try:
        return run(args)
    except JaxmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    # Imported late: JAX takes a second, and --help need not.
    from jaxmoe.models.decoder import Execution
    from jaxmoe.planning import report
    from jaxmoe.planning.ahead import parse_slice
    from jaxmoe.planning.deployment import Deployment, Subject
    from jaxmoe.planning.hardware import device_named
    from jaxmoe.planning.memory import memory
    from jaxmoe.planning.meshes import options, smallest
    from jaxmoe.planning.roofline import step_time
    from jaxmoe.sharding.mesh import MeshSpec

    chip, topology = parse_slice(args.aot) if args.aot else ("", "")
    device = device_named(args.device or chip or "h100")
    plan = Deployment(
        Subject.read(args.model, read_model(args.model), args.dtype, args.expert_weights),
        MeshSpec.parse(args.mesh, args.expert_axes),
        EngineConfig(
            page_size=args.page_size,
            max_batch=args.batch,
            max_context=args.context,
            max_prefill_tokens=args.prefill_tokens,
            rebalance=rebalance_config(args),
            speculate=args.speculate,
        ),
        Execution(strategy=args.dispatch, platform=device.platform),
        args.redundant_experts,
    )
    used = memory(plan, device)
    shapes = {"decode": plan.decode, "prefill": plan.prefill}
    steps = {name: step_time(plan, shape, device) for name, shape in shapes.items()}
    others = options(plan, device, plan.spec.num_devices)
    enough = None if used.fits else smallest(plan, device)
    if args.json:
        print(json.dumps(report.as_json(plan, device, used, steps, others, enough), indent=2))
        return 0 if used.fits else 1
    lines = report.title(plan, device) + report.memory_table(plan, used, device)
    for name, step in steps.items():
        lines += report.step_table(name.upper(), plan, shapes[name], step)
    lines += report.meshes_table(plan, others)
    fits = used.fits
    if args.aot:
        print("\n".join(lines), flush=True)
        compiled = compile_ahead(plan, chip, topology)
        lines = report.compiled_table(plan, used, args.aot, compiled)
        fits = fits and all(each.needed <= used.limit for each in compiled)
    if not used.fits:
        lines += ["", *report.verdict(plan, used, enough)]
    print("\n".join(lines), flush=True)
    return 0 if fits else 1


def compile_ahead(plan: "Deployment", chip: str, topology: str) -> "list[Compiled]":
    """The decode and prefill steps, by libtpu. Raises ConfigError or MeshError."""
    from jaxmoe.planning.ahead import compile_step, tpu_mesh, unloaded_steps

    mesh = tpu_mesh(chip, topology, plan.spec)
    steps = unloaded_steps(plan, mesh)
    return [compile_step(steps, shape, mesh) for shape in dict.fromkeys((plan.decode, plan.prefill))]


def read_model(name: str) -> dict[str, Any]:
    """`config.json` of a folder or of a preset. Raises CheckpointError or ConfigError."""
    from jaxmoe.models.presets import PRESETS, read_preset

    folder = Path(name)
    if name.partition(":")[0] in PRESETS and not folder.is_dir():
        return read_preset(name)
    if not folder.is_dir():
        raise CheckpointError(f"{name!r} is neither a folder nor a known model; use one of {', '.join(PRESETS)}")
    from jaxmoe.checkpoints.loader import read_config

    return read_config(folder)


if __name__ == "__main__":
    raise SystemExit(main())
