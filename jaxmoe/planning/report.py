"""A plan as text: tables of at most 100 columns, the same figures as `as_json` gives to machines."""

from typing import Any

from jaxmoe.engine.batch import StepShape
from jaxmoe.planning.ahead import Compiled
from jaxmoe.planning.deployment import Deployment
from jaxmoe.planning.hardware import GIB, Device
from jaxmoe.planning.memory import Memory, workspace
from jaxmoe.planning.meshes import Option
from jaxmoe.planning.roofline import StepTime

MIB, BILLION = 2**20, 1e9
ROWS_OF_MESHES = 5
NOTEWORTHY = 1.01  # times as fast; a roofline tells no smaller difference


def title(plan: Deployment, device: Device) -> list[str]:
    count, spec = plan.subject.count, plan.spec
    total, active, mtp = (number / BILLION for number in (count.total, count.active, count.mtp))
    further = f", {mtp:,.1f} B more predict a token further" if count.mtp else ""
    return [
        f"{plan.subject.name} on {_mesh(spec)}: {spec.num_devices} x {device.name}",
        f"  model   {total:,.1f} B parameters, {active:,.1f} B active a token{further}; {plan.subject.dtype}",
        f"  device  {device.describe(plan.itemsize)}",
        f"  load    {plan.limits.max_batch} sequences on each of {spec.num_ranks} ranks, {plan.context:,} tokens each; "
        f"prefill of {plan.prefill.tokens * plan.prefill.batch:,} tokens a rank",
        *_layout(plan),
    ]


def memory_table(plan: Deployment, memory: Memory, device: Device) -> list[str]:
    rows = [(kind, size, "") for kind, size in memory.weights.items() if size]
    if plan.config.mtp_layers:
        rows[-1] = ("mtp", memory.weights["mtp"], "the layer that predicts a token further")
    per_token = memory.sequence / plan.context
    rows.append(("weights", memory.all_weights, ""))
    rows.append(
        ("KV pages", memory.kv, f"{plan.limits.max_batch} x {plan.context:,} tokens, {_kib(per_token)} each a rank")
    )
    if memory.moving:
        rows.append(("room to move", memory.moving, "one layer's experts, and one on its way"))
    rows.append(("workspace", memory.workspace.total, f"largest in {memory.largest}"))
    rows.append(("needed", memory.needed, f"of {_gib(memory.limit)} that can be used ({device.usable:.0%})"))
    if memory.loading > memory.all_weights:
        rows.append(("at the start", memory.loading, f"weights at most: experts arrive in {plan.subject.dtype}"))
    lines = ["", f"MEMORY               GiB on each of {plan.spec.num_devices} devices"]
    for name, size, note in rows:
        indent = "  " if name in memory.weights else ""
        lines.append(f"  {indent + name:<20}{size / GIB:>9.2f}{'   ' + note if note else ''}")
    room = int(memory.kv_capacity / per_token)
    lines.append(
        f"  Weights leave room for {room:,} tokens of KV a rank, {room * plan.spec.num_ranks:,} in all: "
        f"{int(memory.kv_capacity // memory.sequence):,} sequences each."
    )
    return lines


def verdict(plan: Deployment, memory: Memory, smallest: Option | None) -> list[str]:
    """What does not fit, by how much, and what would."""
    sizes = {
        **memory.weights,
        "KV pages": memory.kv,
        "room to move": memory.moving,
        "workspace": memory.workspace.total,
    }
    largest = max(sizes, key=lambda name: sizes[name])
    why = f"needs {_gib(memory.needed)} on each device, {_gib(sizes[largest])} of it {largest}"
    if memory.needed <= memory.limit:
        why = f"serves in {_gib(memory.needed)} on each device, but starts with {_gib(memory.loading)}"
    lines = [f"DOES NOT FIT: {why}; {_gib(memory.limit)} can be used."]
    if smallest is None:
        return [*lines, "No mesh of powers of two up to 4,096 devices fits it either."]
    other = smallest.deployment
    lines.append(
        f"The smallest mesh that does is {_mesh(smallest.spec)}: {smallest.spec.num_devices} devices, "
        f"{_gib(smallest.memory.needed)} on each, {other.limits.max_batch} sequences a rank."
    )
    return lines


