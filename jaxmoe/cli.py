"""What the front doors share: arguments that name a model and a mesh, and start-up one can watch."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

COMPILE_CACHE = Path.home() / ".cache" / "jaxmoe" / "compiled"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="checkpoint folder, or an embedded model: demo:mixtral (the default), demo:deepseek-v3, demo:llama4",
    )
    add_layout_arguments(parser)
    parser.add_argument(
        "--kernels",
        default="auto",
        choices=("auto", "native", "xla"),
        help="on a CPU, kernels compiled for it, or XLA's own; auto takes native ones where there is a C++ compiler "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--compile-cache",
        metavar="DIR",
        default=str(COMPILE_CACHE),
        help="where compiled programs are kept for the next start; '' keeps none (default: %(default)s)",
    )


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """How a model lies on devices and computes there."""
    parser.add_argument("--mesh", default="dp=1,ep=1", help="devices by axis: dp=D,ep=E[,tp=T] (default: %(default)s)")
    parser.add_argument(
        "--expert-axes",
        default="ep",
        choices=("ep", "dp,ep"),
        help="spread the experts over ep, with a copy for each dp, or over all of dp and ep (default: %(default)s)",
    )
    parser.add_argument(
        "--redundant-experts",
        type=int,
        default=0,
        metavar="R",
        help="further replicas of experts, in all (default: as many as fill the devices evenly)",
    )
    parser.add_argument(
        "--dispatch",
        default="auto",
        choices=("auto", "dense", "replicate", "all_to_all", "ragged_all_to_all"),
        help="how tokens meet their experts; auto takes the cheapest for each program (default: %(default)s)",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="to compute in")


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `jaxmoe.load` that the arguments name, beside the model's own."""
    from jaxmoe.models.decoder import Execution

    return {
        "mesh": args.mesh,
        "dtype": args.dtype,
        "kernels": args.kernels,
        "expert_axes": args.expert_axes,
        "redundant_experts": args.redundant_experts,
        "execution": Execution(strategy=args.dispatch),
    }


def use_compile_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`, unless JAX's own settings already name a place or `folder` is ''."""
    import jax

    if folder and not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class StartProgress:
    """A bar a stage on stderr, with the time each took; `report` is told every change in words."""

    def __init__(self, report: Any = lambda text: None) -> None:
        self._report = report
        self._stage = ""
        self._bar: tqdm[Any] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self.close()
            self._stage, self._began = stage, time.monotonic()
            unit = "B" if stage.endswith("weights") else ""
            self._bar = tqdm(
                total=total, desc=f"{stage:<16}", unit=unit, unit_scale=bool(unit), file=sys.stderr, leave=True
            )
        assert self._bar is not None
        self._bar.update(done - self._bar.n)
        self._report(f"{stage}: {100 * done // max(1, total)}%")
        if done >= total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar, self._stage = None, ""
