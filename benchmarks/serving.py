"""Start-up and streaming throughput of the real server, against transformers on the same checkpoint in the same run.

    python benchmarks/serving.py [--mesh dp=1,ep=1] [--streams 1,8,32] [--tokens 128]

Prints start-up time with an empty and with a filled compile cache, then for each number of concurrent gRPC streams:
tokens a second over all of them, time to first token and time between tokens (median and 99th percentile), and the
ratio to transformers' batched greedy `generate` (skipped where torch is not installed).
"""

import argparse
import asyncio
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineStub

from jaxmoe.demo import DEMO_MODEL
from jaxmoe.serving.tokenization import Tokenizer

TEXT = Path(__file__).parent / "text"
PROMPT_TOKENS = 64


@contextmanager
def server(model: Path, mesh: str, cache: str) -> Iterator[tuple[str, float]]:
    """A server's address and the seconds until it was ready."""
    command = [sys.executable, "-m", "jaxmoe.serve", "--model", str(model), "--mesh", mesh, "--port", "0"]
    process = subprocess.Popen([*command, "--compile-cache", cache], stderr=subprocess.PIPE, text=True)
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


def prompts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Windows of the sample texts, a domain after the other."""
    tokens = [tokenizer.encode(file.read_text()[:40_000]) for file in sorted(TEXT.glob("*.txt"))]
    out = []
    for index in range(count):
        domain = tokens[index % len(tokens)]
        start = 97 * index % (len(domain) - PROMPT_TOKENS)
        out.append(domain[start : start + PROMPT_TOKENS])
    return out


async def stream(stub: VllmEngineStub, prompt: list[int], length: int) -> list[tuple[float, int]]:
    """(seconds since sending, tokens) of every chunk."""
    sampling = pb.SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
    request = pb.GenerateRequest(stream=True, sampling_params=sampling)
    request.tokenized.input_ids.extend(prompt)
    began, arrivals = time.monotonic(), []
    async for response in stub.Generate(request):
        if response.HasField("chunk"):
            arrivals.append((time.monotonic() - began, len(response.chunk.token_ids)))
    return arrivals


async def measure(
    address: str, tokenizer: Tokenizer, streams: int, length: int
) -> tuple[float, np.ndarray, np.ndarray]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = VllmEngineStub(channel)
        batch = prompts(tokenizer, streams)
        await asyncio.gather(*(stream(stub, prompt, 8) for prompt in batch))
        began = time.monotonic()
        results = await asyncio.gather(*(stream(stub, prompt, length) for prompt in batch))
        elapsed = time.monotonic() - began
    total = sum(count for arrivals in results for _, count in arrivals)
    first = np.array([arrivals[0][0] for arrivals in results])
    between = np.concatenate([np.diff([at for at, _ in arrivals]) for arrivals in results])
    return total / elapsed, first * 1e3, between * 1e3


def transformers_rate(model: Path, tokenizer: Tokenizer, streams: int, length: int) -> float | None:
    """Tokens a second of batched greedy generation on the same prompts."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.tensor(prompts(tokenizer, streams))
    options = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length, "pad_token_id": 0}
    with torch.no_grad():
        lm.generate(ids, attention_mask=torch.ones_like(ids), **{**options, "min_new_tokens": 8, "max_new_tokens": 8})
        began = time.monotonic()
        lm.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return streams * length / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--mesh", default="dp=1,ep=1")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.model)
    with tempfile.TemporaryDirectory() as cache:
        with server(args.model, args.mesh, cache) as (_, cold):
            pass
        with server(args.model, args.mesh, cache) as (address, warm):
            print(f"{args.model.name} on {args.mesh}: ready after {cold:.1f} s cold, {warm:.1f} s warm\n")
            counts = [int(text) for text in args.streams.split(",")]
            rows = [(count, *asyncio.run(measure(address, tokenizer, count, args.tokens))) for count in counts]
    print(
        "| streams | tokens/s | first token, ms (p50 / p99) | between tokens, ms (p50 / p99) | transformers | ratio |"
    )
    print("|---|---|---|---|---|---|")
    for count, rate, first, between in rows:
        peer = transformers_rate(args.model, tokenizer, count, args.tokens)
        latencies = [
            f"{np.percentile(values, 50):.1f} / {np.percentile(values, 99):.1f}" for values in (first, between)
        ]
        against = f"{peer:.0f} | {rate / peer:.2f}" if peer else "- | -"
        print(f"| {count} | {rate:.0f} | {latencies[0]} | {latencies[1]} | {against} |")


if __name__ == "__main__":
    main()