def step_table(name: str, plan: Deployment, shape: StepShape, step: StepTime) -> list[str]:
    """name: "DECODE" or "PREFILL"."""
    each = step.tokens_per_second / plan.spec.num_devices
    pace = "a token" if shape.tokens == 1 else "a step"
    lines = [
        "",
        f"{name}: at best {step.seconds * 1e3:,.2f} ms {pace}, bound by {step.bound}; "
        f"{step.tokens_per_second:,.0f} tokens/s, {each:,.0f} a device",
    ]
    if step.drafts:
        none = (step.tokens - step.drafts) / step.seconds
        lines.append(f"  if every draft is right, and {none:,.0f} tokens/s if none is; mtp is what drafting takes")
    lines += [
        f"  {'part':<20}{'GiB read':>9}{'ms':>9}{'GFLOP':>11}{'ms':>9}{'network ms':>12}{'all ms':>9}",
    ]
    forward = [(part.name, [part]) for part in step.parts if not part.drafts and part.name != "norms"]
    drafting = [part for part in step.parts if part.drafts]
    for label, parts in [*forward, ("mtp", drafting)] if drafting else forward:
        read, flops = sum(part.bytes for part in parts), sum(part.flops for part in parts)
        memory, compute, network, together = (
            sum(map(of, parts)) * 1e3 for of in (step.memory, step.compute, lambda part: part.network, step.of_part)
        )
        lines.append(
            f"  {label:<20}{read / GIB:>9.2f}{memory:>9.2f}{flops / 1e9:>11,.0f}"
            f"{compute:>9.2f}{network:>12.2f}{together:>9.2f}"
        )
    if plan.config.stacks["moe"]:
        mixture = plan.mixture(shape)
        lines.append(
            f"  {mixture.tokens * mixture.devices:,} tokens choose {mixture.choices} of {plan.config.experts} experts: "
            f"{step.active_slots:.1f} of a device's {plan.slots // mixture.devices} slots are read a layer."
        )
    lines += _exchange_rows(plan, shape, step)
    return lines


def _exchange_rows(plan: Deployment, shape: StepShape, step: StepTime) -> list[str]:
    if not step.exchanges:
        return ["  no collectives"]
    lines = [f"  {'collective':<24}{'kind':<20}{'axes':<8}{'a step':>7}{'MiB each':>11}{'us each':>10}"]
    for each in step.exchanges:
        seconds = step.device.seconds(each.kind, each.sent, each.axes, plan.spec)
        lines.append(
            f"  {each.what:<24}{each.kind:<20}{','.join(each.axes):<8}{each.times:>7}{each.bytes / MIB:>11.3f}"
            f"{seconds * 1e6:>10.1f}"
        )
    if plan.spec.expert_devices > 1 and plan.config.stacks["moe"]:
        lines.append(f"  dispatch: {plan.strategy(shape)}" + _why(plan))
    return lines


def meshes_table(plan: Deployment, options: list[Option]) -> list[str]:
    """The best meshes of as many devices, and where this one stands."""
    rank = next(number for number, each in enumerate(options) if each.spec == plan.spec)
    shown = list(range(min(ROWS_OF_MESHES, len(options))))
    shown += [rank] if rank not in shown else []
    lines = [
        "",
        f"MESHES of {plan.spec.num_devices} devices for the same {plan.sequences:,} sequences, fastest decode first",
        f"  {'mesh':<24}{'experts over':<14}{'a rank':>7}{'GiB':>8}{'decode ms':>11}{'tokens/s':>11}  bound by",
    ]
    for number in shown:
        each = options[number]
        deployment, spec = each.deployment, each.spec
        bound = each.decode.bound + ("" if each.memory.fits else "; does not fit")
        mark = ">" if number == rank else " "
        pace = plan.sequences / each.decode.seconds
        lines.append(
            f"{mark} {spec!s:<24}{spec.axes_of_experts:<14}{deployment.limits.max_batch:>7}"
            f"{each.memory.needed / GIB:>8.1f}{each.decode.seconds * 1e3:>11.2f}{pace:>11,.0f}  {bound}"
        )
    return [*lines, "  " + _advice(options[rank], options[0])]


def _advice(own: Option, best: Option) -> str:
    gain = own.decode.seconds / best.decode.seconds
    if not best.memory.fits:
        return "None of them fits."
    if not own.memory.fits:
        return f"{_mesh(best.spec)} fits, and decodes in {best.decode.seconds * 1e3:,.2f} ms."
    if gain < NOTEWORTHY:
        return "No mesh of as many devices decodes faster."
    return f"{_mesh(best.spec)} would decode {gain:.2f} times as fast."


