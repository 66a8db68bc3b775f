"""`python -m jaxmoe.top`: what a server is doing, at the terminal: rates, latencies, load of its ranks and experts."""

import argparse
import collections
import contextlib
import math
import sys
from collections.abc import Generator, Sequence
from time import sleep
from typing import NamedTuple

import grpc

from jaxmoe.cli import access_options, add_access_arguments
from jaxmoe.client import Access, as_jaxmoe_error
from jaxmoe.errors import JaxmoeError
from jaxmoe.serving.proto import admin_pb2 as pb
from jaxmoe.serving.proto.admin_pb2_grpc import AdminStub

_CLEAR = "\x1b[H\x1b[J"
_BLOCKS = " ▁▂▃▄▅▆▇█"
_LATENCIES = (
    ("first token", "vllm:time_to_first_token_seconds"),
    ("between tokens", "vllm:inter_token_latency_seconds"),
    ("whole request", "vllm:e2e_request_latency_seconds"),
    ("in the queue", "vllm:request_queue_time_seconds"),
    ("step", "jaxmoe:step_seconds"),
    ("of it, host", "jaxmoe:step_host_seconds"),
)
_MILLISECONDS = 1000.0
_COLUMNS = 64


class Snapshot:
    """All samples of one moment."""

    def __init__(self, metrics: pb.Metrics) -> None:
        self.time = metrics.time
        self._samples: dict[str, list[pb.Sample]] = collections.defaultdict(list)
        for sample in metrics.samples:
            self._samples[sample.name].append(sample)

    def total(self, name: str) -> float:
        """Summed up over all labels; 0 if there is no such metric yet."""
        return sum(sample.value for sample in self._samples[name])

    def label(self, name: str, label: str) -> str:
        """The label of the one sample that has it; "" if there is none."""
        return next((sample.labels[label] for sample in self._samples[name] if label in sample.labels), "")

    def by(self, name: str, label: str) -> list[float]:
        """Values in the order of a numeric label."""
        return [sample.value for sample in sorted(self._samples[name], key=lambda sample: int(sample.labels[label]))]

    def buckets(self, name: str) -> list[tuple[float, float]]:
        """A histogram: upper bound, and how many are not above it."""
        return sorted((float(sample.labels["le"]), sample.value) for sample in self._samples[f"{name}_bucket"])


class Latency(NamedTuple):
    """Of so many values, in seconds."""

    values: float
    mean: float
    median: float
    p99: float


def latency(before: Snapshot, now: Snapshot, name: str) -> Latency | None:
    """What a histogram took in between two moments; None if that is nothing."""
    count = now.total(f"{name}_count") - before.total(f"{name}_count")
    if count <= 0:
        return None
    earlier = dict(before.buckets(name))
    buckets = [(bound, value - earlier.get(bound, 0.0)) for bound, value in now.buckets(name)]
    mean = (now.total(f"{name}_sum") - before.total(f"{name}_sum")) / count
    return Latency(count, mean, quantile(buckets, 0.5), quantile(buckets, 0.99))


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float:
    """As Prometheus estimates it: between the bounds of its bucket in proportion.

    >>> quantile([(1.0, 2.0), (2.0, 4.0), (math.inf, 4.0)], 0.75)
    1.5
    """
    rank, below, before = share * buckets[-1][1], 0.0, 0.0
    for bound, count in buckets:
        if count >= rank:
            if math.isinf(bound):
                return below
            return below + (bound - below) * (rank - before) / (count - before) if count > before else bound
        below, before = bound, count
    return below


