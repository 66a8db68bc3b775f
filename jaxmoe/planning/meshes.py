"""Other meshes for the same load: which of as many devices would be faster, and how few devices are enough."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

from jaxmoe.errors import ConfigError, MeshError
from jaxmoe.planning.deployment import Deployment
from jaxmoe.planning.hardware import Device
from jaxmoe.planning.memory import Memory, memory
from jaxmoe.planning.roofline import StepTime, step_time
from jaxmoe.sharding.mesh import MeshSpec

MOST_DEVICES = 4096


class Option(NamedTuple):
    """A mesh that serves the load: every sequence of all ranks, at full context."""

    deployment: Deployment
    memory: Memory
    decode: StepTime

    @property
    def spec(self) -> MeshSpec:
        return self.deployment.spec


def options(deployment: Deployment, device: Device, devices: int) -> list[Option]:
    """All layouts on as many devices, those that fit first, the fastest decode first.

    Experts over dp and ep lie as they do over ep alone on the mesh of one dp: a layout that two meshes give is listed
    once, as the deployment's own where that is one of them.
    """
    own, found = deployment.spec, []
    for spec in _meshes(devices):
        if own.num_devices == devices and _layout(spec) == _layout(own):
            spec = own
        try:
            other = deployment if spec == deployment.spec else deployment.on(spec)
        except (MeshError, ConfigError):  # which leaves no room for copies of experts
            continue
        found.append(Option(other, memory(other, device), step_time(other, other.decode, device)))
    return sorted(found, key=lambda each: (not each.memory.fits, _seconds_a_token(each)))


def smallest(deployment: Deployment, device: Device) -> Option | None:
    """The fastest of those that fit among meshes of the fewest devices, a power of two; None if none fits."""
    devices = 1
    while devices <= MOST_DEVICES:
        best = next(iter(options(deployment, device, devices)), None)
        if best is not None and best.memory.fits:
            return best
        devices *= 2
    return None


def _layout(spec: MeshSpec) -> tuple[int, int]:
    return spec.tp, spec.expert_devices


def _seconds_a_token(option: Option) -> float:
    # A batch that ranks do not divide is rounded up on each: what counts is the load, not the rows.
    return option.decode.seconds / option.deployment.sequences


@functools.cache
def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _meshes(devices: int) -> Iterator[MeshSpec]:
    for tp in _divisors(devices):
        for ep in _divisors(devices // tp):
            yield MeshSpec(devices // tp // ep, ep, tp)
