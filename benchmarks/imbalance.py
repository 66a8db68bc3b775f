"""What uneven experts cost the steps of an engine, and what helps: replicas, moving experts, placing requests by load.

    python benchmarks/imbalance.py [--traffic mixtral,deepseek,uniform,zipf] [--steps 300] [--batch 8]

`mixtral` and `deepseek`: the trained demo models, two copies of the experts over four devices each. Of the requests
seven in ten continue code, and after half of the steps French; the others any domain of `text`. `uniform` and `zipf`: a
DeepSeek-like model of random weights over eight devices, routing simulated; `uniform` is what is left of a tail when no
expert is hot. Requests follow one another so that as many are live all the time, the same for every option:

* `nothing`: as many slots as experts, in order; requests go to the rank with the fewest tokens, as in a server.
* `by number`: they go to the copy of the experts that has the fewest of them, there to the rank that has.
* `by load`: to the copy whose fullest device they raise least, by what their domain was counted to ask for before;
  a server knows less. Simulated routing asks nothing of a request, and there the last two are left out.
* `replicas`: more slots, the first experts twice.
* `EPLB live`: the same slots, planned anew every 64 calls and moved while it serves, from within the warm-up on.

Virtual devices share this machine's cores: time between tokens (ITL) shows the work of all devices and not the wait for
one. What a step waits for on devices of their own is the load of the fullest, summed over layers; it does not
depend on the machine. Its percentiles are those of steps that only decode.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

import jaxmoe
from jaxmoe.api import LoadedModel
from jaxmoe.engine.config import Rebalance
from jaxmoe.engine.request import Request, SamplingParams
from jaxmoe.models.decoder import Execution
from jaxmoe.moe.balancing import Loads, device_loads

TEXT = Path(__file__).parent / "text"
DOMAINS = ("prose", "drama", "code", "french", "german", "spanish", "chat")
LEADS, LEADING = ("code", "french"), 0.7
PROMPT, SHORTEST, LONGEST = 16, 48, 144  # tokens
INTERVAL, WARM_UP, PROFILED = 64, 128, 40  # calls, steps, steps for each domain


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model on a mesh. redundant: slots beyond one an expert, for options that have them."""

    model: Mapping[str, str]
    mesh: str
    redundant: int
    simulate: str | None = None


DEEPSEEK_LIKE = {"random_weights": "deepseek-v3:scale=64,num_hidden_layers=6,vocab_size=4096"}
SETTINGS = {
    "mixtral": Setting({"path": "demo:mixtral"}, "dp=2,ep=4", 4),
    "deepseek": Setting({"path": "demo:deepseek-v3"}, "dp=2,ep=4", 8),
    "uniform": Setting(DEEPSEEK_LIKE, "dp=1,ep=8", 32, "uniform"),
    "zipf": Setting(DEEPSEEK_LIKE, "dp=1,ep=8", 32, "zipf:1.2"),
}


class Option(NamedTuple):
    """placed: by "tokens", as the scheduler does, by "number" or by "load"."""

    redundant: bool
    moves: bool
    placed: str


OPTIONS = {
    "nothing": Option(False, False, "tokens"),
    "by number": Option(False, False, "number"),
    "by load": Option(False, False, "load"),
    "replicas": Option(True, False, "tokens"),
    "EPLB live": Option(True, True, "tokens"),
    "EPLB live by number": Option(True, True, "number"),
    "EPLB live by load": Option(True, True, "load"),
}


