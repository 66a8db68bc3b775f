import dataclasses

import jax
import numpy as np
import pytest

from jaxmoe.engine.batch import KEPT, Following, Grid, OneRow, Packing, Sampling, StepShape, buckets
from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.pages import PageGroup
from jaxmoe.engine.request import Request, Sampled, SamplingParams
from jaxmoe.engine.scheduler import Scheduler
from jaxmoe.engine.sequence import Chunk, StepPlan
from jaxmoe.spans import FULL, Span

CONFIG = EngineConfig(page_size=4, max_batch=4, max_prefill_tokens=16, max_prefill_sequences=2)
WINDOW, CHUNK = Span("window", 8), Span("chunk", 16)
NOTHING_KEPT = np.zeros((9, len(KEPT)), np.int32)


def running(spans, lengths, steps, config=CONFIG, draft=None, in_flight=False):
    """The chunks of the step after so many. in_flight: the last of these is not complete."""
    scheduler = Scheduler(
        config,
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
    for step in range(steps):
        plan = scheduler.schedule()
        if not in_flight or step < steps - 1:
            brought = {chunk.sequence.request.id: Sampled((1,), (0.0,), draft=draft) for chunk in plan.chunks}
            scheduler.complete(plan, brought)
    return scheduler.schedule()


@pytest.mark.parametrize("spans", [(FULL,), (WINDOW,), (CHUNK, FULL)], ids=str)
def test_what_is_packed_on_the_host_is_unpacked_on_the_device(spans):
    packing = Packing(spans, 4, 8)
    (chunks,) = running(spans, (50, 3, 21), 7).decodes
    assert len(chunks) == 3
    shape = StepShape(4, 1, 64)
    (row,) = packing.pack(shape, [chunks])
    batch = jax.tree.map(np.asarray, packing.unpack(jax.numpy.asarray(row), shape, jax.numpy.asarray(NOTHING_KEPT)))
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
    packing = Packing((FULL, WINDOW, CHUNK), 4, 8)
    assert packing.widths(StepShape(1, 1, 64)) == (64, 3, 4)
    assert packing.widths(StepShape(1, 16, 64)) == (64, 7, 8)
    assert packing.widths(StepShape(1, 1, 2)) == (2, 2, 2)


@pytest.mark.parametrize("kernels", ["xla", "native"])
@pytest.mark.parametrize("spans", [(FULL,), (WINDOW,), (Span("window", 400),), (CHUNK, WINDOW), (CHUNK, FULL)], ids=str)
def test_every_step_fits_a_bucket_and_no_two_buckets_are_the_same_program(spans, kernels):
    packing = Packing(spans, 4, 8)
    of_kernels = buckets(CONFIG, 1000, packing, kernels)
    shapes = list(of_kernels)
    programs = {(shape.batch, shape.tokens, packing.widths(shape)) for shape in shapes}
    assert len(programs) == len(shapes)
    for lengths, steps in [((3, 5), 0), ((60, 3, 900), 0), ((60, 3, 7), 5), ((900, 3), 30), ((900, 3, 4), 100)]:
        plan = running(spans, lengths, steps)
        calls = of_kernels.calls(plan)
        assert calls
        for shape, ranks in calls:
            assert shape in shapes
            packing.pack(shape, ranks)
        planned = [id(chunk.sequence) for chunk in plan.chunks]
        assert sorted(id(chunk.sequence) for _, ranks in calls for chunks in ranks for chunk in chunks) == sorted(
            planned
        )


def test_prefills_of_about_one_length_share_a_call_where_each_has_a_row():
    config = dataclasses.replace(CONFIG, max_prefill_tokens=256, max_prefill_sequences=8, max_batch=8)

    def shapes(lengths):
        chunks = tuple(Chunk(None, 0, length, False) for length in lengths)
        calls = Grid(config, 1000, Packing((FULL,), 4, 8)).calls(StepPlan((chunks,), ((),)))
        return [(shape.batch, shape.tokens) for shape, _ in calls]

    assert shapes([50]) == [(1, 64)]
    assert shapes([128, 120]) == [(1, 256), (1, 256)]
    assert shapes([20] * 8) == [(8, 32)]


def test_decodes_and_pieces_of_prompts_go_in_one_row():
    config = dataclasses.replace(CONFIG, max_prefill_tokens=256, max_batch=8)
    packing = Packing((FULL,), 4, 8)
    rows = OneRow(config, 1000, packing)
    plan = running((FULL,), (3, 2, 60), 2)
    assert [chunk.length for chunk in plan.chunks] == [16, 1, 1]
    ((shape, ranks),) = rows.calls(plan)
    assert (shape.batch, shape.tokens) == (8, 32)
    assert [chunk.length for chunk in ranks[0]] == [1, 1, 16]
    (row,) = packing.pack(shape, ranks)
    batch = jax.tree.map(np.asarray, packing.unpack(jax.numpy.asarray(row), shape, jax.numpy.asarray(NOTHING_KEPT)))
    assert batch.pieces.begins.tolist() == [0, 1, 2, *[18] * 6]
    assert batch.pieces.decoding.tolist() == [True, True] + [False] * 6
    assert batch.draws.tolist()[:3] == [0, 1, 17]
    assert batch.sequences_in_use == 3
    expected = [position for chunk in ranks[0] for position in range(chunk.start, chunk.start + chunk.length)]
    assert batch.positions.tolist() == [expected + [-1] * 14]
    together = [token for chunk in ranks[0] for token in chunk.sequence.tokens[chunk.start :][: chunk.length]]
    assert batch.tokens[0, :18].tolist() == together
    assert rows.calls(StepPlan(((),), ((),))) == []


@pytest.mark.parametrize("kernels", ["xla", "native"])
def test_drafts_that_were_wrong_go_no_further(kernels):
    config, packing = dataclasses.replace(CONFIG, speculate="mtp"), Packing((FULL,), 4, 8)
    plan = running((FULL,), (3, 2), 2, config, draft=7)
    ((shape, ranks),) = buckets(config, 1000, packing, kernels).calls(plan)
    assert [(chunk.start, chunk.tokens) for chunk in ranks[0]] == [(4, [1, 7]), (3, [1, 7])]
    (row,) = packing.pack(shape, ranks)
    batch = packing.unpack(jax.numpy.asarray(row), shape, jax.numpy.asarray(NOTHING_KEPT))
    assert batch.draws[:4].tolist() == [0, 1, 2, 3]
    assert batch.sampling.position[:4].tolist() == [5, 6, 4, 5]
    # The first sequence's draft is what was drawn, the second one's is not.
    drawn = jax.numpy.zeros(shape.draws, int).at[:4].set([7, 8, 6, 9])
    following = Following.of(batch, drawn)
    assert following.tokens.reshape(-1)[:3].tolist() == [7, 8, 6]
    assert following.positions.reshape(-1)[:4].tolist() == [4, 5, 3, -1]
    assert following.ends[:2].tolist() == [1, 2]
    assert Sampling.unpack(following.sampling).position[:2].tolist() == [7, 5]


@pytest.mark.parametrize("kernels", ["xla", "native"])
def test_what_the_host_has_not_read_yet_the_device_puts_in_its_place(kernels):
    config, packing = dataclasses.replace(CONFIG, speculate="mtp"), Packing((FULL,), 4, 8)
    plan = running((FULL,), (3, 2), 3, config, draft=7, in_flight=True)
    ((shape, ranks),) = buckets(config, 1000, packing, kernels).calls(plan)
    assert [(chunk.start, chunk.end, chunk.ahead) for chunk in ranks[0]] == [(5, 8, 2), (4, 7, 2)]
    (row,) = packing.pack(shape, ranks)
    # The first sequence's draft was right and brought it two tokens, the second one's was not.
    kept = NOTHING_KEPT.copy()
    for chunk, latest in zip(ranks[0], [(20, 21, 1), (30, 31, 0)], strict=True):
        kept[chunk.sequence.slot] = latest
    batch = packing.unpack(jax.numpy.asarray(row), shape, jax.numpy.asarray(kept))
    assert batch.tokens.reshape(-1)[:4].tolist() == [20, 21, 30, 31]
    assert batch.positions.reshape(-1)[:4].tolist() == [6, 7, 4, 5]
    following = Following.of(batch, jax.numpy.zeros(shape.draws, int).at[:4].set([21, 8, 6, 9]))
    kept = following.keep(batch, jax.numpy.asarray([40, 50, *[0] * (shape.batch - 2)]), jax.numpy.asarray(kept))
    assert [kept[chunk.sequence.slot].tolist() for chunk in ranks[0]] == [[8, 40, 1], [6, 50, 0]]


def test_windows_alone_make_all_long_contexts_one_bucket():
    decodes = {shape.pages for shape in Grid(CONFIG, 1000, Packing((WINDOW,), 4, 8)) if shape.tokens == 1}
    assert decodes == {3}
    decodes = {shape.pages for shape in Grid(CONFIG, 1000, Packing((WINDOW, FULL), 4, 8)) if shape.tokens == 1}
    assert decodes == {64, 250}


def test_one_shape_serves_many_ranks():
    (chunks,) = running((FULL,), (5, 6), 1).decodes
    grid = Grid(dataclasses.replace(CONFIG, max_batch=2), 1000, Packing((FULL,), 4, 8))
    ((shape, _),) = grid.calls(StepPlan(((),) * 3, ((), chunks, chunks[:1])))
    assert shape == StepShape(2, 1, 64)
