"""What Prometheus reads: vLLM's names and meanings where it has them (`vllm:`), our own beside them (`jaxmoe:`).

Labels have few values: the model, the attention rank, a reason from a fixed list. Nothing of a request is ever a label.
Imports neither jax nor grpc.
"""

import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxmoe.serving.link import ModelInfo, RankLoad, Report, Step, Totals

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 1000)
_SHORT_SECONDS = (0.0001, 0.00025, 0.0005, *_SECONDS)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 1_000_000)
_FEW = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

REASONS = ("stop", "length", "abort", "error")


@dataclasses.dataclass(slots=True)
class Timeline:
    """When what happened to a request, in seconds of the monotonic clock; None: not yet.

    started: the step began that computed its first tokens. first, last: the first and the newest token came.
    tokens: of all samples. cached_tokens: of the prompt, found in the prefix cache.
    """

    arrived: float
    started: float | None = None
    first: float | None = None
    last: float | None = None
    ended: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    max_tokens: int | None = None
    samples: int = 1
    cached_tokens: int = 0


class Sample(NamedTuple):
    name: str
    labels: dict[str, str]
    value: float


class Metrics:
    """Counts what the front end sees, and shows what the engine reports."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # The engine's process is the parent of this one.
        ProcessCollector(registry=self.registry, pid=os.getppid)
        ProcessCollector(registry=self.registry, namespace="jaxmoe_frontend")
        self._engine = _EngineCollector()
        self.registry.register(self._engine)
        self._refused = Counter(
            "jaxmoe:requests_refused", "Requests turned away, by gRPC status", ["code"], registry=self.registry
        )
        self._stalls = Counter("jaxmoe:stalls", "Steps that overran the watchdog", registry=self.registry)
        self._model: _ModelMetrics | None = None

    def begin(self, info: ModelInfo) -> None:
        """The engine is ready: all that is labelled with the model's name can be counted."""
        self._engine.info = info
        self._model = _ModelMetrics(self.registry, info.served_model_name)

    def follow(self, phase: Callable[[], tuple[str, bool]], unplaced: Callable[[Sequence[RankLoad]], int]) -> None:
        """Where to look when someone reads: the phase with whether it serves, and requests on no rank yet."""
        self._engine.phase, self._engine.unplaced = phase, unplaced

    def report(self, report: Report) -> None:
        self._engine.report = report

    def step(self, step: Step, generated: int) -> None:
        """generated: tokens that came with it; an engine that overlaps steps has sampled them in the one before."""
        if (model := self._model) is None:
            return
        model.generation_tokens.inc(generated)
        if step.sequences:
            model.step_seconds.observe(step.seconds)
            model.host_seconds.observe(max(0.0, step.seconds - step.device_seconds))
            model.batch_size.observe(step.sequences)
            model.step_tokens.observe(step.prefill_tokens + generated)

    def tokens(self, timeline: Timeline, count: int, now: float) -> None:
        """`count` tokens of a request have come, in one step; those of its other samples may have come with them."""
        model = self._model
        if model is not None and count and now != timeline.last:
            if timeline.last is None:
                timeline.first = now
                model.first_token.observe(now - timeline.arrived)
                model.prompt_tokens.inc(timeline.prompt_tokens)
            else:
                model.inter_token.observe(now - timeline.last)
        if count:
            timeline.last = now
            timeline.tokens += count

    def ended(self, timeline: Timeline, reason: str) -> None:
        """reason: one of REASONS."""
        model = self._model
        if model is None:
            return
        model.success[reason].inc()
        end = timeline.ended or time.monotonic()
        model.end_to_end.observe(end - timeline.arrived)
        model.prompt_length.observe(timeline.prompt_tokens)
        model.answer_length.observe(timeline.tokens)
        if timeline.max_tokens is not None:
            model.max_tokens.observe(timeline.max_tokens)
        if timeline.started is None:
            model.queue.observe(end - timeline.arrived)
            return
        model.queue.observe(max(0.0, timeline.started - timeline.arrived))
        if timeline.first is None or timeline.last is None:
            return
        model.prefill.observe(timeline.first - timeline.started)
        model.decode.observe(timeline.last - timeline.first)
        model.inference.observe(timeline.last - timeline.started)
        of_a_sample = timeline.tokens / timeline.samples
        if of_a_sample > 1:
            model.per_token.observe((timeline.last - timeline.first) / (of_a_sample - 1))

    def refused(self, code: str) -> None:
        """code: the name of a gRPC status."""
        self._refused.labels(code).inc()

    def stalled(self) -> None:
        self._stalls.inc()

    def samples(self) -> Iterator[Sample]:
        for family in self.registry.collect():
            for sample in family.samples:
                yield Sample(sample.name, sample.labels, sample.value)


