import itertools
import struct

import grpc
import pytest
from fake_engine import model_info
from harness import generate_request, serving

from jaxmoe.client import Client
from jaxmoe.serving.proto import admin_pb2

ASKS = [("jaxmoe-routed-experts", "1")]


@pytest.fixture(scope="module")
def recording(checkpoint):
    with serving(model_info(checkpoint, routed_experts=True)) as server:
        yield server


def ask(server, prompt, metadata=ASKS, **fields):
    return list(server.stub.Generate(generate_request(prompt, **fields), metadata=metadata, timeout=30))


def routed(message):
    """What a chunk or a `complete` tells beside what its own schema has; None if nothing."""
    told = admin_pb2.RoutedTokens.FromString(message.SerializeToString())
    return told.routed_experts if told.HasField("routed_experts") else None


def test_every_chunk_tells_where_its_tokens_went(recording):
    *chunks, end = ask(recording, [5, 6, 7], stream=True, max_tokens=4)
    told = [routed(each.chunk) for each in chunks]
    assert [experts for each in told for experts in each.experts] == [n for p in range(6) for n in (p, p + 300)]
    assert (told[0].start, told[0].layers, told[0].k) == (0, 2, 1)
    assert len(told[0].experts) >= 6
    for before, after in itertools.pairwise(told):
        assert after.start == before.start + len(before.experts) // 2
    assert routed(end.complete) is None


def test_the_client_asks_by_a_field_of_its_parameters(recording):
    with Client(recording.address) as client:
        told = [delta.routed_experts for delta in client.stream([5, 6, 7], max_tokens=4, routed_experts=True)][:-1]
        assert told[0].start == 0
        whole = b"".join(each.experts for each in told)
        assert struct.unpack("<12H", whole) == tuple(n for p in range(6) for n in (p, p + 300))
        assert {delta.routed_experts for delta in client.stream([5, 6, 7], max_tokens=4)} == {None}


def test_a_whole_answer_tells_it_all_at_once_for_every_sample(recording):
    answers = ask(recording, [5, 6, 7], n=2, max_tokens=4)
    for answer in answers:
        assert list(routed(answer.complete).experts) == [n for p in range(6) for n in (p, p + 300)]
        assert answer.complete.output_ids


def test_who_does_not_ask_is_told_nothing(recording):
    for metadata in ([], [("jaxmoe-routed-experts", "0")]):
        (answer,) = ask(recording, [5], metadata, max_tokens=2)
        assert routed(answer.complete) is None


def test_a_server_that_does_not_record_says_what_to_do(server):
    with pytest.raises(grpc.RpcError) as error:
        ask(server, [5], max_tokens=2)
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "--routed-experts" in error.value.details()