class Traffic:
    """Prompts of domains, drawn in a seeded order."""

    def __init__(self, model: LoadedModel, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._vocabulary = model.config.vocab_size
        self._tokens: dict[str, list[int]] = {}
        if model.folder is not None:
            for domain in DOMAINS:
                text = (TEXT / f"{domain}.txt").read_text(encoding="utf-8")
                self._tokens[domain] = model.tokenizer.encode(text)
        self._numbers = itertools.count()

    def domain(self, lead: str) -> str:
        return lead if self._rng.random() < LEADING else str(self._rng.choice(DOMAINS))

    def request(self, domain: str) -> Request:
        number = next(self._numbers)
        if tokens := self._tokens.get(domain):
            start = int(self._rng.integers(len(tokens) - PROMPT))
            prompt = tuple(tokens[start : start + PROMPT])
        else:
            prompt = tuple(self._rng.integers(self._vocabulary, size=PROMPT).tolist())
        length = int(self._rng.integers(SHORTEST, LONGEST))
        params = SamplingParams(temperature=1.0, seed=number, max_tokens=length, ignore_eos=True)
        return Request(str(number), prompt, params)


class Placer:
    """The rank for a request: of the copies the one whose fullest device it raises least, there the emptiest rank."""

    def __init__(self, model: LoadedModel, profiles: Mapping[str, Loads], most: int) -> None:
        self._model, self._most = model, most
        self._profiles = {domain: loads / loads.sum() for domain, loads in profiles.items()}
        self._placed: dict[str, tuple[str, int]] = {}

    def place(self, request: Request, domain: str) -> Request:
        spec = self._model.mesh_spec
        ranks, devices = spec.num_ranks, spec.expert_devices
        slots = self._model.slot_expert[: len(self._profiles[domain])]
        of = {name: device_loads(slots, loads, devices) for name, loads in self._profiles.items()}
        carried = np.zeros((ranks // devices, *of[domain].shape))
        held = np.zeros(ranks, int)
        for name, rank in self._placed.values():
            carried[rank // devices] += of[name]
            held[rank] += 1

        def raised(rank: int) -> tuple[float, float, int]:
            after = carried.copy()
            after[rank // devices] += of[domain]
            return float(after.max(axis=(0, 2)).sum()), float(np.square(after).sum()), int(held[rank])

        rank = min((rank for rank in range(ranks) if held[rank] < self._most), key=raised)
        self._placed[request.id] = domain, rank
        return dataclasses.replace(request, rank=rank)

    def end(self, name: str) -> None:
        del self._placed[name]


class Step(NamedTuple):
    """seconds: since the last. decodes: it did nothing else. fullest, even: summed over layers, as `CallLoads`."""

    seconds: float
    decodes: bool
    fullest: int
    even: float


class Measured(NamedTuple):
    """gaps: seconds from a token of a request to its next. moved: experts, of rebalances that ended meanwhile."""

    steps: list[Step]
    gaps: Float[np.ndarray, "tokens"]
    moved: int


class Client:
    """Keeps so many requests live on an engine. Its own time does not count as the engine's."""

    def __init__(self, engine: jaxmoe.Engine, traffic: Traffic, live: int, placer: Placer | None) -> None:
        self._engine, self._traffic, self._count, self._placer = engine, traffic, live, placer
        self._clock = 0.0
        self._last: dict[str, float | None] = {}

    def serve(self, leads: Iterator[str]) -> Measured:
        """One step for each of the domains that lead."""
        steps, gaps, moved = [], [], 0
        for lead in leads:
            while len(self._last) < self._count:
                domain = self._traffic.domain(lead)
                request = self._traffic.request(domain)
                self._engine.submit(self._placer.place(request, domain) if self._placer else request)
                self._last[request.id] = None
            # What a step brings, and what it counted, is that of the one launched before.
            calls, moving, launched = self._engine.statistics.num_calls, self._moving, self._engine.last_step
            began = time.perf_counter()
            outputs = self._engine.step()
            took = time.perf_counter() - began
            self._clock += took
            for output in outputs:
                before = self._last[output.request_id]
                if before is not None:
                    gaps.append(self._clock - before)
                self._last[output.request_id] = self._clock
                if output.finish_reason:
                    del self._last[output.request_id]
                    if self._placer:
                        self._placer.end(output.request_id)
            if moving and not self._moving and (report := self._engine.last_rebalance):
                moved += report.moved_experts
            calls = self._engine.statistics.num_calls - calls
            fullest, even = self._engine.statistics.calls()
            if 0 < calls <= len(even):  # after experts have moved the statistics begin anew
                summed = int(fullest[-calls:].sum()), float(even[-calls:].sum() * fullest.shape[1])
                steps.append(Step(took, launched.prefill_tokens == 0, *summed))
        return Measured(steps, np.array(gaps), moved)

    @property
    def _moving(self) -> bool:
        report = self._engine.last_rebalance
        return report is not None and report.outcome == "running"


def load(setting: Setting, option: Option) -> LoadedModel:
    return jaxmoe.load(
        mesh=setting.mesh,
        redundant_experts=setting.redundant if option.redundant else 0,
        # Of the strategies on a CPU the one that has queues, and so rounds.
        execution=Execution(strategy="all_to_all"),
        simulate_routing=setting.simulate,
        **setting.model,
    )


def engine_of(model: LoadedModel, option: Option, batch: int) -> jaxmoe.Engine:
    # Twice the room that is needed: on full ranks there would be nothing to choose.
    config = jaxmoe.EngineConfig(
        max_batch=2 * batch,
        max_context=256,
        max_prefill_tokens=4 * PROMPT,
        rebalance=Rebalance(interval=INTERVAL) if option.moves else None,
    )
    return jaxmoe.Engine(model, config)


def profiles_of(setting: Setting, batch: int) -> dict[str, Int[np.ndarray, "L E"]]:
    """What each domain asks for when it is alone."""
    model = load(setting, OPTIONS["nothing"])
    engine, found = engine_of(model, OPTIONS["nothing"], batch), {}
    for domain in DOMAINS:
        traffic = Traffic(model, 1)
        for _ in range(batch * model.num_ranks):
            engine.submit(traffic.request(domain))
        engine.statistics.restart()
        for _ in range(PROFILED):
            engine.step()
        found[domain] = engine.statistics.experts()
        for number in range(batch * model.num_ranks):
            engine.cancel(str(number))
        engine.step()
    return found


def row(name: str, engine: jaxmoe.Engine, measured: Measured) -> str:
    steps, report = measured.steps, engine.statistics.report()
    assert report is not None
    itl = np.percentile(measured.gaps * 1e3, (50, 95, 99))
    fullest = np.percentile([step.fullest for step in steps if step.decodes], (50, 95, 99))
    cells = (
        name,
        " / ".join(f"{value:.1f}" for value in itl),
        f"{itl[2] / itl[0]:.2f}",
        " / ".join(f"{value:.0f}" for value in fullest),
        f"{fullest[2] / fullest[0]:.2f}",
        f"{sum(step.fullest for step in steps) / sum(step.even for step in steps):.2f}",
        f"{report.rounds:.2f} ({report.most_rounds})",
        f"{report.balancedness:.3f} ({report.of_ceiling:.2f})",
        str(measured.moved),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traffic", default=",".join(SETTINGS))
    parser.add_argument("--option", default=",".join(OPTIONS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="requests live on a rank, on average")
    args = parser.parse_args()
    jaxmoe.virtual_devices(8)
    columns = ("traffic, option", "ITL p50 / p95 / p99, ms", "p99 / p50", "fullest device p50 / p95 / p99, tokens x K",
               "p99 / p50", "over the mean", "rounds (most)", "balancedness (of ceiling)", "moved")  # fmt: skip
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for name in args.traffic.split(","):
        setting, profiles = SETTINGS[name], {}
        for title in args.option.split(","):
            option = OPTIONS[title]
            if option.placed != "tokens" and setting.simulate:
                continue
            if option.placed == "load":
                profiles = profiles or profiles_of(setting, args.batch)
            model = load(setting, option)
            engine = engine_of(model, option, args.batch)
            alike = dict.fromkeys(DOMAINS, np.ones((1, model.config.experts)))
            placer = None
            if option.placed != "tokens":
                placer = Placer(model, profiles if option.placed == "load" else alike, 2 * args.batch)
            client = Client(engine, Traffic(model, 0), args.batch * model.num_ranks, placer)
            client.serve(itertools.repeat(LEADS[0], WARM_UP))
            measured = client.serve(LEADS[step * len(LEADS) // args.steps] for step in range(args.steps))
            print(row(f"{name}, {title}", engine, measured), flush=True)


if __name__ == "__main__":
    main()
