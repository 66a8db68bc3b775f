"""What the front end costs: messages a second that it passes on, how soon it refuses who finds the queue full, and what
streaming clients do to the engine's steps.

    python benchmarks/frontend.py [--streams 1,16,64,256] [--model demo:mixtral] [--clients 64] [--tokens 200]

First an engine that only counts, so that all there is to measure is the way from a step to a client, in messages of one
token. Then the same with a step every 10 ms, all its places taken, and a further process that asks for one again and
again. Then a real engine: the same requests consumed in process, then by as many gRPC streams of another process, by
turns, with the median step of each.
"""

import argparse
import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineStub

import jaxmoe
from jaxmoe.engine.request import Output, Request, SamplingParams
from jaxmoe.serving.engine_loop import serve_engine
from jaxmoe.serving.link import FrontendConfig, ModelInfo, Ready, Totals
from jaxmoe.serving.server import Frontend

PROMPT, TURNS = 64, 3
COUNTED = 400  # tokens of a stream of the engine that only counts
PACE, REFUSALS = 0.01, 1000


class Counting:
    """One token a step for each request, the next number. pace: seconds that a step takes at least."""

    statistics = SimpleNamespace(report=lambda: None)
    rebalances = (0, 0, 0, 0, 0)
    last_rebalance = None

    def __init__(self, pace: float = 0.0) -> None:
        self._pace = pace
        self._left: dict[str, int] = {}
        self.last_step = SimpleNamespace(started=(), prefill_tokens=0, sequences=0, device_seconds=0.0)

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def submit(self, request: Request) -> None:
        assert request.params.max_tokens
        self._left[request.id] = request.params.max_tokens

    def cancel(self, request_id: str, index: int | None = None) -> bool:
        return self._left.pop(request_id, None) is not None

    def step(self) -> list[Output]:
        time.sleep(self._pace)
        outputs = []
        for name, left in list(self._left.items()):
            outputs.append(Output(name, (left % 1000,), (0.0,), None if left > 1 else "length"))
            self._left[name] = left - 1
            if left == 1:
                del self._left[name]
        return outputs

    def loads(self) -> list[Any]:
        return []

    def counters(self) -> Any:
        return Totals()

    def clear_prefix_cache(self) -> None: ...

    def kv_events(self) -> list[Any]:
        return []


class Timed:
    """An engine whose steps are timed, while `wanted` sequences run."""

    def __init__(self, engine: jaxmoe.Engine, wanted: int) -> None:
        self._engine, self._wanted = engine, wanted
        self.steps: list[float] = []
        self.periods: list[float] = []
        self._ended: float | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> list[Output]:
        began = time.perf_counter()
        outputs = self._engine.step()
        ended, did = time.perf_counter(), self._engine.last_step
        full = did.sequences == self._wanted and not did.prefill_tokens
        if full:
            self.steps.append(ended - began)
            if self._ended is not None:
                self.periods.append(ended - self._ended)
        self._ended = ended if full else None
        return outputs


@contextmanager
def served(info: ModelInfo) -> Iterator[Frontend]:
    config = FrontendConfig(
        host="127.0.0.1", port=0, reflection=False, drain_timeout=5, step_timeout=120, max_backlog=1 << 20, log_level=30
    )
    with Frontend(config) as frontend:
        frontend.link.send(Ready(info))
        yield frontend


def model_info(vocabulary: int = 1000, places: int = 0) -> ModelInfo:
    """places: beyond which requests are refused; 0 for no limit."""
    return ModelInfo(
        model_path="",
        served_model_name="benchmark",
        model_type="",
        architectures=(),
        vocab_size=vocabulary,
        max_context=1 << 20,
        eos_token_ids=(),
        max_queue=0 if places else 4096,
        max_running=places,
        num_ranks=1,
        page_size=16,
    )


async def _consume(address: str, streams: int, tokens: int) -> tuple[int, float]:
    """Messages of all streams, and the seconds from the first to the last."""
    first: list[float] = []

    async def one(stub: VllmEngineStub, number: int) -> int:
        params = pb.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        request = pb.GenerateRequest(stream=True, sampling_params=params)
        request.tokenized.input_ids.extend(prompt(number))
        count = 0
        async for _ in stub.Generate(request, wait_for_ready=True):
            first.append(time.perf_counter()) if not first else None
            count += 1
        return count

    async with grpc.aio.insecure_channel(address) as channel:
        stub = VllmEngineStub(channel)
        counts = await asyncio.gather(*(one(stub, number) for number in range(streams)))
    return sum(counts), time.perf_counter() - first[0]