def compiled_table(plan: Deployment, memory: Memory, topology: str, compiled: list[Compiled]) -> list[str]:
    """What the compiler says of each step, beside what is planned."""
    lines = [
        "",
        f"COMPILED for {topology}, by libtpu: GiB of each device, as planned and as compiled",
        f"  {'step':<40}{'arguments':>16}{'temporaries':>16}{'output':>9}{'compiled in':>13}",
    ]
    fixed = memory.all_weights + memory.kv
    for each in compiled:
        space = workspace(plan, each.shape)
        lines.append(
            f"  {each.shape!s:<40}{fixed / GIB:>8.2f}{each.arguments / GIB:>8.2f}"
            f"{space.total / GIB:>8.2f}{each.temporaries / GIB:>8.2f}{each.output / GIB:>9.2f}{each.seconds:>11.1f} s"
        )
    for each in compiled:
        if each.collectives is None:
            lines += ["", f"  {each.shape}: this jaxlib cannot read the text of a program of this libtpu"]
            continue
        lines += [
            "",
            f"  {each.shape}: in its text, where one in a loop stands once",
            f"  {'collective':<24}{'axes':<12}{'count':>7}{'MiB in all':>12}",
        ]
        for (kind, axes), (count, size) in sorted(each.collectives.items()):
            lines.append(f"  {kind:<24}{','.join(axes):<12}{count:>7}{size / MIB:>12.3f}")
    most = max(each.needed for each in compiled)
    verdict = "fits" if most <= memory.limit else "DOES NOT FIT"
    lines += ["", f"  The larger takes {_gib(most)} of {_gib(memory.limit)} that can be used: {verdict}."]
    return lines


def as_json(
    plan: Deployment,
    device: Device,
    memory: Memory,
    steps: dict[str, StepTime],
    options: list[Option],
    smallest: Option | None,
) -> dict[str, Any]:
    """Bytes and seconds, unrounded. smallest: the smallest mesh that fits, where this one does not."""
    count = plan.subject.count
    return {
        "model": plan.subject.name,
        "mesh": str(plan.spec),
        "expert_axes": plan.spec.axes_of_experts,
        "device": device.name,
        "devices": plan.spec.num_devices,
        "dtype": str(plan.subject.dtype),
        "expert_dtype": str(plan.subject.expert_dtype or plan.subject.dtype),
        "speculate": plan.limits.speculate,
        "parameters": {"total": count.total, "active": count.active, "mtp": count.mtp},
        "fits": memory.fits,
        "memory": {
            "usable": memory.limit,
            "weights": memory.weights,
            "at_start": memory.loading,
            "kv": memory.kv,
            "kv_of_a_token": memory.sequence / plan.context,
            "kv_capacity": memory.kv_capacity,
            "moving": memory.moving,
            "workspace": memory.workspace.total,
            "needed": memory.needed,
        },
        "steps": {
            name: {
                "seconds": step.seconds,
                "bound": step.bound,
                "tokens_per_second": step.tokens_per_second,
                "drafts_per_second": step.drafts / step.seconds,
                "parts": [part._asdict() for part in step.parts],
                "collectives": [each._asdict() for each in step.exchanges],
            }
            for name, step in steps.items()
        },
        "meshes": list(map(_option_as_json, options)),
        "smallest_that_fits": smallest and _option_as_json(smallest),
    }


def _option_as_json(option: Option) -> dict[str, Any]:
    return {
        "mesh": str(option.spec),
        "expert_axes": option.spec.axes_of_experts,
        "devices": option.spec.num_devices,
        "sequences_a_rank": option.deployment.limits.max_batch,
        "fits": option.memory.fits,
        "needed": option.memory.needed,
        "decode_seconds": option.decode.seconds,
    }


def _mesh(spec: Any) -> str:
    return str(spec) + (f" --expert-axes {spec.axes_of_experts}" if len(spec.expert_axes) > 1 else "")


def _layout(plan: Deployment) -> list[str]:
    spec, lines = plan.spec, []
    if plan.config.stacks["moe"]:
        copies, kept = spec.num_ranks // spec.expert_devices, plan.subject.expert_dtype
        stored = f" in {kept}," if kept else ""
        lines.append(
            f"{plan.slots // spec.expert_devices} of {plan.slots} expert slots a device,{stored} "
            f"for {plan.config.experts} experts; {copies} {'copy' if copies == 1 else 'copies'} of them"
        )
    if spec.tp > 1:
        lines.append(f"tp splits {', '.join(sorted(plan.rules.split))}")
    if plan.whole:
        lines.append(f"tp leaves {', '.join(sorted(plan.whole))} whole")
    return [f"  layout  {line}" for line in lines]


def _why(plan: Deployment) -> str:
    return " (as asked)" if plan.execution.strategy != "auto" else ", the cheapest by jaxmoe.moe.strategy"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"


def _kib(size: float) -> str:
    return f"{size / 1024:,.1f} KiB"