def render(address: str, before: Snapshot, now: Snapshot) -> str:
    """A screenful about the time between two moments."""
    seconds = max(1e-9, now.time - before.time)

    def rate(name: str) -> float:
        return (now.total(name) - before.total(name)) / seconds

    usage = now.by("vllm:kv_cache_usage_perc", "engine")
    sequences = latency(before, now, "jaxmoe:step_sequences")
    lines = [
        f"{address}  {now.label('vllm:cache_config_info', 'model_name') or 'no model yet'}  "
        f"{now.label('jaxmoe:phase', 'phase')}",
        "",
        f"{'requests':<16}{now.total('vllm:num_requests_running'):>10.0f} running"
        f"{now.total('vllm:num_requests_waiting'):>10.0f} waiting"
        f"{rate('vllm:request_success_total'):>10.1f} ended/s{rate('jaxmoe:requests_refused_total'):>10.1f} refused/s",
        f"{'tokens':<16}{rate('vllm:prompt_tokens_total'):>10.0f} prompt/s"
        f"{rate('vllm:generation_tokens_total'):>9.0f} generated/s",
        f"{'steps':<16}{rate('jaxmoe:step_seconds_count'):>10.1f} /s"
        f"{sequences.mean if sequences else 0:>15.1f} sequences each",
        f"{'since the start':<16}{now.total('vllm:num_preemptions_total'):>10.0f} preemptions"
        f"{now.total('jaxmoe:late_compiles_total'):>6.0f} late compiles{now.total('jaxmoe:stalls_total'):>6.0f} stalls",
        "",
        f"{'ms':<16}{'mean':>10}{'median':>10}{'99 %':>10}{'count':>10}",
    ]
    for title, name in _LATENCIES:
        found = latency(before, now, name)
        numbers = [f"{value * _MILLISECONDS:.2f}" for value in found[1:]] if found else ["-"] * 3
        counted = f"{found.values:.0f}" if found else "0"
        lines.append(f"{title:<16}" + "".join(f"{text:>10}" for text in [*numbers, counted]))
    if usage:
        lines += ["", f"KV pages in use, by attention rank: {100 * sum(usage) / len(usage):.0f} % in the mean"]
        lines += ["  " + "".join(map(block, usage[start : start + 64])) for start in range(0, len(usage), 64)]
    return "\n".join(lines)


def heat_map(load: pb.ExpertLoad) -> list[str]:
    """A row a mixture layer, a column an expert, or the fullest of several: full is the layer's busiest expert."""
    if not load.layers:
        return []
    experts = len(load.layers[0].experts)
    of_bin = -(-experts // _COLUMNS)
    each = "an expert" if of_bin == 1 else f"the busiest of {of_bin} experts"
    width = max(-(-experts // of_bin), len(f"{each} a column"))
    lines = [
        "",
        f"balancedness {load.balancedness:.2f}, {100 * load.of_ceiling:.0f} % of what even routing reaches; "
        f"{load.worst_balancedness:.2f} in layer {load.worst_layer}, the worst",
        f"{'layer':>7}  {f'{each} a column':<{width}}{'busiest / mean':>16}",
    ]
    for layer in load.layers:
        most, mean = max(layer.experts), sum(layer.experts) / experts
        bins = [max(layer.experts[start : start + of_bin]) for start in range(0, experts, of_bin)]
        row = "".join(block(count / max(1, most)) for count in bins)
        lines.append(f"{layer.layer:>7}  {row:<{width}}{most / mean if mean else 1:>16.2f}")
    return lines


def block(share: float) -> str:
    """A character as full as this: 0 to 1. Only what is 0 is empty."""
    return _BLOCKS[min(len(_BLOCKS) - 1, math.ceil(max(0.0, share) * (len(_BLOCKS) - 1)))]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m jaxmoe.top", description=__doc__)
    parser.add_argument("--server", metavar="HOST:PORT", default="127.0.0.1:50051", help="(default: %(default)s)")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two looks (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="look once, for one interval, and end")
    add_access_arguments(parser)
    options = parser.parse_args(arguments)
    if not 0 < options.interval < math.inf:
        parser.error(f"--interval {options.interval} must be more than 0 seconds")
    clear = _CLEAR if sys.stdout.isatty() and not options.once else ""
    try:
        with contextlib.closing(_screens(options)) as screens:
            for screen in screens:
                print(f"{clear}{screen}", flush=True)
                if options.once:
                    break
    except JaxmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
    return 0


def _screens(options: argparse.Namespace) -> Generator[str, None, None]:
    access = Access(**access_options(options))
    try:
        with access.channel(options.server) as channel:
            stub, before = AdminStub(channel), None
            while True:
                now = Snapshot(stub.GetMetrics(pb.GetMetricsRequest(), metadata=access.metadata, timeout=10))
                if before is not None:
                    load = stub.GetExpertLoad(pb.GetExpertLoadRequest(), metadata=access.metadata, timeout=10)
                    yield "\n".join([render(options.server, before, now), *heat_map(load)])
                before = now
                sleep(options.interval)
    except grpc.RpcError as error:
        raise as_jaxmoe_error(error, options.server) from error


if __name__ == "__main__":
    sys.exit(main())
