import asyncio

from fake_engine import model_info
from harness import serving
from smg_grpc_proto.generated import common_pb2

from jaxmoe.engine.kv_events import KvEvent, KvEventBatch
from jaxmoe.serving.kv_log import KvLog

STORED = KvEvent("stored", (11, 12), None, tuple(range(32)))
CLEARED = (KvEvent("cleared"),)
CHILD = KvEvent("stored", (13,), 12, tuple(range(32, 48)))


def numbered(batches, before=100):
    """As a log numbers them: each rank's by itself."""
    last = {}
    for _, rank, events in batches:
        last[rank] = last.get(rank, before) + 1
        yield KvEventBatch(last[rank], rank, events)


BATCHES = [
    KvEventBatch(1, 0, (STORED,)),
    KvEventBatch(2, 1, (KvEvent("stored", (21,), None, tuple(range(16))),)),
    KvEventBatch(3, 0, (CHILD, KvEvent("removed", (11,)))),
    KvEventBatch(4, 1, CLEARED),
]


def batches_of(told):
    assert all(each.blocks is None for each in told)
    return [each.batch for each in told]


def test_who_comes_late_is_told_the_state_and_then_what_happens():
    async def scenario():
        log = KvLog(num_ranks=2, most=2, before=100)
        told = list(numbered(BATCHES))
        assert log.begin(0) == ([], 0)
        # A number from before a restart, when nothing has happened since.
        assert [(each.batch.number, each.batch.events) for each in log.begin(77)[0]] == [(100, CLEARED)] * 2
        log.take(BATCHES[:2])
        begun, place = log.begin(0)
        assert batches_of(begun) == told[:2]
        log.take(BATCHES[2:])
        assert batches_of(log.after(place)[0]) == told[2:]
        assert log.after(log.begin(0)[1])[0] == []
        for begun in (log.begin(0), log.begin(1), log.begin(102), log.begin(199), log.after(0)):
            (first, second), place = begun
            assert log.after(place) == ([], place)
            assert (first.batch.number, second.batch.number) == (102, 102)
            assert (first.blocks, second.blocks) == (2, 0)
            # 12's parent is gone, and 13 comes after 12.
            stored = [(12, 11, tuple(range(16, 32))), (13, 12, tuple(range(32, 48)))]
            pages = [
                (page, event.parent if n == 0 else event.hashes[n - 1], event.token_ids[16 * n : 16 * n + 16])
                for event in first.batch.events
                if event.kind == "stored"
                for n, page in enumerate(event.hashes)
            ]
            assert pages == stored
            assert first.batch.events[0].kind == second.batch.events[0].kind == "cleared"

    asyncio.run(scenario())


def test_the_subscriber_of_one_rank_goes_on_where_it_was():
    async def scenario():
        log = KvLog(num_ranks=1, most=2, before=100)
        assert log.begin(101) == ([], 0)
        log.take([KvEventBatch(n, 0, (STORED,)) for n in (1, 2, 3)])
        assert [batch.number for batch in batches_of(log.begin(102)[0])] == [102, 103]
        assert log.begin(104) == ([], 3)
        for number in (0, 101, 105):  # no longer, and not yet
            (snapshot,), _ = log.begin(number)
            assert (snapshot.batch.number, snapshot.blocks) == (103, 2)

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
        number = batches[0].sequence_number
        assert number > 2**50  # no number from before a restart is as high
        assert [(batch.sequence_number, batch.dp_rank) for batch in batches] == [(number, 0), (number, 1)]
        assert [batch.load.max_running_requests for batch in batches] == [48, 48]
        stored = batches[0].events[0].stored
        assert not stored.HasField("parent_block_hash")
        assert [(block.block_hash, list(block.token_ids), block.block_size) for block in stored.blocks] == [
            (11, list(range(16)), 16),
            (12, list(range(16, 32)), 16),
        ]
        assert batches[1].events[0].HasField("cleared")
        resumed = subscribe(number + 1)
        snapshots = [next(resumed), next(resumed)]
        assert [(each.sequence_number, each.dp_rank, each.snapshot.blocks) for each in snapshots] == [
            (number, 0, 2),
            (number, 1, 0),
        ]
        server.engine.kv_batches = [KvEventBatch(3, 0, (CHILD, KvEvent("removed", (12,))))]
        list(server.generate([5], max_tokens=1))
        for call in (first, resumed):
            batch = next(batch for batch in call if not batch.load.load_only)
            assert batch.sequence_number == number + 1
            assert batch.events[0].stored.parent_block_hash == 12
            assert batch.events[1].removed.block_hashes == [12]
        # When nothing happens in the cache any more, what ranks carry is told all the same.
        record = next(batch for batch in first if batch.load.load_only)
        assert (record.sequence_number - number, len(record.events)) == ({0: 1, 1: 0}[record.dp_rank], 0)
        assert record.load.cache_hit_rate in (0.75, 0)
        before = subscribe()
        for call in (first, resumed, before):
            call.cancel()


def test_a_subscriber_may_ask_for_loads_before_anything_has_happened(checkpoint):
    with serving(model_info(checkpoint, prefix_cache=True)) as server:
        call = server.stub.SubscribeKvEvents(
            common_pb2.SubscribeKvEventsRequest(load_records_before_first_batch=True), timeout=30
        )
        records = [next(call), next(call)]
        assert [(record.sequence_number, record.dp_rank) for record in records] == [(0, 0), (0, 1)]
        assert all(record.load.load_only for record in records)
        call.cancel()
