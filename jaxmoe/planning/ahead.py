"""The real steps, compiled without weights: for devices that are here, or by libtpu for a TPU slice that is not."""

import importlib.util
import os
import time
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.engine.batch import StepShape
from jaxmoe.engine.executables import Executables
from jaxmoe.errors import ConfigError, MeshError
from jaxmoe.models.config import ModelConfig
from jaxmoe.models.decoder import Decoder, Execution
from jaxmoe.models.kv_cache import cache_shapes
from jaxmoe.moe.placement import initial_placement
from jaxmoe.planning.deployment import Deployment
from jaxmoe.planning.memory import pages_of_a_sequence
from jaxmoe.sharding import read_collectives
from jaxmoe.sharding.mesh import AXES, MeshSpec

# Read by libtpu: without them it asks the network of Google's cloud which TPU this machine is, for minutes.
NO_TPU_HERE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}


class Unloaded:
    """A model on a mesh as far as compiling its steps goes: shapes in the place of arrays (see `Executables`)."""

    def __init__(self, plan: Deployment, mesh: Mesh) -> None:
        self.config: ModelConfig = plan.config
        self.mesh = mesh
        self.num_ranks = plan.spec.num_ranks
        self.execution: Execution = plan.execution
        family, config, dtype = plan.subject.family, plan.config, plan.subject.dtype
        with jax.set_mesh(mesh):
            self.abstract: Decoder = nnx.eval_shape(
                lambda: family(config, plan.slots, dtype, nnx.Rngs(0), plan.rules, plan.subject.expert_dtype)
            )
        self.params: Any = jax.tree.map(self._on_mesh, nnx.to_pure_dict(nnx.state(self.abstract)))
        placement = initial_placement(len(config.stacks["moe"]), config.experts, plan.slots)
        self.placement: Any = jax.tree.map(lambda array: self._struct(array.shape, array.dtype, P()), placement)

    def _on_mesh(self, leaf: Any) -> jax.ShapeDtypeStruct:
        return self._struct(leaf.shape, leaf.dtype, leaf.sharding.spec)

    def _struct(self, shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))


def unloaded_steps(plan: Deployment, mesh: Mesh) -> Executables:
    """The step programs of a deployment with a full batch of pages, which can be compiled and not run."""
    model = Unloaded(plan, mesh)
    pages = tuple(count * plan.limits.max_batch for count in pages_of_a_sequence(plan))
    cache = cache_shapes(plan.config, mesh, plan.rules, pages, plan.limits.page_size, plan.subject.dtype)
    return Executables(model, cache, plan.packing, plan.limits.speculate is not None)


Collectives: TypeAlias = dict[tuple[str, tuple[str, ...]], tuple[int, int]]


class Compiled(NamedTuple):
    """What a compiler says of a step; bytes are of one device.

    temporaries: beside arguments (weights, pages, batch) and `output`, which is what is not written over these.
    collectives: by kind and axes, how many there are and their bytes; None if the program's text cannot be read.
    A collective in the body of a loop counts once, however often it runs.
    """

    shape: StepShape
    seconds: float
    arguments: int
    temporaries: int
    output: int
    collectives: Collectives | None

    @property
    def needed(self) -> int:
        return self.arguments + self.temporaries + self.output


def compile_step(steps: Executables, shape: StepShape, mesh: Mesh) -> Compiled:
    began = time.monotonic()
    program = steps.compile(shape)
    seconds = time.monotonic() - began
    told = program.memory_analysis()
    return Compiled(
        shape,
        seconds,
        told.argument_size_in_bytes,
        told.temp_size_in_bytes,
        told.output_size_in_bytes - told.alias_size_in_bytes,
        _collectives(program, mesh),
    )


def _collectives(program: Any, mesh: Mesh) -> Collectives | None:
    try:
        text = program.as_text() or ""
    except jax.errors.JaxRuntimeError:
        # libtpu hands programs over in a form that a jaxlib of another version may not know.
        return None
    found: Collectives = {}
    for one in read_collectives(text, mesh.shape):
        count, size = found.get((one.kind, one.axes), (0, 0))
        found[one.kind, one.axes] = (count + 1, size + one.bytes)
    return found


def tpu_mesh(name: str, topology: str, spec: MeshSpec) -> Mesh:
    """The mesh over a described slice, for example "v5p" and "4x4x8". Raises ConfigError or MeshError.

    Only its description is here: programs can be compiled for it and not run.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("--aot compiles with libtpu, which is not installed; pip install 'jaxmoe[tpu]'")
    for variable, value in NO_TPU_HERE.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import mesh_utils, topologies

    try:
        described = topologies.get_topology_desc(f"{name}:{topology}", platform="tpu")
    except Exception as error:
        raise ConfigError(f"--aot tpu:{name}:{topology}: libtpu has no such slice: {error}") from error
    devices = described.devices
    if len(devices) != spec.num_devices:
        raise MeshError(
            f"mesh {spec} has {spec.num_devices} devices and the slice {name}:{topology} has {len(devices)}; "
            "they must be as many"
        )
    shape = tuple(getattr(spec, axis) for axis in AXES)
    grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    return Mesh(np.asarray(grid), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def parse_slice(text: str) -> tuple[str, str]:
    """("v5p", "4x4x8") of "tpu:v5p:4x4x8". Raises ConfigError."""
    platform, *rest = text.split(":")
    if platform != "tpu" or len(rest) != 2 or not all(rest):
        raise ConfigError(f"--aot {text!r} is not of the form tpu:NAME:TOPOLOGY, for example tpu:v5p:4x4x8")
    return rest[0], rest[1]