def prompt(number: int) -> list[int]:
    return [(17 * number + 3 * place) % 900 + 50 for place in range(PROMPT)]


def by_another_process(engine: Any, info: ModelInfo, streams: int, tokens: int) -> tuple[int, float]:
    """What `_consume` finds there, while this process runs the engine."""
    with (
        served(info) as frontend,
        another_process("--consume", frontend.address, streams, tokens) as client,
        running(engine, frontend),
    ):
        count, seconds = client.stdout.readline().split()
    return int(count), float(seconds)


def refusals(streams: int, count: int) -> list[float]:
    """Seconds until each of so many requests is refused that come while all places are taken."""
    with (
        served(model_info(places=streams)) as frontend,
        another_process("--consume", frontend.address, streams, 1 << 19) as client,
        running(Counting(PACE), frontend),
        another_process("--ask", frontend.address, streams, count) as asker,
    ):
        seconds = [float(each) for each in asker.stdout.readline().split()]
        client.kill()
    return seconds


def _ask(address: str, streams: int, count: int) -> Iterator[float]:
    params = pb.SamplingParams(temperature=0, max_tokens=1)
    request = pb.GenerateRequest(sampling_params=params, tokenized=pb.TokenizedInput(input_ids=prompt(0)))
    with grpc.insecure_channel(address) as channel:
        stub = VllmEngineStub(channel)
        while stub.GetServerInfo(pb.GetServerInfoRequest(), wait_for_ready=True).active_requests < streams:
            time.sleep(PACE)
        for _ in range(count):
            time.sleep(PACE)
            began = time.perf_counter()
            try:
                list(stub.Generate(request))
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                yield time.perf_counter() - began


@contextmanager
def another_process(does: str, address: str, streams: int, tokens: int) -> Iterator[Any]:
    command = [sys.executable, __file__, does, address, "--clients", str(streams), "--tokens", str(tokens)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process


@contextmanager
def running(engine: Any, frontend: Frontend) -> Iterator[None]:
    loop = threading.Thread(target=serve_engine, args=[engine, frontend.link])
    loop.start()
    yield
    with frontend.signals():  # the first drains, the second ends at once
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    loop.join()


def in_process(engine: Timed, streams: int, tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for number in range(streams):
        engine.submit(Request(str(number), tuple(prompt(number)), params))
    while engine.has_work:
        engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", default="1,16,64,256", help="of the engine that only counts (%(default)s)")
    parser.add_argument("--model", default="demo:mixtral")
    parser.add_argument("--clients", type=int, default=64, help="of the real engine (%(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="that each asks for (%(default)s)")
    parser.add_argument("--consume", metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--ask", metavar="ADDRESS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.consume:
        print(*asyncio.run(_consume(args.consume, args.clients, args.tokens)))
        return
    if args.ask:
        print(*_ask(args.ask, args.clients, args.tokens))
        return
    print("| streams | messages/s |\n|---|---|")
    for streams in map(int, args.streams.split(",")):
        count, seconds = by_another_process(Counting(), model_info(), streams, COUNTED)
        print(f"| {streams} | {count / seconds:.0f} |", flush=True)
    print("\n| streams | refused after, ms: p50 | p99 | most |\n|---|---|---|---|")
    for streams in map(int, args.streams.split(",")):
        seconds = 1e3 * np.array(refusals(streams, REFUSALS))
        print(f"| {streams} | " + " | ".join(f"{value:.2f}" for value in np.percentile(seconds, (50, 99, 100))) + " |")
    limits = jaxmoe.EngineConfig(max_batch=args.clients, max_context=PROMPT + args.tokens + 1, max_prefill_tokens=256)
    real = jaxmoe.Engine(jaxmoe.load(args.model), limits)
    info = model_info(vocabulary=real.model.config.vocab_size)
    local, remote = Timed(real, args.clients), Timed(real, args.clients)
    in_process(Timed(real, args.clients), args.clients, 8)
    for _ in range(TURNS):
        in_process(local, args.clients, args.tokens)
        by_another_process(remote, info, args.clients, args.tokens)
    print(
        f"\n{args.model}, {args.clients} streams, {len(local.steps)} and {len(remote.steps)} full steps, median ms:\n"
    )
    print("| | in process | gRPC streams | ratio |\n|---|---|---|---|")
    for title, one, other in (("step", local.steps, remote.steps), ("step to step", local.periods, remote.periods)):
        here, there = np.median(one) * 1e3, np.median(other) * 1e3
        print(f"| {title} | {here:.2f} | {there:.2f} | {there / here:.2f} |")


if __name__ == "__main__":
    main()
