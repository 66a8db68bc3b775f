"""What clients see of an engine under load: arrival patterns, each beside what it is compared with in the same run.

    python benchmarks/serving.py [--patterns poisson,burst,shared,long] [--server] [--rounds 1] [ENGINE OPTIONS]
    python benchmarks/serving.py --streams 1,8,32 [ENGINE OPTIONS]

Patterns come from a seed: requests of skewed lengths that arrive by chance (poisson) or sixteen at a time (burst),
against each of them alone; prompts that begin alike (shared), against no prefix cache; a long prompt among sixteen
streams that decode (long), against the same prompt in one piece, and against the streams undisturbed. They drive the
engine in this process, or with --server a real server over gRPC. ENGINE OPTIONS are those of `jaxmoe.serve`: --model or
--random-weights, --mesh, and limits.

--streams is another table: as many equal requests at once over gRPC, against transformers' batched greedy `generate` on
the same checkpoint (skipped where torch is not installed).

TTFT: from arrival, which may fall within a step, to the first token. ITL: between one arrival of tokens and the next.
E2E: from arrival to the last token. Good: requests whose TTFT, and mean time of a token after the first, are within
--limits. Cached: of prompt tokens, those found in the prefix cache. Host: of a step, what was not spent on launching
programs and waiting for them.
"""

import argparse
import asyncio
import functools
import gc
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineStub

import jaxmoe
from jaxmoe.checkpoints.loader import read_config
from jaxmoe.cli import (
    add_limit_arguments,
    add_model_arguments,
    add_random_weights,
    engine_config,
    model_options,
    use_compile_cache,
)
from jaxmoe.demo import find_model
from jaxmoe.engine.request import Request, SamplingParams
from jaxmoe.models.presets import read_preset
from jaxmoe.models.registry import family_of
from jaxmoe.serving.proto import admin_pb2
from jaxmoe.serving.proto.admin_pb2_grpc import AdminStub
from jaxmoe.serving.tokenization import Tokenizer
from jaxmoe.top import Snapshot, latency

TEXT = Path(__file__).parent / "text"
STREAM_PROMPT = 64
ENDED = sys.maxsize
SETTLED = 1.5  # seconds until a server's counters are told


class Arrival(NamedTuple):
    """A request.

    at: seconds after the first. after: instead, once all earlier ones have so many tokens or have ended.
    """

    at: float
    prompt: tuple[int, ...]
    tokens: int
    after: int | None = None


class Served(NamedTuple):
    """A request as its client saw it. came: when, and how many tokens."""

    at: float
    came: list[tuple[float, int]]

    @property
    def first(self) -> float:
        return self.came[0][0] - self.at

    @property
    def whole(self) -> float:
        return self.came[-1][0] - self.at

    @property
    def gaps(self) -> list[float]:
        return np.diff([at for at, _ in self.came]).tolist()

    @property
    def of_a_token(self) -> float:
        """After the first arrival of tokens, on average."""
        return (self.came[-1][0] - self.came[0][0]) / max(1, sum(count for _, count in self.came[1:]))


class Run(NamedTuple):
    """hosts: seconds of the steps' median and 99th percentile. queried, hit: tokens of prompts."""

    served: list[Served]
    hosts: tuple[float, float]
    queried: int
    hit: int
    preemptions: int


class Variant(NamedTuple):
    """Arrivals at an engine with further options."""

    title: str
    arrivals: list[Arrival]
    options: tuple[str, ...] = ()


class Traffic:
    """Seeded arrivals for a model of so many tokens of vocabulary and context.

    requests, rate: how many in all and, on average, a second.
    """

    def __init__(self, vocabulary: int, context: int, requests: int, rate: float, seed: int = 0) -> None:
        self.vocabulary, self.context, self.requests, self.rate = vocabulary, context, requests, rate
        self.random = random.Random(seed)

    def poisson(self) -> list[Variant]:
        return self._against_alone("poisson", [self._request(at) for at in self._by_chance()])

    def burst(self, size: int = 16) -> list[Variant]:
        times = [index // size * size / self.rate for index in range(self.requests)]
        return self._against_alone(f"bursts of {size}", [self._request(at) for at in times])

    def shared(self) -> list[Variant]:
        system = self._tokens(self.context // 2)
        arrivals = [self._request(at, system) for at in self._by_chance()]
        title = f"{len(system)} tokens in common"
        return [Variant(f"{title}, no cache", arrivals, ("--no-prefix-cache",)), Variant(title, arrivals)]

    def long(self, streams: int = 16, prompt: int = 2000, warm: int = 8, tokens: int = 64) -> list[Variant]:
        prompt = min(prompt, self.context * 7 // 8)
        alone = [Arrival(0, self._tokens(32), tokens) for _ in range(streams)]
        disturbed = [*alone, Arrival(0, self._tokens(prompt), warm, after=warm)]
        title = f"{streams} streams, a prompt of {prompt}"
        return [
            Variant(f"{streams} streams", alone),
            Variant(f"{title} whole", disturbed, ("--max-prefill-tokens", str(prompt))),
            Variant(f"{title} in chunks", disturbed),
        ]

    def warm_up(self) -> list[Arrival]:
        return [Arrival(0, self._tokens(length), 8) for length in (8, 24, 64, self.context // 2)]

    def _against_alone(self, title: str, arrivals: list[Arrival]) -> list[Variant]:
        return [Variant(f"{title}, alone", [each._replace(after=ENDED) for each in arrivals]), Variant(title, arrivals)]

    def _by_chance(self) -> Iterator[float]:
        at = 0.0
        for _ in range(self.requests):
            yield at
            at += self.random.expovariate(self.rate)

    def _request(self, at: float, begin: tuple[int, ...] = ()) -> Arrival:
        own = min(round(self.random.lognormvariate(4.5, 0.8)) + 1, self.context // 4)
        return Arrival(at, begin + self._tokens(own), min(round(self.random.lognormvariate(4.0, 0.6)) + 2, 128))

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.random.choices(range(self.vocabulary), k=count))


PATTERNS: dict[str, Callable[[Traffic], list[Variant]]] = {
    "poisson": Traffic.poisson,
    "burst": Traffic.burst,
    "shared": Traffic.shared,
    "long": Traffic.long,
}


def drive_engine(engine: jaxmoe.Engine, arrivals: Sequence[Arrival]) -> Run:
    served: list[Served] = []
    left = [arrival.tokens for arrival in arrivals]
    waiting, hosts, before, began = deque(arrivals), [], engine.stats(), time.perf_counter()
    while waiting or engine.has_work:
        now = time.perf_counter() - began
        while waiting and _due(waiting[0], now, arrivals, left[: len(served)]):
            arrival, name = waiting.popleft(), str(len(served))
            params = SamplingParams(temperature=0, max_tokens=arrival.tokens, ignore_eos=True)
            served.append(Served(arrival.at if arrival.after is None else now, []))
            engine.submit(Request(name, arrival.prompt, params))
        if not engine.has_work:
            time.sleep(max(0.0, waiting[0].at - now))
            continue
        start = time.perf_counter()
        outputs = engine.step()
        end = time.perf_counter()
        hosts.append(end - start - engine.last_step.device_seconds)
        for output in outputs:
            index = int(output.request_id)
            served[index].came.append((end - began, len(output.token_ids)))
            left[index] -= len(output.token_ids)
    after = engine.stats()
    return Run(
        served,
        (float(np.median(hosts)), float(np.percentile(hosts, 99))),
        after.queried_tokens - before.queried_tokens,
        after.hit_tokens - before.hit_tokens,
        after.preemptions - before.preemptions,
    )


def _due(arrival: Arrival, now: float, arrivals: Sequence[Arrival], left: Sequence[int]) -> bool:
    """left: tokens still to come of those that have arrived, which are the first of all arrivals."""
    if arrival.after is None:
        return arrival.at <= now
    return all(
        not tokens or earlier.tokens - tokens >= arrival.after for earlier, tokens in zip(arrivals, left, strict=False)
    )


async def drive_server(address: str, arrivals: Sequence[Arrival]) -> Run:
    async with grpc.aio.insecure_channel(address) as channel:
        stub, admin = VllmEngineStub(channel), AdminStub(channel)
        served: list[Served] = []
        left = [arrival.tokens for arrival in arrivals]
        before, news, began = Snapshot(await admin.GetMetrics(admin_pb2.GetMetricsRequest())), asyncio.Condition(), 0.0

        async def stream(index: int, arrival: Arrival) -> None:
            sampling = pb.SamplingParams(temperature=0.0, max_tokens=arrival.tokens, ignore_eos=True)
            request = pb.GenerateRequest(stream=True, sampling_params=sampling)
            request.tokenized.input_ids.extend(arrival.prompt)
            async for response in stub.Generate(request):
                if count := len(response.chunk.token_ids):
                    served[index].came.append((time.perf_counter() - began, count))
                    left[index] -= count
                    async with news:
                        news.notify()

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for index, arrival in enumerate(arrivals):
                if arrival.after is None:
                    await asyncio.sleep(arrival.at - (time.perf_counter() - began))
                else:
                    async with news:
                        await news.wait_for(lambda: _due(arrivals[len(served)], 0, arrivals, left[: len(served)]))
                now = time.perf_counter() - began
                served.append(Served(arrival.at if arrival.after is None else now, []))
                group.create_task(stream(index, arrival))
        await asyncio.sleep(SETTLED)
        after = Snapshot(await admin.GetMetrics(admin_pb2.GetMetricsRequest()))

    def grown(name: str) -> int:
        return int(after.total(name) - before.total(name))

    host = latency(before, after, "jaxmoe:step_host_seconds")
    assert host is not None
    return Run(
        served,
        (host.median, host.p99),
        grown("vllm:prefix_cache_queries_total"),
        grown("vllm:prefix_cache_hits_total"),
        grown("vllm:num_preemptions_total"),
    )


@contextmanager
def server(options: Sequence[str]) -> Iterator[tuple[str, float]]:
    """A server's address and the seconds until it was ready."""
    command = [sys.executable, "-m", "jaxmoe.serve", *options, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        began, said = time.monotonic(), ""
        for line in process.stderr:
            said += line
            if ready := re.search(r"ready on (\S+) after", line):
                yield ready[1], time.monotonic() - began
                break
        else:
            raise SystemExit(f"the server did not start:\n{said}")
    finally:
        process.terminate()
        process.wait(60)


def measure_patterns(names: Sequence[str], traffic: Traffic, options: list[str], args: argparse.Namespace) -> None:
    limits = tuple(float(text) / 1e3 for text in args.limits.split(","))
    parse = engine_parser().parse_args
    base = parse(options)
    use_compile_cache(base.compile_cache)
    model = None if args.server else jaxmoe.load(base.model, random_weights=base.random_weights, **model_options(base))

    @functools.cache
    def engine(changes: tuple[str, ...]) -> jaxmoe.Engine:
        assert model is not None
        made = jaxmoe.Engine(model, engine_config(parse([*options, *changes])))
        drive_engine(made, traffic.warm_up())
        return made

    def run(variant: Variant) -> Run:
        if args.server:
            with server([*options, *variant.options]) as (address, _):
                asyncio.run(drive_server(address, traffic.warm_up()))
                return asyncio.run(drive_server(address, variant.arrivals))
        engine(variant.options).clear_prefix_cache()
        gc.collect()
        return drive_engine(engine(variant.options), variant.arrivals)

    print(HEADER)
    for name in names:
        variants = PATTERNS[name](traffic)
        rounds = [[run(variant) for variant in variants] for _ in range(args.rounds)]
        *peers, ours = [summary(runs, limits) for runs in zip(*rounds, strict=True)]
        for variant, row in zip(variants, [*peers, ours], strict=True):
            print(f"| {variant.title} | {' | '.join(map(shown, row))} |")
        for variant, peer in zip(variants, peers, strict=False):
            ratios = [shown(own / other, 2) for own, other in zip(ours[1:4], peer[1:4], strict=True)]
            print(f"| *to {variant.title}* | | {' | '.join(ratios)} | | | | |", flush=True)


COLUMNS = (
    "requests",
    "TTFT, ms",
    "ITL, ms",
    "E2E, ms",
    "good, % and 1/s",
    "cached, %",
    "preempted",
    "host, ms (p50 / p99)",
)
HEADER = f"| p50 / p95 / p99 | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}"


def summary(runs: Sequence[Run], limits: Sequence[float]) -> list[np.ndarray]:
    """A row of the table from all rounds of a variant."""
    served = [each for run in runs for each in run.served]
    good = sum(each.first <= limits[0] and each.of_a_token <= limits[1] for each in served)
    seconds = sum(max(each.came[-1][0] for each in run.served) for run in runs)
    queried, hit = sum(run.queried for run in runs), sum(run.hit for run in runs)

    def spread(values: list[float]) -> np.ndarray:
        return np.percentile(values, (50, 95, 99)) * 1e3

    return [
        np.array([len(served)]),
        spread([each.first for each in served]),
        spread([gap for each in served for gap in each.gaps]),
        spread([each.whole for each in served]),
        np.array([100 * good / len(served), good / seconds]),
        np.array([100 * hit / queried]),
        np.array([sum(run.preemptions for run in runs)]),
        np.mean([run.hosts for run in runs], axis=0) * 1e3,
    ]


def shown(values: np.ndarray, digits: int | None = None) -> str:
    """Three digits of each, or so many after the point."""
    if digits is not None:
        return " / ".join(f"{value:.{digits}f}" for value in values)
    return " / ".join(f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}" for value in values)


def measure_streams(counts: Sequence[int], tokens: int, options: list[str]) -> None:
    args = engine_parser().parse_args(options)
    model = find_model(args.model)
    tokenizer = Tokenizer.load(model)
    with tempfile.TemporaryDirectory() as cache:
        cached = [*options, "--compile-cache", cache]
        with server(cached) as (_, cold):
            pass
        with server(cached) as (address, warm):
            print(f"{model.name} on {args.mesh}: ready after {cold:.1f} s cold, {warm:.1f} s warm\n")
            rows = []
            for count in counts:
                batch = [Arrival(0, prompt, tokens) for prompt in windows(tokenizer, count)]
                asyncio.run(drive_server(address, [each._replace(tokens=8) for each in batch]))
                rows.append(asyncio.run(drive_server(address, batch)).served)
    print("| streams | tokens/s | TTFT, ms (p50 / p99) | ITL, ms (p50 / p99) | transformers | ratio |")
    print("|---|---|---|---|---|---|")
    for count, served in zip(counts, rows, strict=True):
        rate = count * tokens / max(each.came[-1][0] for each in served)
        first = [each.first * 1e3 for each in served]
        between = [gap * 1e3 for each in served for gap in each.gaps]
        latencies = [shown(np.percentile(values, (50, 99)), 1) for values in (first, between)]
        peer = transformers_rate(model, tokenizer, count, tokens)
        against = f"{peer:.0f} | {rate / peer:.2f}" if peer else "- | -"
        print(f"| {count} | {rate:.0f} | {' | '.join(latencies)} | {against} |", flush=True)


def windows(tokenizer: Tokenizer, count: int) -> list[tuple[int, ...]]:
    """Prompts from the sample texts, a domain after the other."""
    tokens = [tokenizer.encode(file.read_text()[:40_000]) for file in sorted(TEXT.glob("*.txt"))]
    out = []
    for index in range(count):
        domain = tokens[index % len(tokens)]
        start = 97 * index % (len(domain) - STREAM_PROMPT)
        out.append(tuple(domain[start : start + STREAM_PROMPT]))
    return out


def transformers_rate(model: Path, tokenizer: Tokenizer, streams: int, length: int) -> float | None:
    """Tokens a second of batched greedy generation on the same prompts."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.tensor(windows(tokenizer, streams))
    options = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length, "pad_token_id": 0}
    with torch.no_grad():
        lm.generate(ids, attention_mask=torch.ones_like(ids), **{**options, "min_new_tokens": 8, "max_new_tokens": 8})
        began = time.monotonic()
        lm.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return streams * length / (time.monotonic() - began)


def engine_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ENGINE OPTIONS", add_help=False)
    add_model_arguments(parser)
    add_random_weights(parser)
    add_limit_arguments(parser)
    return parser


def traffic_for(options: list[str], requests: int, rate: float) -> Traffic:
    """Within the limits of the model and the engine."""
    args = engine_parser().parse_args(options)
    hf = read_preset(args.random_weights) if args.random_weights else read_config(find_model(args.model))
    config = family_of(hf).read_config(hf)
    return Traffic(config.vocab_size, min(args.max_context or config.max_position, config.max_position), requests, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", default=",".join(PATTERNS), help="(default: %(default)s)")
    parser.add_argument("--server", action="store_true", help="drive a real server over gRPC")
    parser.add_argument("--requests", type=int, default=64, help="of poisson, burst and shared (%(default)s)")
    parser.add_argument("--rate", type=float, default=8, help="of them a second, on average (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="how often, all variants in turn (%(default)s)")
    parser.add_argument("--limits", default="500,50", metavar="TTFT,ITL", help="of a good request, ms (%(default)s)")
    parser.add_argument("--streams", help="so many streams at once, against transformers, in place of patterns")
    parser.add_argument("--tokens", type=int, default=128, help="of each stream (%(default)s)")
    args, options = parser.parse_known_args()
    if args.streams:
        measure_streams([int(text) for text in args.streams.split(",")], args.tokens, options)
        return
    names = args.patterns.split(",")
    if unknown := set(names) - set(PATTERNS):
        parser.error(f"no pattern is called {', '.join(sorted(unknown))}; there are {', '.join(PATTERNS)}")
    measure_patterns(names, traffic_for(options, args.requests, args.rate), options, args)


if __name__ == "__main__":
    main()
