"""From `dp=2,ep=4` to a `jax.sharding.Mesh` with an explicit expert axis.

Axes: `dp` splits requests, `ep` requests and experts, `tp` heads, expert width and vocabulary. Experts lie over `ep`, a
copy for every `dp` coordinate, or over `dp` and `ep` together, on every device once. Every (dp, ep) coordinate is an
*attention rank* that owns its requests and their KV pages.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxmoe.errors import MeshError

AXES = ("dp", "ep", "tp")
RANKS = ("dp", "ep")
EXPERT_AXES = (("ep",), RANKS)


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """How many devices lie along each axis. `MeshSpec.parse("dp=2,ep=4")` reads the command line's form.

    expert_axes: over which axes the experts are spread: ("ep",) or ("dp", "ep").
    """

    dp: int = 1
    ep: int = 1
    tp: int = 1
    expert_axes: tuple[str, ...] = ("ep",)

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if not isinstance(size, int) or size < 1:
                raise MeshError(f"mesh axis {axis}={size!r} must be a whole number of at least 1")
        if self.expert_axes not in EXPERT_AXES:
            choices = " or ".join(",".join(axes) for axes in EXPERT_AXES)
            raise MeshError(f"expert axes {','.join(self.expert_axes)!r} are not supported; use {choices}")

    @classmethod
    def parse(cls, text: str, expert_axes: str = "ep") -> "MeshSpec":
        """Reads `axis=size,...` with axes dp, ep, tp in any order; an absent axis is 1. Raises MeshError.

        expert_axes: "ep" or "dp,ep".
        """
        sizes: dict[str, int] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            axis, equals, size = (piece.strip() for piece in part.partition("="))
            if not equals or axis not in AXES:
                raise MeshError(f"mesh {text!r}: {part!r} is not one of dp=N, ep=N, tp=N; write for example dp=2,ep=4")
            if axis in sizes:
                raise MeshError(f"mesh {text!r}: axis {axis} is given twice")
            if not size.isascii() or not size.isdigit() or int(size) < 1:
                raise MeshError(f"mesh {text!r}: {axis}={size} must be a whole number of at least 1")
            sizes[axis] = int(size)
        return cls(**sizes, expert_axes=tuple(axis.strip() for axis in expert_axes.split(",")))

    @property
    def num_devices(self) -> int:
        return self.dp * self.ep * self.tp

    @property
    def num_ranks(self) -> int:
        """Attention ranks: (dp, ep) coordinates."""
        return self.dp * self.ep

    @property
    def axes_of_experts(self) -> str:
        """As the command line has it: "ep" or "dp,ep"."""
        return ",".join(self.expert_axes)

    @property
    def expert_devices(self) -> int:
        """Devices over which one copy of the experts is spread, each with its `tp` peers."""
        return math.prod(getattr(self, axis) for axis in self.expert_axes)

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES if axis != "tp" or self.tp > 1)


def make_mesh(spec: MeshSpec) -> Mesh:
    """The mesh over the first `spec.num_devices` devices, all axes of explicit type.

    Raises MeshError when they are too few.
    """
    devices = jax.devices()
    if spec.num_devices > len(devices):
        hint = (
            f"; on a CPU call jaxmoe.virtual_devices({spec.num_devices}) before the first computation"
            if devices[0].platform == "cpu"
            else ""
        )
        raise MeshError(
            f"mesh {spec} needs {spec.num_devices} devices and {len(devices)} {devices[0].platform} "
            f"{'is' if len(devices) == 1 else 'are'} here{hint}; or use a mesh of at most {len(devices)}"
        )
    chosen = devices[: spec.num_devices]
    shape = tuple(getattr(spec, axis) for axis in AXES)
    if chosen[0].platform == "cpu":
        return Mesh(np.array(chosen).reshape(shape), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=chosen)


def slots_for(num_experts: int, spec: MeshSpec, redundant: int = 0) -> int:
    """Physical slots: one for each logical expert and `redundant` more, rounded up to as many on every device."""
    return math.ceil((num_experts + redundant) / spec.expert_devices) * spec.expert_devices
