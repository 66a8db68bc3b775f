"""Requests of any kind, from the schema: what a careless or a hostile client may send."""

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxmoe.serving.proto import admin_pb2

SERVICES = (pb.DESCRIPTOR.services_by_name["VllmEngine"], admin_pb2.DESCRIPTOR.services_by_name["Admin"])
GENERATE = SERVICES[0].methods_by_name["Generate"]
OTHERS = [method for service in SERVICES for method in service.methods if method.name not in ("Generate", "Drain")]
_F = FieldDescriptor

_SMALL = st.integers(0, 6)
_FLOATS = st.sampled_from([0.0, 0.5, 1.0, -1.0, 1e-30, 1e30, float("inf"), float("nan")])
_TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(["a" * 70_000, "\x00\x1b[2J\n", "{", "[0-9]+", "(" * 300]))


def _numbers(low, high):
    return st.one_of(_SMALL, _SMALL, st.sampled_from([low, high, high // 2 + 1]), st.integers(low, high))


_VALUES = {
    _F.CPPTYPE_INT32: _numbers(-(2**31), 2**31 - 1),
    _F.CPPTYPE_INT64: _numbers(-(2**63), 2**63 - 1),
    _F.CPPTYPE_UINT32: _numbers(0, 2**32 - 1),
    _F.CPPTYPE_UINT64: _numbers(0, 2**64 - 1),
    _F.CPPTYPE_DOUBLE: _FLOATS,
    _F.CPPTYPE_FLOAT: _FLOATS.filter(lambda value: abs(value) != 1e30),
    _F.CPPTYPE_BOOL: st.booleans(),
    _F.CPPTYPE_ENUM: st.integers(0, 3),
}


@st.composite
def of_type(draw, descriptor, depth=3):
    """A message with some of its fields set."""
    message = GetMessageClass(descriptor)()
    if descriptor.fields:
        for field in draw(st.lists(st.sampled_from(list(descriptor.fields)), max_size=4, unique_by=lambda f: f.number)):
            _set(draw, message, field, depth)
    return message


def _set(draw, message, field, depth):
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (_value(draw, field.message_type.fields_by_name[name], depth) for name in ("key", "value"))
        if field.message_type.fields_by_name["value"].message_type is None:
            getattr(message, field.name)[key] = value
    elif field.is_repeated:
        values = [_value(draw, field, depth) for _ in range(draw(st.sampled_from([1, 2, 40])))]
        getattr(message, field.name).extend(values)
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(_value(draw, field, depth))
    else:
        setattr(message, field.name, _value(draw, field, depth))


def _value(draw, field, depth):
    if field.message_type is not None:
        return draw(of_type(field.message_type, depth - 1)) if depth else GetMessageClass(field.message_type)()
    if field.type == _F.TYPE_BYTES:
        return draw(st.binary(max_size=64))
    if field.type == _F.TYPE_STRING:
        return draw(_TEXTS)
    return draw(_VALUES[field.cpp_type])


@st.composite
def generations(draw):
    """A request that could be served, then spoiled, or not, in a few places."""
    request = pb.GenerateRequest(stream=draw(st.booleans()))
    if draw(st.booleans()):
        request.text = draw(st.text(min_size=1, max_size=20))
    else:
        request.tokenized.input_ids.extend(draw(st.lists(st.integers(0, 4095), min_size=1, max_size=40)))
    params = request.sampling_params
    params.max_tokens = draw(st.integers(1, 4))
    descriptor = params.DESCRIPTOR
    for field in draw(st.lists(st.sampled_from(list(descriptor.fields)), max_size=3, unique_by=lambda f: f.number)):
        _set(draw, params, field, 2)
    if draw(st.integers(0, 3)) == 0:
        _set(draw, request, draw(st.sampled_from(list(request.DESCRIPTOR.fields))), 3)
    return request


@st.composite
def calls(draw):
    """A method, and the bytes to send."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.sampled_from([GENERATE, *OTHERS])), draw(st.binary(max_size=200))
    if kind == 1:
        method = draw(st.sampled_from(OTHERS))
        return method, draw(of_type(method.input_type)).SerializeToString()
    # Fields that no version knows yet, now and then.
    unknown = draw(st.sampled_from([b"", b"", b"", b"\xf8\x3f\x01"]))
    return GENERATE, draw(generations()).SerializeToString() + unknown


def send(channel, method, content, timeout):
    """The status that a call ends with; what it answers is read and let go."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    as_it_is = {"request_serializer": None, "response_deserializer": None}
    try:
        if method.server_streaming:
            for _ in channel.unary_stream(path, **as_it_is)(content, timeout=timeout):
                pass
        else:
            channel.unary_unary(path, **as_it_is)(content, timeout=timeout)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK
