import asyncio

from fake_engine import model_info
from harness import serving
from smg_grpc_proto.generated import common_pb2

from jaxmoe.engine.kv_events import KvEvent, KvEventBatch
from jaxmoe.serving.kv_log import KvLog

STORED = KvEvent("stored", (11, 12), None, tuple(range(32)))
CHILD = KvEvent("stored", (13,), 12, tuple(range(32, 48)))


def test_who_comes_late_is_told_the_state_and_then_what_happens():
    async def scenario():
        log = KvLog(num_ranks=2, most=2)
        assert log.since(0) == log.since(7) == []
        batches = [
            KvEventBatch(1, 0, (STORED,)),
            KvEventBatch(2, 1, (KvEvent("stored", (21,), None, tuple(range(16))),)),
            KvEventBatch(3, 0, (CHILD, KvEvent("removed", (11,)))),
            KvEventBatch(4, 1, (KvEvent("cleared"),)),
        ]
        log.take(batches[:2])
        assert [told.batch for told in log.since(0)] == batches[:2]
        log.take(batches[2:])
        assert [told.batch for told in log.since(3)] == batches[2:]
        assert log.since(5) == []
        for number in (0, 1, 2, 99):
            first, second = log.since(number)
            assert (first.batch.number, second.batch.number) == (3, 4)
            assert (first.blocks, second.blocks) == (2, 0)
            # 12's parent is gone, and 13 comes after 12.
            stored = [(12, 11, tuple(range(16, 32))), (13, 12, tuple(range(32, 48)))]
            told = [event for event in first.batch.events if event.kind == "stored"]
            pages = [
                (page, event.parent if n == 0 else event.hashes[n - 1], event.token_ids[16 * n : 16 * n + 16])
                for event in told
                for n, page in enumerate(event.hashes)
            ]
            assert pages == stored
            assert first.batch.events[0].kind == second.batch.events[0].kind == "cleared"

    asyncio.run(scenario())


def test_subscribers_follow_the_engine_each_from_where_it_asks(checkpoint):
    with serving(model_info(checkpoint, prefix_cache=True)) as server:

        def subscribe(start=0):
            call = server.stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(start_sequence_number=start))
            assert call.initial_metadata() is not None  # comes at once, before any event
            return call

        first = subscribe()
        server.engine.kv_batches = [KvEventBatch(1, 0, (STORED,)), KvEventBatch(2, 1, (KvEvent("cleared"),))]
        list(server.generate([5], max_tokens=1))
        batches = [next(first), next(first)]
        assert [(batch.sequence_number, batch.dp_rank) for batch in batches] == [(1, 0), (2, 1)]
        stored = batches[0].events[0].stored
        assert not stored.HasField("parent_block_hash")
        assert [(block.block_hash, list(block.token_ids), block.block_size) for block in stored.blocks] == [
            (11, list(range(16)), 16),
            (12, list(range(16, 32)), 16),
        ]
        assert batches[1].events[0].HasField("cleared")
        resumed = subscribe(2)
        assert next(resumed).sequence_number == 2
        server.engine.kv_batches = [KvEventBatch(3, 0, (CHILD, KvEvent("removed", (12,))))]
        list(server.generate([5], max_tokens=1))
        for call in (first, resumed):
            batch = next(call)
            assert batch.sequence_number == 3
            assert batch.events[0].stored.parent_block_hash == 12
            assert batch.events[1].removed.block_hashes == [12]
        first.cancel()
        resumed.cancel()
