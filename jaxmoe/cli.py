"""What the front doors share: arguments that name a model and a mesh, and start-up one can watch."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxmoe.engine.config import EngineConfig, Rebalance
from jaxmoe.errors import ConfigError

COMPILE_CACHE = Path.home() / ".cache" / "jaxmoe" / "compiled"
PROFILE_STEPS = 32


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="checkpoint folder, or an embedded model: demo:mixtral (the default), demo:deepseek-v3, demo:llama4",
    )
    add_layout_arguments(parser)
    parser.add_argument(
        "--placement", metavar="FILE", help="which slot holds which expert at the start, as an engine saved it"
    )
    parser.add_argument(
        "--simulate-routing",
        metavar="KIND",
        help="for benchmarks, send tokens elsewhere than the routers do, which makes answers invalid: "
        "uniform, normal, zipf:S, hot:N,SHARE, drift:S,CALLS or trace:FILE",
    )
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


def add_access_arguments(parser: argparse.ArgumentParser) -> None:
    """How to reach a server; see `access_options`."""
    parser.add_argument("--token-file", metavar="FILE", type=Path, help="of a bearer token, if the server asks for one")
    parser.add_argument(
        "--tls", action="store_true", help="the server speaks TLS, with a certificate the system trusts"
    )
    parser.add_argument("--tls-ca", metavar="PEM", help="or with one of this authority")
    parser.add_argument("--tls-cert", metavar="PEM", help="the certificate to show to the server, with --tls-key")
    parser.add_argument("--tls-key", metavar="PEM", help="its private key")


def access_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `jaxmoe.client.Access` that the arguments name. Raises ConfigError."""
    token = None
    if args.token_file is not None:
        try:
            token = args.token_file.read_text().strip()
        except OSError as error:
            raise ConfigError(
                f"--token-file {args.token_file}: {error.strerror}; name a file that can be read"
            ) from error
    named = ("tls", "tls_ca", "tls_cert", "tls_key")
    return {"token": token, **{name: getattr(args, name) for name in named}}


def add_random_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--random-weights",
        metavar="PRESET",
        help="a published model with weights drawn at random instead, scaled down as told: "
        "NAME[:scale=N][,key=value...], for example deepseek-v3:scale=16,num_hidden_layers=6",
    )


def add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    """The limits within which an engine batches; see `engine_config`."""
    limits = EngineConfig()
    parser.add_argument(
        "--max-batch", type=int, default=limits.max_batch, help="sequences at once on a rank (%(default)s)"
    )
    parser.add_argument(
        "--max-context", type=int, help="tokens of prompt and answer together (default: the model's limit)"
    )
    parser.add_argument(
        "--max-prefill-tokens",
        type=int,
        default=limits.max_prefill_tokens,
        help="prompt tokens a step on a rank (%(default)s)",
    )
    parser.add_argument(
        "--max-batch-tokens",
        type=int,
        help="tokens a step on a rank, those that decode and prompts' together; less is smoother, more is faster "
        "(default: --max-batch and --max-prefill-tokens)",
    )
    parser.add_argument(
        "--no-prefix-cache", action="store_true", help="compute every prompt anew, even what others began with"
    )
    parser.add_argument(
        "--no-overlap", action="store_true", help="begin a step only when the tokens of the one before are read"
    )
    parser.add_argument("--page-size", type=int, default=limits.page_size, help="tokens of a KV page (%(default)s)")
    parser.add_argument("--kv-pages", type=int, help="KV pages of a rank (default: from memory, full batch at most)")


def add_speculate_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--speculate",
        choices=("mtp",),
        help="have the checkpoint's layer for multi-token prediction draft a token a step; answers stay the same",
    )


def add_rebalance_arguments(parser: argparse.ArgumentParser) -> None:
    """See `rebalance_config`."""
    default = Rebalance()
    group = parser.add_argument_group("experts that move while it serves")
    group.add_argument("--rebalance", action="store_true", help="keep room for it; without more, only when asked to")
    group.add_argument(
        "--rebalance-interval", type=int, metavar="CALLS", default=0, help="look at the loads every so many calls"
    )
    group.add_argument(
        "--rebalance-threshold",
        type=float,
        metavar="SHARE",
        default=0.0,
        help="move when balancedness is below this share of its ceiling",
    )
    group.add_argument(
        "--rebalance-budget",
        type=float,
        metavar="MIB",
        default=default.bytes_per_step / 2**20,
        help="of weights that move in a step, at most (%(default)s)",
    )
    group.add_argument(
        "--rebalance-deadline",
        type=float,
        metavar="SECONDS",
        default=default.deadline,
        help="after which what has not moved stays (%(default)s)",
    )
    group.add_argument(
        "--coverage", action="store_true", help="keep each expert on two devices, so that any one of them may go"
    )


def rebalance_config(args: argparse.Namespace) -> Rebalance | None:
    """From the arguments of `add_rebalance_arguments`; None if none asks for it. Raises ConfigError, either way."""
    config = Rebalance(
        interval=args.rebalance_interval,
        threshold=args.rebalance_threshold,
        bytes_per_step=int(args.rebalance_budget * 2**20),
        deadline=args.rebalance_deadline,
        devices_at_least=1 + args.coverage,
    )
    asked = args.rebalance or args.rebalance_interval or args.rebalance_threshold or args.coverage
    return config if asked else None


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        metavar="DIR",
        type=Path,
        help="record steps into DIR, for TensorBoard and Perfetto, and sum them up",
    )
    parser.add_argument(
        "--profile-steps", type=int, default=PROFILE_STEPS, help="how many of them (default: %(default)s)"
    )


def profile_folder(args: argparse.Namespace, least: int = 1) -> Path | None:
    """Where `--profile` asks to record, made if need be. Raises ConfigError if that cannot be.

    least: steps to record.
    """
    if args.profile is None:
        return None
    if args.profile_steps < least:
        raise ConfigError(f"--profile-steps {args.profile_steps} must be at least {least}")
    try:
        args.profile.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--profile {args.profile}: {error.strerror}; name a folder that can be written") from error
    folder: Path = args.profile
    return folder


def engine_config(args: argparse.Namespace, **options: Any) -> EngineConfig:
    """From the arguments of `add_limit_arguments`, with further fields. Raises ConfigError."""
    return EngineConfig(
        page_size=args.page_size,
        pages_per_rank=args.kv_pages,
        max_batch=args.max_batch,
        max_context=args.max_context,
        max_batch_tokens=args.max_batch_tokens,
        max_prefill_tokens=args.max_prefill_tokens,
        prefix_cache=not args.no_prefix_cache,
        overlap=not args.no_overlap,
        **options,
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
    parser.add_argument(
        "--expert-weights",
        default="same",
        choices=("same", "bfloat16", "int8", "float8"),
        help="what experts' weights are kept in; 8 bits have a scale for every output channel of every expert "
        "(default: the dtype that is computed in)",
    )


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `jaxmoe.load` that the arguments name, beside the model's own."""
    from jaxmoe.models.decoder import Execution

    return {
        "mesh": args.mesh,
        "dtype": args.dtype,
        "kernels": args.kernels,
        "expert_weights": args.expert_weights,
        "expert_axes": args.expert_axes,
        "redundant_experts": args.redundant_experts,
        "placement": args.placement,
        "simulate_routing": args.simulate_routing,
        "execution": Execution(strategy=args.dispatch),
    }


def use_compile_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`, unless JAX's own settings already name a place or `folder` is ''."""
    import jax

    settings: Any = jax.config  # whose options some of its releases declare, and some do not
    if folder and not settings.jax_compilation_cache_dir:
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
