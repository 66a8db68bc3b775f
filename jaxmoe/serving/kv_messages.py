"""What a subscriber to KV events is told: batches as messages, and what each rank carries beside them."""

import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Sequence

from smg_grpc_proto.generated import common_pb2

from jaxmoe.serving.kv_log import Told
from jaxmoe.serving.link import RankLoad
from jaxmoe.serving.metrics import waiting_by_rank
from jaxmoe.serving.remote_engine import RemoteEngine

# Load records: how long after an event, and how often all of them though nothing has changed.
_HEARTBEAT, _BEATS = 1.0, 5


async def kv_messages(
    engine: RemoteEngine, start: int, *, loads_at_once: bool
) -> AsyncGenerator[common_pb2.KvEventBatch, None]:
    """From the batch of this number on, or from the present state; see `jaxmoe.serving.kv_log.KvLog.begin`.

    loads_at_once: a rank's load is told before the first batch of it is, with number 0.
    """
    info = engine.info
    # A record alone has the number of its rank's last batch.
    last = dict.fromkeys(range(info.num_ranks), 0) if loads_at_once else {}
    records = _LoadRecords(engine)
    async with contextlib.aclosing(engine.kv_events(start, _HEARTBEAT)) as events:
        async for told in events:
            if told is not None:
                batch = _batch(told, info.page_size)
                if (record := records.of_rank(told.batch.rank)) is not None:
                    batch.load.CopyFrom(record)
                last[told.batch.rank] = batch.sequence_number
                yield batch
                continue
            for rank, record in records.beat():
                if rank in last:
                    message = common_pb2.KvEventBatch(sequence_number=last[rank], dp_rank=rank, load=record)
                    message.timestamp = time.time()
                    yield message


class _LoadRecords:
    """What each rank carries, as one subscriber is told it."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine
        self._sample = self._beats = 0
        self._told: dict[int, common_pb2.EngineLoad] = {}
        self._heard: float | None = None
        self._waiting: list[int] = []
        self._uncached: list[int] = []

    def of_rank(self, rank: int) -> common_pb2.EngineLoad | None:
        """Beside an event; None before the engine has told anything."""
        ranks, age = self._engine.reported
        return self._record(ranks, rank, age) if ranks else None

    def beat(self) -> Iterator[tuple[int, common_pb2.EngineLoad]]:
        """Of ranks where something has changed, and now and then of all."""
        ranks, age = self._engine.reported
        self._beats += 1
        self._heard = None  # requests come though the engine is silent
        for number, rank in enumerate(ranks):
            record = self._record(ranks, number, age)
            silence = self._engine.silence
            core = common_pb2.EngineLoad()
            core.CopyFrom(record)
            core.ClearField("sample")
            core.ClearField("age_ms")
            if core == self._told.get(number) and silence is None and self._beats % _BEATS:
                continue
            self._told[number] = core
            record.load_only = record.engine_reports_steps = True
            record.cache_hit_rate = rank.hit_rate
            record.num_used_tokens = rank.used_pages * self._engine.info.page_size
            record.max_total_num_tokens = rank.total_pages * self._engine.info.page_size
            record.prefill_pending_tokens = self._engine.prefilling_tokens
            if silence is not None:
                record.engine_silence_ms = int(1000 * silence)
            yield number, record

    def _record(self, ranks: Sequence[RankLoad], number: int, age: float) -> common_pb2.EngineLoad:
        engine, rank = self._engine, ranks[number]
        self._sample += 1
        if self._heard != engine.last_word:  # once for all that a step brings
            self._heard = engine.last_word
            self._waiting = waiting_by_rank(ranks, engine.unplaced(ranks))
            self._uncached = engine.waiting_tokens(len(ranks))
        usage = rank.used_pages / max(1, rank.total_pages)
        return common_pb2.EngineLoad(
            running_requests=rank.running,
            waiting_requests=self._waiting[number],
            waiting_uncached_tokens=self._uncached[number],
            token_usage=usage,
            active_token_usage=usage,
            gen_throughput=rank.throughput if engine.num_live else 0.0,
            max_running_requests=engine.info.max_running // len(ranks),
            age_ms=int(1000 * age),
            sample=self._sample,
        )


def _batch(told: Told, page_size: int) -> common_pb2.KvEventBatch:
    number, rank, events = told.batch
    message = common_pb2.KvEventBatch(sequence_number=number, timestamp=time.time(), dp_rank=rank)
    if told.blocks is not None:
        message.snapshot.count, message.snapshot.blocks = 1, told.blocks
    for index, event in enumerate(events):
        one = message.events.add(event_id=index if told.blocks is None else 0)
        match event.kind:
            case "cleared":
                one.cleared.SetInParent()
            case "removed":
                one.removed.block_hashes.extend(event.hashes)
            case "stored":
                if event.parent is not None:
                    one.stored.parent_block_hash = event.parent
                for n, page in enumerate(event.hashes):
                    tokens = event.token_ids[n * page_size : (n + 1) * page_size]
                    one.stored.blocks.add(block_hash=page, token_ids=tokens, block_size=page_size)
    return message
