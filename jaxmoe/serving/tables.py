"""What `jaxmoe.v1.Admin` tells of the engine, made in its process: mesh, placement, programs, memory, collectives."""

import collections
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from google.protobuf.message import Message

from jaxmoe.engine.engine import Engine
from jaxmoe.errors import InvalidRequestError
from jaxmoe.planning.memory import kind_of
from jaxmoe.serving.proto import admin_pb2 as pb
from jaxmoe.sharding.hlo import read_collectives


class Tables:
    """Makes a table by the name of its message. May run in a thread beside the engine's: it only reads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._collectives = functools.cache(self._read_collectives)

    def __call__(self, name: str, argument: str = "") -> bytes:
        """The serialized message. Raises InvalidRequestError on an argument that names nothing."""
        made: Message
        match name:
            case "Mesh":
                made = self._mesh()
            case "Placement":
                made = self._placement()
            case "Programs":
                made = self._programs()
            case "Memory":
                made = self._memory()
            case "Collectives":
                made = pb.Collectives(programs=[self._collectives(title) for title in self._titles(argument)])
            case _:
                raise InvalidRequestError(f"there is no table {name!r}")
        return made.SerializeToString()

    def _mesh(self) -> pb.Mesh:
        model = self._engine.model
        spec, devices = model.mesh_spec, model.mesh.devices
        first = devices.flat[0]
        return pb.Mesh(
            dp=spec.dp,
            ep=spec.ep,
            tp=spec.tp,
            expert_axes=spec.axes_of_experts,
            attention_ranks=spec.num_ranks,
            platform=first.platform,
            device_kind=first.device_kind,
            devices=[
                pb.Device(
                    id=device.id, process=device.process_index, dp=dp, ep=ep, tp=tp, attention_rank=dp * spec.ep + ep
                )
                for (dp, ep, tp), device in np.ndenumerate(devices)
            ],
        )

    def _placement(self) -> pb.Placement:
        model = self._engine.model
        slot_expert = np.asarray(model.placement.slot_expert)
        slots = slot_expert.shape[1]
        return pb.Placement(
            experts=model.config.experts,
            slots=slots,
            slots_per_device=slots // model.mesh_spec.expert_devices,
            mixtures=[
                pb.MixturePlacement(layer=layer, slot_expert=row.tolist())
                for layer, row in zip(model.config.stacks["moe"], slot_expert, strict=True)
            ],
        )

    def _programs(self) -> pb.Programs:
        rows = []
        for program in self._engine.programs:
            row = pb.Program(
                title=program.title,
                name=program.name,
                lowering_seconds=program.lowering,
                compiling_seconds=program.compiling,
                cached=program.cached,
            )
            if (told := program.compiled.memory_analysis()) is not None:
                row.argument_bytes = told.argument_size_in_bytes
                row.output_bytes = told.output_size_in_bytes
                row.temporary_bytes = told.temp_size_in_bytes
                row.code_bytes = told.generated_code_size_in_bytes
            rows.append(row)
        return pb.Programs(programs=rows, late_compiles=self._engine.late_compiles)

    def _memory(self) -> pb.Memory:
        model = self._engine.model
        weights: collections.Counter[str] = collections.Counter()
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
            kind = kind_of(jax.tree_util.keystr(path, simple=True, separator="."))
            weights[kind] += bytes_of_a_shard(leaf)
        temporaries = [program.temporary_bytes for program in self._programs().programs]
        return pb.Memory(
            weights=[pb.Weights(kind=kind, bytes=count) for kind, count in weights.most_common()],
            kv_cache_bytes=sum(map(bytes_of_a_shard, self._engine.cache_arrays)),
            temporary_bytes=max(temporaries, default=0),
            devices=list(_device_memory(model.mesh.devices.flat)),
        )

    def _titles(self, program: str) -> list[str]:
        known = [(each.title, each.name) for each in self._engine.programs]
        if not program:
            return [title for title, _ in known]
        for title, name in known:
            if program in (title, name):
                return [title]
        raise InvalidRequestError(f"no program is called {program!r}; GetPrograms lists them", "program")

    def _read_collectives(self, title: str) -> pb.ProgramCollectives:
        (program, *_) = (each for each in self._engine.programs if each.title == title)
        found = collections.Counter(read_collectives(program.compiled.as_text() or "", self._engine.model.mesh.shape))
        return pb.ProgramCollectives(
            title=title,
            collectives=[
                pb.Collective(
                    count=count,
                    kind=one.kind,
                    dtype=one.dtype,
                    shapes=[",".join(map(str, shape)) for shape in one.shapes],
                    bytes=one.bytes,
                    axes=one.axes,
                    in_loop=one.in_loop,
                )
                for one, count in found.items()
            ],
        )


def bytes_of_a_shard(array: Any) -> int:
    """What an array takes on each of its devices."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def _device_memory(devices: Iterable[jax.Device]) -> Iterable[pb.DeviceMemory]:
    for device in devices:
        if told := device.memory_stats():
            yield pb.DeviceMemory(
                id=device.id,
                bytes_in_use=told.get("bytes_in_use", 0),
                peak_bytes_in_use=told.get("peak_bytes_in_use", 0),
                bytes_limit=told.get("bytes_limit", 0),
            )
