"""An engine that says the prompt over and over, one token a step. Deterministic, and open to inspection from a test."""

import dataclasses
import struct
import threading
from types import SimpleNamespace

from jaxmoe.engine.request import Output, RoutedExperts
from jaxmoe.errors import DuplicateRequestError, InvalidRequestError, QueueFullError
from jaxmoe.serving.link import ModelInfo

PAGE_SIZE = 16
PAGES = 4096


def model_info(model_path, **changes):
    fields = {
        "model_path": str(model_path),
        "served_model_name": "fake",
        "model_type": "mixtral",
        "architectures": ("MixtralForCausalLM",),
        "vocab_size": 512,
        "max_context": 100_000,
        "eos_token_ids": (1,),
        "bos_token_id": 0,
        "max_queue": 2,
        "max_running": 96,
        "num_ranks": 2,
        "page_size": PAGE_SIZE,
        "dtype": "float32",
    }
    return ModelInfo(**fields | changes)


NOTHING = SimpleNamespace(started=(), prefill_tokens=0, sequences=0, device_seconds=0.0)


@dataclasses.dataclass
class Live:
    request: object
    index: int = 0
    generated: int = 0


class FakeEngine:
    """pace: seconds a step takes. gate: steps wait for it; held: one does. steps: begun so far.

    cancelled: ids, or ids and samples, in order. cancelled_after: so many steps had begun when the last one came.
    crash: the next step raises. failing: it fails and says so, and the engine goes on.
    """

    def __init__(self, info, pace=0.0):
        self.info = info
        self.pace = pace
        self.crash = self.failing = False
        self.gate = threading.Event()
        self.gate.set()
        self.submitted = []
        self.begun = []
        self.flushes = 0
        self.kv_batches = []
        self.cancelled = []
        self.steps = self.cancelled_after = 0
        self.held = False
        self.refusal = None
        self._news = threading.Condition()
        self._live = {}
        self._waiting = []
        self._aborted = []
        self.last_step = NOTHING
        self.generated = 0
        self.balance = None
        self.rebalances = (0, 0, 0, 0, 0)
        self.last_rebalance = None

    @property
    def statistics(self):
        return SimpleNamespace(report=lambda: self.balance)

    @property
    def has_work(self):
        return bool(self._live or self._waiting or self._aborted)

    def submit(self, request):
        if self.refusal is not None:
            raise self.refusal
        if any(request.id == name for name, _ in self._live):
            raise DuplicateRequestError(request.id)
        if len(self._waiting) >= self.info.max_queue and len(self._live) >= self.info.max_running:
            raise QueueFullError(f"{len(self._waiting)} requests wait already (max_queue); try again later")
        if request.params.max_tokens == 499:
            raise InvalidRequestError("max_tokens=499 can never fit: the KV cache is 400 tokens", "max_tokens")
        with self._news:
            self.submitted.append(request)
            self._waiting += [Live(request, index) for index in range(request.params.n)]
            self._news.notify_all()

    def cancel(self, request_id, index=None):
        with self._news:
            self.cancelled.append(request_id if index is None else (request_id, index))
            self.cancelled_after = self.steps
            self._waiting = [live for live in self._waiting if live.request.id != request_id]
            found = [key for key in self._live if key[0] == request_id and index in (None, key[1])]
            for key in found:
                del self._live[key]
                self._aborted.append(Output(request_id, (), (), "abort", index=key[1]))
            self._news.notify_all()
        return bool(found)

    def step(self):
        with self._news:
            self.steps += 1
            self.held = not self.gate.is_set()
            self._news.notify_all()
        self.gate.wait()
        if self.pace:
            threading.Event().wait(self.pace)
        if self.crash:
            raise RuntimeError("secret detail of the crash")
        if self.failing:
            self.failing, failed = False, [name for name, _ in self._live]
            failed += [live.request.id for live in self._waiting]
            self._live, self._waiting, self.last_step = {}, [], NOTHING
            return [Output(key, (), (), "error", error="the step failed with SomeError") for key in failed]
        with self._news:
            outputs, self._aborted = self._aborted, []
            started, prefilled = [], 0
            while self._waiting and len(self._live) < self.info.max_running:
                live = self._waiting.pop(0)
                self._live[live.request.id, live.index] = live
                started.append(live.request.id)
                self.begun.append(live.request.id)
                prefilled += len(live.request.prompt)
            for key, live in list(self._live.items()):
                outputs.append(self._advance(live))
                if outputs[-1].finish_reason:
                    del self._live[key]
            self.last_step = SimpleNamespace(
                started=tuple(started), prefill_tokens=prefilled, sequences=len(outputs), device_seconds=0.0
            )
            self._news.notify_all()
        return outputs

    def loads(self):
        lengths = [len(live.request.prompt) + live.generated for live in self._live.values()]
        used = sum(-(-length // PAGE_SIZE) for length in lengths)
        tokens = {"generated_tokens": self.generated, "queried_tokens": 40, "hit_tokens": 30}
        busy = SimpleNamespace(running=len(lengths), waiting=0, used_pages=used, total_pages=PAGES, **tokens)
        nothing = dict.fromkeys(["running", "waiting", "used_pages", *tokens], 0)
        return [busy, *[SimpleNamespace(**nothing, total_pages=PAGES)] * (self.info.num_ranks - 1)]

    def kv_events(self):
        taken, self.kv_batches = self.kv_batches, []
        return taken

    def clear_prefix_cache(self):
        self.flushes += 1

    def counters(self):
        return SimpleNamespace(
            preemptions=3,
            programs=7,
            compile_seconds=2.5,
            late_compiles=0,
            failed_steps=1,
            queried_tokens=40,
            hit_tokens=30,
            drafts=20,
            accepted_drafts=11,
        )

    def wait_until(self, predicate):
        with self._news:
            assert self._news.wait_for(lambda: predicate(self), timeout=20)

    def _advance(self, live):
        """Sample i begins i tokens later in the prompt. The likeliest tokens are those that follow the chosen one."""
        request, params = live.request, live.request.params
        token = request.prompt[(live.generated + live.index) % len(request.prompt)]
        logprob = -live.generated / 8
        told = {"index": live.index}
        if params.logprobs:
            told["top_logprobs"] = (tuple((token + n, logprob - n) for n in range(params.logprobs)),)
        if params.prompt_logprobs is not None and live.index == live.generated == 0:
            told["prompt_logprobs"] = tuple(
                (-float(n), tuple((n, -float(n)) for n in range(params.prompt_logprobs)))
                for n in range(1, len(request.prompt))
            )
        live.generated += 1
        self.generated += 1
        if params.routed_experts:
            told["routed_experts"] = self._routed(live)
        if token in params.stop_token_ids or (token in self.info.eos_token_ids and not params.ignore_eos):
            return Output(request.id, (token,), (logprob,), "stop", token, **told)
        limit = min(params.max_tokens or self.info.max_context, self.info.max_context - len(request.prompt))
        return Output(request.id, (token,), (logprob,), "length" if live.generated >= limit else None, **told)

    def _routed(self, live):
        """Of two mixtures with one expert a token: its position, and that and 300 more."""
        end = len(live.request.prompt) + live.generated - 1
        start = end - 1 if live.generated > 1 else 0
        return RoutedExperts(
            start, 2, 1, struct.pack(f"<{2 * (end - start)}H", *(p + m for p in range(start, end) for m in (0, 300)))
        )
