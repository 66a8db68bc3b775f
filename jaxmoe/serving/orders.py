"""What an operator has the engine do or tell between two of its steps, since only its own thread may."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from google.protobuf.message import Message
from jaxtyping import Int
from smg_grpc_proto.generated import common_pb2

from jaxmoe.engine.engine import Engine
from jaxmoe.errors import ConfigError, InvalidRequestError
from jaxmoe.serving.proto import admin_pb2 as pb

_OF_PROFILE = ("output_dir", "num_steps")


class Profiler(Protocol):
    """`jaxmoe.measuring.profile.ProfiledEngine` is one."""

    @property
    def folder(self) -> Path: ...
    def start(self, steps: int | None) -> None: ...
    def stop(self) -> bool: ...


class Orders:
    """Carries out a request by the name of its message.

    profiler: records steps; None where the server was not started to. save_placement: the file for placements.
    """

    def __init__(self, engine: Engine, profiler: Profiler | None = None, save_placement: str | None = None) -> None:
        self._engine, self._profiler, self._file = engine, profiler, save_placement

    def __call__(self, name: str, content: bytes) -> bytes:
        """The serialized response. Raises InvalidRequestError, or ConfigError where the server is not set up for it."""
        made: Message
        match name:
            case "GetExpertLoadRequest":
                made = self._expert_load()
            case "StartRebalanceRequest":
                made = self._start_rebalance(pb.StartRebalanceRequest.FromString(content))
            case "GetRebalanceRequest":
                made = self._rebalance()
            case "SavePlacementRequest":
                made = self._save_placement()
            case "StartProfileRequest":
                made = self._start_profile(common_pb2.StartProfileRequest.FromString(content))
            case "StopProfileRequest":
                made = self._stop_profile()
            case _:
                raise InvalidRequestError(f"there is no order {name!r}")
        return made.SerializeToString()

    def _expert_load(self) -> pb.ExpertLoad:
        statistics = self._engine.statistics
        told = statistics.report()
        if told is None:
            return pb.ExpertLoad()
        layers = self._engine.model.config.stacks["moe"]
        experts, average, devices = statistics.experts(), statistics.average(), statistics.devices()
        return pb.ExpertLoad(
            **{**_shared(pb.ExpertLoad, told), "worst_layer": layers[told.worst_layer]},
            layers=[
                pb.LayerLoad(
                    layer=layer,
                    experts=experts[n].tolist(),
                    average=average[n].tolist(),
                    copies=[pb.DeviceLoads(devices=copy[n].tolist()) for copy in devices],
                )
                for n, layer in zip(range(len(experts)), layers, strict=False)
            ],
        )

    def _start_rebalance(self, request: pb.StartRebalanceRequest) -> pb.Rebalance:
        self._engine.rebalance(self._asked_placement(request) if request.mixtures else None)
        return self._rebalance()

    def _asked_placement(self, request: pb.StartRebalanceRequest) -> Int[np.ndarray, "L S"]:
        model = self._engine.model
        layers, slots = list(model.config.stacks["moe"]), model.slot_expert.shape[1]
        rows = {mixture.layer: list(mixture.slot_expert) for mixture in request.mixtures}
        if sorted(rows) != layers or len(rows) != len(request.mixtures):
            raise InvalidRequestError(
                f"the placement names layers {[mixture.layer for mixture in request.mixtures]}; "
                f"name each of {layers} once, as GetPlacement does",
                "mixtures",
            )
        for layer, row in rows.items():
            if len(row) != slots or max(row) >= model.config.experts:
                raise InvalidRequestError(
                    f"the placement of layer {layer} has {len(row)} slots and experts up to {max(row, default=0)}; "
                    f"there are {slots} slots and {model.config.experts} experts",
                    "mixtures",
                )
        asked = np.array([rows[layer] for layer in layers], np.int32)
        try:
            return model.checked_placement(asked)
        except ConfigError as error:
            raise InvalidRequestError(str(error), "mixtures") from error

    def _rebalance(self) -> pb.Rebalance:
        told = self._engine.last_rebalance
        return pb.Rebalance() if told is None else pb.Rebalance(**_shared(pb.Rebalance, told))

    def _save_placement(self) -> pb.SavePlacementResponse:
        if self._file is None:
            raise ConfigError("this server has no file for placements; start it with --save-placement FILE")
        self._engine.model.save_placement(self._file)
        return pb.SavePlacementResponse(path=str(Path(self._file).resolve()))

    def _start_profile(self, request: common_pb2.StartProfileRequest) -> common_pb2.ProfileResponse:
        profiler = self._recording()
        for field, _ in request.ListFields():
            if field.name not in _OF_PROFILE:
                raise InvalidRequestError(f"{field.name} is not supported; leave it out", field.name)
        if request.HasField("output_dir") and Path(request.output_dir) != profiler.folder:
            raise InvalidRequestError(
                f"recordings go to {profiler.folder}, which the server was started with; leave output_dir out",
                "output_dir",
            )
        steps = request.num_steps if request.HasField("num_steps") else None
        if steps is not None and steps < 1:
            raise InvalidRequestError(f"num_steps={steps} must be at least 1", "num_steps")
        profiler.start(steps)
        return common_pb2.ProfileResponse(success=True, message=f"steps are recorded into {profiler.folder}")

    def _stop_profile(self) -> common_pb2.ProfileResponse:
        if self._recording().stop():
            return common_pb2.ProfileResponse(success=True, message="the recording is written, and is being summed up")
        return common_pb2.ProfileResponse(success=False, message="nothing is recorded now; StartProfile begins")

    def _recording(self) -> Profiler:
        if self._profiler is None:
            raise ConfigError("this server records no steps; start it with --profile DIR (and --profile-steps 0)")
        return self._profiler


def _shared(message: type[Message], report: object) -> dict[str, Any]:
    """What a report tells under the names of the message's fields."""
    return {
        field.name: getattr(report, field.name) for field in message.DESCRIPTOR.fields if hasattr(report, field.name)
    }
