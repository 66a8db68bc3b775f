"""`jaxmoe.v1.Admin`: what an operator asks a server. `proto/admin.proto` documents it."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from jaxmoe.serving.proto import admin_pb2 as pb
from jaxmoe.serving.proto.admin_pb2_grpc import AdminServicer
from jaxmoe.serving.remote_engine import RemoteEngine
from jaxmoe.serving.status import answer

ADMIN_SERVICE = pb.DESCRIPTOR.services_by_name["Admin"].full_name

_M = TypeVar("_M", bound=Message)


class Admin(AdminServicer):
    """drain: ends the server as SIGTERM does."""

    def __init__(self, engine: RemoteEngine, drain: Callable[[], object]) -> None:
        self._engine = engine
        self._drain = drain

    async def GetMesh(self, request: pb.GetMeshRequest, context: grpc.aio.ServicerContext) -> pb.Mesh:
        return await self._table(pb.Mesh, context)

    async def GetPlacement(self, request: pb.GetPlacementRequest, context: grpc.aio.ServicerContext) -> pb.Placement:
        return await self._table(pb.Placement, context)

    async def GetExpertLoad(self, request: pb.GetExpertLoadRequest, context: grpc.aio.ServicerContext) -> pb.ExpertLoad:
        return await self._ordered(request, pb.ExpertLoad, context)

    async def StartRebalance(
        self, request: pb.StartRebalanceRequest, context: grpc.aio.ServicerContext
    ) -> pb.Rebalance:
        return await self._ordered(request, pb.Rebalance, context)

    async def GetRebalance(self, request: pb.GetRebalanceRequest, context: grpc.aio.ServicerContext) -> pb.Rebalance:
        return await self._ordered(request, pb.Rebalance, context)

    async def SavePlacement(
        self, request: pb.SavePlacementRequest, context: grpc.aio.ServicerContext
    ) -> pb.SavePlacementResponse:
        return await self._ordered(request, pb.SavePlacementResponse, context)

    async def GetPrograms(self, request: pb.GetProgramsRequest, context: grpc.aio.ServicerContext) -> pb.Programs:
        return await self._table(pb.Programs, context)

    async def GetMemory(self, request: pb.GetMemoryRequest, context: grpc.aio.ServicerContext) -> pb.Memory:
        return await self._table(pb.Memory, context)

    async def GetCollectives(
        self, request: pb.GetCollectivesRequest, context: grpc.aio.ServicerContext
    ) -> pb.Collectives:
        return await self._table(pb.Collectives, context, request.program)

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: grpc.aio.ServicerContext) -> pb.Metrics:
        return pb.Metrics(
            time=time.time(),
            samples=[
                pb.Sample(name=name, labels=labels, value=value)
                for name, labels, value in self._engine.metrics.samples()
                if name.startswith(request.prefix)
            ],
        )

    async def Drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext) -> pb.DrainResponse:
        self._drain()
        return pb.DrainResponse(open_requests=self._engine.num_open)

    async def _ordered(self, request: Message, response: type[_M], context: Any) -> _M:
        content = self._engine.order(request.DESCRIPTOR.name, request.SerializeToString())
        return await answer(content, response, context)

    async def _table(self, message: type[_M], context: Any, argument: str = "") -> _M:
        return await answer(self._engine.table(message.DESCRIPTOR.name, argument), message, context)
