"""From `dp=2,ep=4` to a `jax.sharding.Mesh` with an explicit expert axis.

Axes: `dp` replicates experts and splits requests, `ep` splits experts and requests, `tp` splits heads, expert width and
vocabulary. Every (dp, ep) coordinate is an *attention rank* that owns its requests and their KV pages.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxmoe.errors import MeshError

AXES = ("dp", "ep", "tp")
RANKS = ("dp", "ep")


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """How many devices lie along each axis. `MeshSpec.parse("dp=2,ep=4")` reads the command line's form."""

    dp: int = 1
    ep: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if not isinstance(size, int) or size < 1:
                raise MeshError(f"mesh axis {axis}={size!r} must be a whole number of at least 1")

    @classmethod
    def parse(cls, text: str) -> "MeshSpec":
        """Reads `axis=size,...` with axes dp, ep, tp in any order; an absent axis is 1. Raises MeshError."""
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
        return cls(**sizes)

    @property
    def num_devices(self) -> int:
        return self.dp * self.ep * self.tp

    @property
    def num_ranks(self) -> int:
        """Attention ranks: (dp, ep) coordinates."""
        return self.dp * self.ep

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


def spec_of(mesh: Mesh) -> MeshSpec:
    return MeshSpec(**{axis: mesh.shape[axis] for axis in AXES})


def slots_for(num_experts: int, spec: MeshSpec, redundant: int = 0) -> int:
    """Physical slots: at least one per logical expert plus `redundant`, rounded up to fill every device along `ep`."""
    return math.ceil((num_experts + redundant) / spec.ep) * spec.ep
