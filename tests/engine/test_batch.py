import dataclasses

import jax
import numpy as np
import pytest

from jaxmoe.engine.batch import GATHERED, READ_IN_USE, Buckets, Packing, StepShape
from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.pages import PageGroup
from jaxmoe.engine.request import Request, SamplingParams
from jaxmoe.engine.scheduler import Chunk, Scheduler
from jaxmoe.spans import FULL, Span

CONFIG = EngineConfig(page_size=4, max_batch=4, max_prefill_tokens=16, max_prefill_sequences=2)
WINDOW, CHUNK = Span("window", 8), Span("chunk", 16)


def running(spans, lengths, steps):
    """The chunks of the step after so many."""
    scheduler = Scheduler(
        CONFIG,
        num_ranks=1,
        groups=[PageGroup(span, 500) for span in spans],
        max_context=1000,
        eos_token_ids=frozenset(),
        vocab_size=1000,
    )
    for index, length in enumerate(lengths):
        params = SamplingParams(
            temperature=index / 4, top_k=index, top_p=1 / (index + 1), min_p=index / 8, seed=2**32 - 1 - index
        )
        scheduler.submit(Request(str(index), tuple(range(length)), params))
    for _ in range(steps):
        plan = scheduler.schedule()
        scheduler.complete(plan, {chunk.sequence.request.id: (1, 0.0) for chunk in plan.chunks})
    return scheduler.schedule()


@pytest.mark.parametrize("spans", [(FULL,), (WINDOW,), (CHUNK, FULL)], ids=str)
def test_what_is_packed_on_the_host_is_unpacked_on_the_device(spans):
    packing = Packing(spans, 4)
    (chunks,) = running(spans, (50, 3, 21), 7).decodes
    assert len(chunks) == 3
    shape = StepShape(4, 1, 64)
    (row,) = packing.pack(shape, [chunks])
    batch = jax.tree.map(np.asarray, packing.unpack(jax.numpy.asarray(row), shape))
    assert batch.length.tolist() == [1, 1, 1, 0]
    for index, chunk in enumerate(chunks):
        sequence, params = chunk.sequence, chunk.sequence.request.params
        assert batch.tokens[index].tolist() == sequence.tokens[-1:]
        assert batch.start[index] == sequence.num_computed
        assert batch.temperature[index] == params.temperature
        assert batch.top_k[index] == params.top_k
        assert batch.top_p[index] == np.float32(params.top_p)
        assert batch.min_p[index] == params.min_p
        assert batch.seed.view(np.uint32)[index] == params.seed
        for span, table, first, pages in zip(spans, batch.tables, batch.firsts, sequence.tables.pages, strict=True):
            assert table[index, : len(pages)].tolist() == list(pages)
            assert first[index] <= span.first(chunk.start) < first[index] + 4


def test_tables_are_as_wide_as_the_context_or_as_what_the_span_reaches():
    packing = Packing((FULL, WINDOW, CHUNK), 4)
    assert packing.widths(StepShape(1, 1, 64)) == (64, 3, 4)
    assert packing.widths(StepShape(1, 16, 64)) == (64, 7, 8)
    assert packing.widths(StepShape(1, 1, 2)) == (2, 2, 2)


@pytest.mark.parametrize("economy", [GATHERED, READ_IN_USE], ids=["gathered", "read in use"])
@pytest.mark.parametrize("spans", [(FULL,), (WINDOW,), (Span("window", 400),), (CHUNK, WINDOW), (CHUNK, FULL)], ids=str)
def test_every_step_fits_a_bucket_and_no_two_buckets_are_the_same_program(spans, economy):
    packing = Packing(spans, 4)
    buckets = Buckets(CONFIG, 1000, packing, economy)
    shapes = list(buckets)
    programs = {(shape.batch, shape.tokens, packing.widths(shape)) for shape in shapes}
    assert len(programs) == len(shapes)
    for lengths, steps in [((3, 5), 0), ((60, 3, 900), 0), ((60, 3, 7), 5), ((900, 3), 30), ((900, 3, 4), 100)]:
        plan = running(spans, lengths, steps)
        calls = buckets.prefills(plan.prefills) if any(plan.prefills) else []
        if any(plan.decodes):
            calls.append((buckets.decode_shape(plan.decodes), plan.decodes))
        assert calls
        for shape, ranks in calls:
            assert shape in shapes
            packing.pack(shape, ranks)
        planned = [id(chunk.sequence) for chunk in plan.chunks]
        assert sorted(id(chunk.sequence) for _, ranks in calls for chunks in ranks for chunk in chunks) == sorted(
            planned
        )


def test_chunks_share_a_call_where_attention_reads_pages_in_use():
    config = dataclasses.replace(CONFIG, max_prefill_tokens=256, max_prefill_sequences=8, max_batch=8)

    def shapes(lengths, economy):
        chunks = [Chunk(None, 0, length, False) for length in lengths]
        calls = Buckets(config, 1000, Packing((FULL,), 4), economy).prefills([chunks])
        assert [len(ranks[0]) for _, ranks in calls] == [min(len(lengths), shape.batch) for shape, _ in calls][
            : len(calls)
        ]
        return [(shape.batch, shape.tokens) for shape, _ in calls]

    assert shapes([128, 120], READ_IN_USE) == [(2, 128)]
    assert shapes([60, 50, 40, 33], READ_IN_USE) == [(4, 64)]
    assert shapes([20] * 8, READ_IN_USE) == [(8, 32)]
    assert shapes([50], READ_IN_USE) == shapes([50], GATHERED) == [(1, 64)]
    assert shapes([128, 120], GATHERED) == [(1, 256), (1, 256)]
    assert shapes([20] * 8, GATHERED) == [(8, 32)]


def test_windows_alone_make_all_long_contexts_one_bucket():
    decodes = {shape.pages for shape in Buckets(CONFIG, 1000, Packing((WINDOW,), 4)) if shape.tokens == 1}
    assert decodes == {3}
    decodes = {shape.pages for shape in Buckets(CONFIG, 1000, Packing((WINDOW, FULL), 4)) if shape.tokens == 1}
    assert decodes == {64, 250}


def test_one_shape_serves_many_ranks():
    (chunks,) = running((FULL,), (5, 6), 1).decodes
    buckets = Buckets(dataclasses.replace(CONFIG, max_batch=2), 1000, Packing((FULL,), 4))
    assert buckets.decode_shape([(), chunks, chunks[:1]]) == StepShape(2, 1, 64)
