"""What every peer's worker does: read requests from standard input, one JSON object a line, and answer in kind.

A worker knows only its own runtime (`Peer`). What is measured, and how, is here, so that it is the same for all.
Imports nothing but the standard library, because each worker runs in a virtual environment of its own.
"""

import ctypes
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

VOCABULARY = 32_000
Prompts = Sequence[Sequence[int]]
# (prompt's index, token) of what a step brought.
Step = list[tuple[int, int]]

DECODE_CONTEXT, DECODE_STEPS = 128, 64
SERVED, SERVED_PROMPTS, SERVED_LENGTHS = 32, (16, 512), (16, 128)
# Of a sequence in any of the measurements but prefill.
MAX_SEQUENCE = SERVED_PROMPTS[1] + SERVED_LENGTHS[1]
MAX_CONTEXT = 4096


class Peer(Protocol):
    """A runtime with a model loaded. Greedy; nothing ends a sequence but its length."""

    def steps(self, prompts: Prompts, lengths: Sequence[int]) -> Iterator[Step]:
        """Continues all prompts together, prompt i by lengths[i] tokens, and yields what each step brings."""
        ...

    def prepare(self, phase: str) -> None:
        """Called before each measurement of `phase`, outside its time: a place to choose settings."""
        ...

    def logits(self, prompt: Sequence[int]) -> list[float]:
        """Of the token after the prompt, up to a constant; float32."""
        ...

    def describe(self) -> str:
        """Version and settings, for the table's caption."""
        ...


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCABULARY), k=length)


def served_lengths() -> tuple[list[int], list[int]]:
    """Prompt and output lengths of the mixed requests, the same in every round: many short ones, few long ones."""
    rng = random.Random(0)

    def draw(low: int, high: int) -> int:
        return round(low * (high / low) ** rng.random())

    pairs = [(draw(*SERVED_PROMPTS), draw(*SERVED_LENGTHS)) for _ in range(SERVED)]
    return [prompt for prompt, _ in pairs], [length for _, length in pairs]


def measure(peer: Peer, phase: str, seed: int) -> float:
    """Tokens a second in `phase`: "prefill N" of N tokens, "decode B" at batch B, or "serve"."""
    kind, _, number = phase.partition(" ")
    if kind == "prefill":
        return prefill_rate(peer, int(number), seed)
    if kind == "decode":
        return decode_rate(peer, int(number), seed)
    return serving_rate(peer, seed)


def prefill_rate(peer: Peer, length: int, seed: int) -> float:
    """Prompt tokens over the time to the first token."""
    prompt = prompt_of(length, seed)
    began = time.perf_counter()
    steps = peer.steps([prompt], [1])
    next(steps)
    elapsed = time.perf_counter() - began
    assert not list(steps)
    return length / elapsed


def decode_rate(peer: Peer, batch: int, seed: int) -> float:
    """Tokens that came while all sequences were decoding, over that time.

    It begins when the last sequence has its first token; until then those before it may have had steps of their own.
    """
    prompts = [prompt_of(DECODE_CONTEXT, seed * batch + row) for row in range(batch)]
    seen = [0] * batch
    began = ended = 0.0
    counted = 0
    for step in peer.steps(prompts, [DECODE_STEPS + 1] * batch):
        now, open_before = time.perf_counter(), max(seen) <= DECODE_STEPS
        for row, _ in step:
            seen[row] += 1
        if began and open_before:
            ended = now
            counted += len(step)
        elif not began and all(seen):
            began = now
    assert seen == [DECODE_STEPS + 1] * batch, seen
    return counted / (ended - began)


def serving_rate(peer: Peer, seed: int) -> float:
    """Generated tokens of all requests, submitted at once, over the time until the last of them."""
    prompt_lengths, lengths = served_lengths()
    prompts = [prompt_of(length, seed * SERVED + row) for row, length in enumerate(prompt_lengths)]
    began = time.perf_counter()
    total = sum(len(step) for step in peer.steps(prompts, lengths))
    elapsed = time.perf_counter() - began
    assert total == sum(lengths), (total, sum(lengths))
    return total / elapsed


def greedy(peer: Peer, prompt: Sequence[int], count: int) -> list[int]:
    return [token for step in peer.steps([prompt], [count]) for _, token in step]


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def answer(peer: Peer, request: dict[str, Any]) -> Any:
    match request["do"]:
        case "first token":
            return greedy(peer, prompt_of(8, 0), 1)
        case "measure":
            peer.prepare(request["phase"])
            return measure(peer, request["phase"], request["seed"])
        case "parity":
            prompt = prompt_of(request["length"], request["seed"])
            return {"logits": peer.logits(prompt), "tokens": greedy(peer, prompt, request["count"])}
        case "describe":
            return peer.describe()
        case "peak bytes":
            return peak_bytes()
    raise ValueError(f"unknown request {request}")


def serve(load: Any) -> None:
    """A worker's main program: `WORKER.py FOLDER DTYPE THREADS`. `load` takes these and returns a Peer.

    Standard output is for answers alone; what the runtime prints goes to standard error.
    """
    folder, dtype, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    # A stopped process would outlive a driver that is killed: end with it (PR_SET_PDEATHSIG).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    answers: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer: Peer | None = None
    for line in sys.stdin:
        try:
            peer = peer or load(folder, dtype, threads)
            reply = {"value": answer(peer, json.loads(line))}
        except Exception:
            reply = {"error": traceback.format_exc()}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
