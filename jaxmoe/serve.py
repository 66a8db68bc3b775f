"""`python -m jaxmoe.serve`: a checkpoint as a gRPC service (vllm.grpc.engine.VllmEngine) that streams tokens."""

import argparse
import contextlib
import dataclasses
import sys
import time

from jaxmoe.cli import (
    StartProgress,
    add_limit_arguments,
    add_model_arguments,
    add_profile_arguments,
    add_random_weights,
    add_rebalance_arguments,
    add_speculate_argument,
    engine_config,
    model_options,
    profile_folder,
    rebalance_config,
    use_compile_cache,
)
from jaxmoe.engine.config import EngineConfig
from jaxmoe.errors import JaxmoeError
from jaxmoe.serving import logs, server
from jaxmoe.serving.link import Bound, ModelInfo


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jaxmoe.serve", description=__doc__)
    add_model_arguments(parser)
    add_random_weights(parser)
    parser.add_argument("--served-model-name", help="the name told to clients (default: the folder's)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=50051, help="0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--insecure-bind",
        action="store_true",
        help="allow a --host beyond this machine without TLS, for a network that something else protects",
    )
    parser.add_argument("--tls-cert", metavar="PEM", help="certificate to serve with over TLS; needs --tls-key")
    parser.add_argument("--tls-key", metavar="PEM", help="its private key")
    parser.add_argument("--tls-client-ca", metavar="PEM", help="take only clients with a certificate of this authority")
    parser.add_argument(
        "--auth-token-file", metavar="FILE", help="take only clients that send one of these bearer tokens, one a line"
    )
    parser.add_argument("--no-reflection", action="store_true", help="do not describe the services to clients that ask")
    add_limit_arguments(parser)
    queue = EngineConfig().max_queue
    parser.add_argument("--max-queue", type=int, default=queue, help="waiting requests, over all (%(default)s)")
    parser.add_argument(
        "--max-client-requests", type=int, default=0, help="that one client may have open; 0: no limit (%(default)s)"
    )
    parser.add_argument(
        "--drain-timeout", type=float, default=30.0, help="seconds to finish after SIGTERM (%(default)s)"
    )
    add_speculate_argument(parser)
    add_rebalance_arguments(parser)
    parser.add_argument(
        "--record-routing", metavar="FILE", help="write the experts of the first tokens there at the end, to replay"
    )
    parser.add_argument(
        "--routed-experts", action="store_true", help="tell who asks which experts each token of a request went to"
    )
    parser.add_argument(
        "--save-placement", metavar="FILE", help="where jaxmoe.v1.Admin/SavePlacement writes which slot holds what"
    )
    add_profile_arguments(parser)
    parser.add_argument("--metrics-port", type=int, help="serve /metrics and /healthz over HTTP; 0 takes a free one")
    parser.add_argument("--metrics-host", default="127.0.0.1", help="address for these (default: %(default)s)")
    parser.add_argument("--otlp-endpoint", metavar="URL", help="send traces to this collector: http://127.0.0.1:4318")
    parser.add_argument("--log-level", default="warning", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--log-format", default="text", choices=logs.FORMATS, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.model and args.random_weights:
        parser.error("--model and --random-weights exclude each other")
    return args


def server_config(args: argparse.Namespace) -> server.ServerConfig:
    """Raises ConfigError."""
    given = vars(args)
    fields = (field.name for field in dataclasses.fields(server.ServerConfig))
    options = {name: given[name] for name in fields if name in given}
    return server.ServerConfig(**options, reflection=not args.no_reflection)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    logs.configure(args.log_level.upper(), args.log_format)
    began = time.monotonic()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def tell_bound(bound: Bound) -> None:
        if bound.metrics:
            say(f"metrics on {bound.metrics}")
        say(f"listening on {bound.address}, not ready yet")

    def build_engine(report: server.Report) -> server.Served:
        # Imported once the port is open: JAX takes a second.
        from jaxmoe.api import load
        from jaxmoe.engine.engine import Engine
        from jaxmoe.serving.garbage import pass_over_what_is_here
        from jaxmoe.serving.orders import Orders
        from jaxmoe.serving.tables import Tables

        use_compile_cache(args.compile_cache)
        progress = StartProgress(report)
        report("loading weights")
        options = model_options(args)
        recording = args.record_routing is not None
        options["execution"] = dataclasses.replace(
            options["execution"], record_routing=recording or args.routed_experts
        )
        model = load(args.model, random_weights=args.random_weights, progress=progress, **options)
        engine = Engine(model, config, progress)
        if recording:
            ending.callback(engine.save_routing, args.record_routing)
        else:
            engine.forget_routing()
        say(f"{model.describe()}; {engine.describe()}")
        say(engine.describe_programs())
        info = ModelInfo(
            model_path=str(model.folder.resolve()) if model.folder else "",
            served_model_name=args.served_model_name or model.name,
            model_type=model.config.model_type,
            architectures=model.config.architectures,
            vocab_size=model.config.vocab_size,
            max_context=engine.max_context,
            eos_token_ids=model.eos_token_ids,
            bos_token_id=model.config.bos_token_id,
            pad_token_id=model.config.pad_token_id,
            max_queue=config.max_queue,
            max_running=config.max_batch * model.num_ranks,
            num_ranks=model.num_ranks,
            page_size=config.page_size,
            prefix_cache=config.prefix_cache,
            mesh=str(model.mesh_spec),
            dtype=args.dtype,
            default_sampling_params=model.recommended_sampling,
            invalid=model.invalid,
            routed_experts=args.routed_experts,
            mixture_layers=tuple(model.config.stacks["moe"]),
        )
        pass_over_what_is_here()
        if folder is None:
            return server.Served(engine, info, Tables(engine), Orders(engine, save_placement=args.save_placement))
        from jaxmoe.measuring.profile import ProfiledEngine

        profiled = ProfiledEngine(engine, folder, args.profile_steps, say)
        ending.callback(profiled.close)
        return server.Served(profiled, info, Tables(engine), Orders(engine, profiled, args.save_placement))

    try:
        config = engine_config(
            args, max_queue=args.max_queue, rebalance=rebalance_config(args), speculate=args.speculate
        )
        folder = profile_folder(args, least=0)
        with contextlib.ExitStack() as ending:
            return server.run(
                build_engine,
                server_config(args),
                on_bound=tell_bound,
                on_ready=lambda address: say(f"ready on {address} after {time.monotonic() - began:.1f} s"),
            )
    except JaxmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
