"""Which experts tokens went to, on the wire: a field that vLLM's messages do not know, for calls that ask for it."""

import struct

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from jaxmoe.engine.request import RoutedExperts
from jaxmoe.serving.proto import admin_pb2 as pb

ASKS = "jaxmoe-routed-experts"  # metadata of such a call, "1"


def add_routed(message: Message, routed: RoutedExperts | None) -> None:
    """Adds it to a chunk or a `complete`."""
    if routed is not None:
        experts = struct.unpack(f"<{len(routed.experts) // 2}H", routed.experts)
        told = pb.RoutedExperts(start=routed.start, layers=routed.layers, k=routed.k, experts=experts)
        message.MergeFromString(pb.RoutedTokens(routed_experts=told).SerializeToString())


def read_routed(message: Message) -> RoutedExperts | None:
    """What `add_routed` has added."""
    if not len(UnknownFieldSet(message)):
        return None
    told = pb.RoutedTokens.FromString(message.SerializeToString())
    if not told.HasField("routed_experts"):
        return None
    routed = told.routed_experts
    experts = struct.pack(f"<{len(routed.experts)}H", *routed.experts)
    return RoutedExperts(routed.start, routed.layers, routed.k, experts)