class _ModelMetrics:
    """Those that a request or a step adds to."""

    def __init__(self, registry: CollectorRegistry, name: str) -> None:
        def histogram(title: str, text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
            made = Histogram(title, text, ["model_name"], buckets=buckets, registry=registry)
            return made.labels(name)

        def counter(title: str, text: str) -> Counter:
            return Counter(title, text, ["model_name"], registry=registry).labels(name)

        self.first_token = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token")
        self.inter_token = histogram("vllm:inter_token_latency_seconds", "Between a request's tokens")
        self.per_token = histogram("vllm:request_time_per_output_token_seconds", "Mean of a request, after its first")
        self.end_to_end = histogram("vllm:e2e_request_latency_seconds", "From arrival to the end")
        self.queue = histogram("vllm:request_queue_time_seconds", "From arrival to the step that begins the prompt")
        self.prefill = histogram("vllm:request_prefill_time_seconds", "From there to the first token")
        self.decode = histogram("vllm:request_decode_time_seconds", "From the first token to the last")
        self.inference = histogram("vllm:request_inference_time_seconds", "Prefill and decode together")
        self.prompt_length = histogram("vllm:request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self.answer_length = histogram("vllm:request_generation_tokens", "Tokens of an answer", _TOKENS)
        self.max_tokens = histogram("vllm:request_params_max_tokens", "The max_tokens asked for", _TOKENS)
        self.step_tokens = histogram("vllm:iteration_tokens_total", "Tokens that a step took in and gave", _TOKENS)
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts that were computed")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated")
        success = Counter(
            "vllm:request_success", "Requests by how they ended", ["model_name", "finished_reason"], registry=registry
        )
        self.success = {reason: success.labels(name, reason) for reason in REASONS}
        self.batch_size = histogram("jaxmoe:step_sequences", "Sequences in a step, over all ranks", _FEW)
        self.step_seconds = histogram("jaxmoe:step_seconds", "A step of the engine", _SHORT_SECONDS)
        self.host_seconds = histogram(
            "jaxmoe:step_host_seconds", "Of a step, what the host spent beside launching and waiting", _SHORT_SECONDS
        )


class _EngineCollector(Collector):
    """What the engine last reported; it does so about once a second while it works."""

    def __init__(self) -> None:
        self.info: ModelInfo | None = None
        self.report = Report([], Totals())
        self.phase: Callable[[], tuple[str, bool]] = lambda: ("starting", False)
        self.unplaced: Callable[[Sequence[RankLoad]], int] = lambda ranks: 0

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        phase, serving = self.phase()
        yield GaugeMetricFamily("jaxmoe:serving", "1 while requests are served", value=serving)
        told = GaugeMetricFamily("jaxmoe:phase", "1 for the phase that the server is in", labels=["phase"])
        told.add_metric([phase], 1)
        yield told
        if self.info is None:
            return
        name, report = self.info.served_model_name, self.report
        by_rank = ["model_name", "engine"]
        running = GaugeMetricFamily("vllm:num_requests_running", "Requests running, by attention rank", labels=by_rank)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests waiting, by attention rank", labels=by_rank)
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "KV pages in use, 1 is all of them", labels=by_rank)
        in_queue = waiting_by_rank(report.ranks, self.unplaced(report.ranks))
        for number, (rank, queued) in enumerate(zip(report.ranks, in_queue, strict=True)):
            labels = [name, str(number)]
            running.add_metric(labels, rank.running)
            waiting.add_metric(labels, queued)
            usage.add_metric(labels, rank.used_pages / max(1, rank.total_pages))
        yield from (running, waiting, usage)
        totals = report.totals
        for title, text, value in (
            ("vllm:num_preemptions", "Sequences that gave up their pages to an older one", totals.preemptions),
            ("vllm:prefix_cache_queries", "Tokens of prompts looked for in the prefix cache", totals.queried_tokens),
            ("vllm:prefix_cache_hits", "Those of them that were found", totals.hit_tokens),
            ("vllm:spec_decode_num_draft_tokens", "Drafts that went through the model", totals.drafts),
            ("vllm:spec_decode_num_accepted_tokens", "Those of them that were right", totals.accepted_drafts),
            ("jaxmoe:failed_steps", "Steps that failed, and their requests with them", totals.failed_steps),
            ("jaxmoe:compiled_programs", "Step programs compiled", totals.programs),
            ("jaxmoe:compile_seconds", "Wall time of each compilation, summed up", totals.compile_seconds),
            ("jaxmoe:late_compiles", "Compilations that warm-up did not foresee: 0", totals.late_compiles),
        ):
            counter = CounterMetricFamily(title, text, labels=["model_name"])
            counter.add_metric([name], value)
            yield counter
        yield from self._balance(name)
        config = GaugeMetricFamily(
            "vllm:cache_config_info", "Of the KV cache", labels=["model_name", "block_size", "num_gpu_blocks"]
        )
        pages = sum(rank.total_pages for rank in report.ranks)
        config.add_metric([name, str(self.info.page_size), str(pages)], 1)
        yield config

    def _balance(self, name: str) -> Iterator[Metric]:
        assert self.info is not None
        moves, balance = self.report.moves, self.report.balance
        gauges: list[tuple[str, str, float]] = [
            ("jaxmoe:rebalancing", "1 while experts move", moves.running),
            (
                "jaxmoe:rebalance_worst_step_seconds",
                "The longest step while experts last moved",
                moves.worst_step_seconds,
            ),
            ("jaxmoe:rebalance_worst_moving_seconds", "Of a step, spent on moving at most", moves.worst_moving_seconds),
        ]
        if balance is not None:
            layers = self.info.mixture_layers
            worst = layers[balance.worst_layer] if balance.worst_layer < len(layers) else balance.worst_layer
            gauges += [
                (
                    "jaxmoe:expert_balancedness",
                    "Mean load of devices over the fullest's, of recent calls",
                    balance.balancedness,
                ),
                (
                    "jaxmoe:expert_balance_ceiling",
                    "What even routing would reach at these batch sizes",
                    balance.ceiling,
                ),
                (
                    "jaxmoe:expert_balance_of_ceiling",
                    "The one over the other; near 1 nothing is to gain",
                    balance.of_ceiling,
                ),
                ("jaxmoe:expert_worst_layer", "The decoder layer with the least balancedness", worst),
                ("jaxmoe:expert_worst_balancedness", "That layer's", balance.worst_balancedness),
            ]
        for title, text, value in gauges:
            gauge = GaugeMetricFamily(title, text, labels=["model_name"])
            gauge.add_metric([name], value)
            yield gauge
        ended = CounterMetricFamily(
            "jaxmoe:rebalances", "Rebalances by how they ended", labels=["model_name", "outcome"]
        )
        for outcome in ("done", "failed", "deadline"):
            ended.add_metric([name, outcome], getattr(moves, outcome))
        yield ended
        for title, text, count in (
            ("jaxmoe:moved_experts", "Experts that were put into other slots", moves.moved_experts),
            ("jaxmoe:moved_expert_bytes", "Their weights", moves.moved_bytes),
        ):
            counter = CounterMetricFamily(title, text, labels=["model_name"])
            counter.add_metric([name], count)
            yield counter


def waiting_by_rank(ranks: Sequence[RankLoad], unplaced: int) -> list[int]:
    """Requests that wait, by rank: its own, and an even share of the `unplaced`, which go wherever there is a place."""
    return [rank.waiting + (unplaced + len(ranks) - 1 - n) // len(ranks) for n, rank in enumerate(ranks)]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # As HTTPServer does, but for the question to the resolver what this machine is called.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _Quiet(WSGIRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


class MetricsServer:
    """`/metrics` and `/healthz` over HTTP, in a thread. Raises OSError if it cannot listen there.

    health: whether requests are served, and the phase in words.
    """

    def __init__(self, host: str, port: int, metrics: Metrics, health: Callable[[], tuple[bool, str]]) -> None:
        exposition = make_wsgi_app(metrics.registry)

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            match environ["PATH_INFO"]:
                case "/metrics":
                    return exposition(environ, start_response)
                case "/healthz":
                    healthy, text = health()
                    status = "200 OK" if healthy else "503 Service Unavailable"
                case _:
                    status, text = "404 Not Found", "there are /metrics and /healthz"
            start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [f"{text}\n".encode()]

        class Server(_Server):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        self._server = make_server(host, port, app, Server, _Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
