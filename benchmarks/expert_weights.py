"""Experts' weights in fewer bits: how far the answers move, what memory and time it saves.

    python benchmarks/expert_weights.py [--models demo:mixtral,demo:deepseek-v3,demo:llama4] [--speed PRESET_OR_FOLDER]

Quality, on the embedded models' held-out text (`benchmarks/text`): the mean over tokens of the KL divergence of the
next token's distribution from that of float32 weights, the share of tokens whose most likely successor stays, and the
cross-entropy of the text itself. Speed: seconds of decode steps at batch 1, 8 and 32, 128 tokens into the context, of a
model large enough for weights to matter, as ratios to float32 in the same run, kinds in alternation.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxmoe
from jaxmoe.api import LoadedModel
from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.request import Request, SamplingParams

TEXT = Path(__file__).parent / "text"
WINDOW, WINDOWS = 256, 4  # tokens, and how many of each domain
KINDS: dict[str, dict[str, str]] = {
    "float32": {},
    "experts bfloat16": {"expert_weights": "bfloat16"},
    "experts int8": {"expert_weights": "int8"},
    "experts float8": {"expert_weights": "float8"},
    "all bfloat16": {"dtype": "bfloat16"},
    "bfloat16, experts int8": {"dtype": "bfloat16", "expert_weights": "int8"},
    "bfloat16, experts float8": {"dtype": "bfloat16", "expert_weights": "float8"},
}
BATCHES, CONTEXT, STEPS, ROUNDS = (1, 8, 32), 128, 16, 3


def windows(model: LoadedModel) -> np.ndarray:
    """Held-out text of every domain, [rows, WINDOW]."""
    rows = []
    for file in sorted(TEXT.glob("*.txt")):
        tokens = model.tokenizer.encode(file.read_text())
        rows += [tokens[at : at + WINDOW] for at in range(0, WINDOW * WINDOWS, WINDOW) if at + WINDOW <= len(tokens)]
    return np.asarray(rows, np.int32)


def log_probabilities(model: LoadedModel, rows: np.ndarray) -> np.ndarray:
    return np.concatenate([jax.nn.log_softmax(model.logits(part), axis=-1) for part in np.split(rows, len(rows))])


def quality(name: str) -> None:
    print(f"\n{name}\n\n| weights | experts, MB | KL, nats a token | same likeliest | cross-entropy |")
    print("|---|---|---|---|---|")
    reference: Any = None
    for kind, options in KINDS.items():
        model = jaxmoe.load(name, **options)
        rows = windows(model)
        found = log_probabilities(model, rows)
        reference = found if reference is None else reference
        divergence = np.mean(np.sum(np.exp(reference) * (reference - found), axis=-1))
        same = np.mean(reference.argmax(-1) == found.argmax(-1))
        entropy = -np.mean(np.take_along_axis(found[:, :-1], rows[:, 1:, None], axis=-1))
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params["experts"])) / 1e6
        print(f"| {kind} | {held:.1f} | {divergence:.6f} | {same:.2%} | {entropy:.4f} |", flush=True)


def decode_step(engine: jaxmoe.Engine, batch: int) -> float:
    """Seconds of one step in which so many sequences decode; the median."""
    params = SamplingParams(temperature=0, max_tokens=STEPS + 4, ignore_eos=True)
    for index in range(batch):
        prompt = np.random.default_rng(index).integers(5, 1000, CONTEXT)
        engine.submit(Request(f"{index}", tuple(map(int, prompt)), params))
    steps = []
    while engine.has_work:
        began = time.perf_counter()
        outputs = engine.step()
        if len(outputs) == batch:
            steps.append(time.perf_counter() - began)
    return statistics.median(steps[2:])


def speed(model: str) -> None:
    where: dict[str, Any] = {"path": model} if Path(model).exists() else {"random_weights": model}
    limits = EngineConfig(max_batch=max(BATCHES), max_context=256, warm_up=False)
    engines = {kind: jaxmoe.Engine(jaxmoe.load(**where, **options), limits) for kind, options in KINDS.items()}
    taken: dict[tuple[str, int], list[float]] = {}
    for turn in range(ROUNDS + 1):
        for kind, engine in engines.items():
            for batch in BATCHES:
                seconds = decode_step(engine, batch)
                if turn:  # the first compiles
                    taken.setdefault((kind, batch), []).append(seconds)
    print(
        f"\n{model}\n\n| weights | parameters, MB | "
        + " | ".join(f"ms at batch {each}, times as fast" for each in BATCHES)
    )
    print("|" + "---|" * (len(BATCHES) + 2))
    for kind, engine in engines.items():
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.model.params)) / 1e6
        cells = []
        for batch in BATCHES:
            own, plain = (statistics.median(taken[each, batch]) for each in (kind, "float32"))
            cells.append(f"{own * 1e3:.1f}, {plain / own:.2f}")
        print(f"| {kind} | {held:.0f} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo:mixtral,demo:deepseek-v3,demo:llama4")
    parser.add_argument("--speed", metavar="PRESET_OR_FOLDER", help="a model to time too")
    args = parser.parse_args()
    for name in filter(None, args.models.split(",")):
        quality(name)
    if args.speed:
        speed(args.speed)


if __name__ == "__main__":
    main()
