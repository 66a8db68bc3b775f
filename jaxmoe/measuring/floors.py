"""How far a measured phase is from what the machine allows: bytes and operations it must touch, and what it took."""

import dataclasses
import statistics
from collections.abc import Sequence

from jaxmoe.engine.batch import StepShape
from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.model import Model
from jaxmoe.measuring.breakdown import Breakdown
from jaxmoe.measuring.machine import Machine
from jaxmoe.measuring.phases import Timed
from jaxmoe.measuring.scopes import PARTS
from jaxmoe.planning.deployment import Deployment, Subject
from jaxmoe.planning.hardware import GB
from jaxmoe.planning.roofline import StepTime, step_time

MB = 1e6
# The planner's parts of a step by the part of the model that does them.
_PARTS_OF = {
    "attention": ("attention", "KV and scores"),
    "experts": ("experts",),
    "feed-forward": ("shared experts", "dense feed-forward"),
    "dispatch": ("router",),
    "lm_head": ("embedding, lm_head",),
    "other": ("norms", "mtp"),
}


@dataclasses.dataclass(frozen=True)
class Needed:
    """What a part must touch on all devices together, and the seconds that this takes at least."""

    bytes: float
    flops: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Floor:
    """A phase as measured, and as it would be on this machine if nothing but the needful were done.

    parts: of the model, and what each needs. found: where the time of the `recorded` steps went, which are slower than
        the `timed` ones by what recording takes.
    """

    timed: Timed
    recorded: Timed
    step: StepTime
    parts: dict[str, Needed]
    found: Breakdown

    @property
    def needed(self) -> Needed:
        parts = self.parts.values()
        return Needed(sum(each.bytes for each in parts), sum(each.flops for each in parts), self.step.seconds)

    @property
    def taken(self) -> float:
        """Seconds: the median."""
        return statistics.median(self.timed.seconds)

    @property
    def ratio(self) -> float:
        return self.taken / self.needed.seconds

    @property
    def slowdown(self) -> float:
        """By recording."""
        return statistics.median(self.recorded.seconds) / self.taken

    @property
    def tokens_per_second(self) -> float:
        return self.timed.tokens / self.taken


def floor_of(
    model: Model,
    machine: Machine,
    timed: Timed,
    recorded: Timed,
    found: Breakdown,
    page_size: int,
    redundant_experts: int = 0,
    speculate: str | None = None,
) -> Floor:
    """Weights are read once, but of experts only those that routing is expected to choose; each key and value once.

    redundant_experts: as `Model` was given them. speculate: as the engine was configured.
    A prefill is taken as one pass over the prompt, whatever it is split into.
    """
    phase, devices = timed.phase, model.mesh_spec.num_devices
    drafts = 1 if speculate and phase.kind == "decode" else 0
    batch, tokens = (1, phase.size) if phase.kind == "prefill" else (phase.size, 1 + drafts)
    plan = Deployment(
        Subject(model.name, type(model.abstract), model.config, model.dtype, model.expert_dtype),
        model.mesh_spec,
        EngineConfig(page_size=page_size, max_batch=batch, max_context=timed.context, speculate=speculate),
        model.execution,
        redundant_experts,
    )
    shape = StepShape(batch, tokens, -(-timed.context // page_size), drafts=drafts)
    step = step_time(plan, shape, machine.device(devices))
    parts = dict.fromkeys(PARTS, Needed(0.0, 0.0, 0.0))
    for name, of_plan in _PARTS_OF.items():
        chosen = [part for part in step.parts if part.name in of_plan]
        parts[name] = Needed(
            sum(part.bytes for part in chosen) * devices,
            sum(part.flops for part in chosen) * devices,
            sum(map(step.of_part, chosen)),
        )
    return Floor(timed, recorded, step, parts, found)


def cache_notes(machine: Machine, model: Model) -> list[str]:
    """Warnings where a cache may hold the weights, so that memory's bandwidth is no floor, or what measured it."""
    weights = model.num_parameters * model.dtype.itemsize
    cache = f"The largest cache ({machine.cache / MB:,.0f} MB)"
    notes = []
    if weights <= machine.cache:
        notes.append(f"{cache} may hold the weights ({weights / MB:,.0f} MB): steps can be quicker than memory allows.")
    if machine.streamed < 2 * machine.cache:
        notes.append(f"{cache} may hold much of what was read to measure the bandwidth: memory may be slower.")
    return notes


def summary_table(floors: Sequence[Floor]) -> list[str]:
    """A row a phase."""
    lines = [
        f"  {'phase':<26}{'MB':>10}{'GFLOP':>9}{'floor, ms':>11}{'taken, ms':>12}{'from':>11}{'to':>11}"
        f"{'ratio':>7}{'tokens/s':>10}"
    ]
    for each in floors:
        needed, seconds = each.needed, each.timed.seconds
        lines.append(
            f"  {each.timed.phase!s:<26}{needed.bytes / MB:>10,.1f}{needed.flops / GB:>9,.2f}"
            f"{needed.seconds * 1e3:>11.3f}{each.taken * 1e3:>12.3f}{min(seconds) * 1e3:>11.3f}"
            f"{max(seconds) * 1e3:>11.3f}{each.ratio:>7.2f}{each.tokens_per_second:>10,.0f}"
        )
    return lines


def parts_table(floor: Floor) -> list[str]:
    """Where a phase's time goes, and what each part must take. Times are the shares that recorded steps showed."""
    found, timed = floor.found, floor.timed
    lines = [
        f"{timed.phase}, {timed.context:,} tokens of context: bound by {floor.step.bound}"
        + (f", {floor.step.active_slots:.1f} expert slots a layer and device" if floor.step.active_slots else "")
        + f"; {floor.slowdown:.2f} times as long while recorded",
        f"  {'part':<20}{'MB':>10}{'GFLOP':>10}{'floor, ms':>11}{'taken, ms':>11}{'ratio':>8}{'share':>8}",
    ]
    for name, share in found.shares.items():
        needed, taken = floor.parts.get(name, Needed(0.0, 0.0, 0.0)), share * floor.taken
        if not needed.seconds and not share:
            continue
        ratio = f"{taken / needed.seconds:.2f}" if needed.seconds and name != "other" else ""
        lines.append(
            f"  {name:<20}{needed.bytes / MB:>10,.2f}{needed.flops / GB:>10,.3f}{needed.seconds * 1e3:>11.3f}"
            f"{taken * 1e3:>11.3f}{ratio:>8}{share:>8.1%}"
        )
    return lines


def phases_table(timed: Sequence[Timed]) -> list[str]:
    """A row a phase: milliseconds of a prefill or a decode step."""
    lines = [f"  {'phase':<26}{'context':>9}{'median, ms':>12}{'from':>10}{'to':>10}{'tokens/s':>11}"]
    for each in timed:
        median = statistics.median(each.seconds)
        lines.append(
            f"  {each.phase!s:<26}{each.context:>9,}{median * 1e3:>12.3f}{min(each.seconds) * 1e3:>10.3f}"
            f"{max(each.seconds) * 1e3:>10.3f}{each.tokens / median:>11,.0f}"
        )
    return lines
