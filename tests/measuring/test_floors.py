import dataclasses

import pytest

from jaxmoe.measuring.breakdown import Breakdown
from jaxmoe.measuring.floors import cache_notes, floor_of, parts_table, summary_table
from jaxmoe.measuring.machine import Machine
from jaxmoe.measuring.phases import Phase, Timed

MACHINE = Machine("cpu", "cpu", 10e9, {4: 100e9, 2: 50e9}, cache=2**25, streamed=2**30)
FOUND = Breakdown(1, 1.0, {("p", "layer/moe", "dot"): 0.5}, 0.25, 0.25, {"p": 1})


def floor(model, kind, size, context):
    timed = Timed(Phase(kind, size), (1.0, 2.0, 3.0), size, context)
    return floor_of(model, MACHINE, timed, timed, FOUND, page_size=16)


def test_one_sequence_must_read_the_experts_it_chooses_and_every_other_weight(model):
    config, one = model.config, floor(model, "decode", 1, 64)
    expert = 3 * config.width * config.expert_width * 4
    assert one.parts["experts"].bytes == pytest.approx(config.layers * config.experts_per_token * expert)
    assert one.parts["lm_head"].bytes == config.vocab_size * config.width * 4
    everything = model.num_parameters * 4
    idle = config.layers * (config.experts - config.experts_per_token) * expert
    keys = 2 * 64 * config.kv_heads * config.head_dim * config.layers * 4
    assert one.needed.bytes == pytest.approx(everything - idle + keys)


def test_more_sequences_need_more_experts_but_never_more_than_there_are(model):
    few, many, all_of_them = (floor(model, "decode", size, 64).parts["experts"].bytes for size in (1, 8, 512))
    assert few < many < all_of_them
    config = model.config
    assert all_of_them == pytest.approx(config.layers * config.experts * 3 * config.width * config.expert_width * 4)


def test_a_prefill_must_multiply_and_a_decode_must_read(model):
    assert floor(model, "prefill", 512, 512).step.bound == "compute"
    assert floor(model, "decode", 1, 512).step.bound == "memory"


def test_a_token_of_a_prefill_meets_only_the_keys_before_it(model):
    config, tokens = model.config, 512
    weights = sum(leaf.size for leaf in model.params["attention"].values())
    pairs = tokens * (tokens + 1) / 2
    scores = 2 * pairs * 2 * config.heads * config.head_dim * config.layers
    assert floor(model, "prefill", tokens, tokens).parts["attention"].flops == pytest.approx(
        2 * tokens * weights + scores
    )


def test_the_tables_tell_medians_ratios_and_where_the_time_goes(model):
    one = floor(model, "decode", 1, 64)
    assert one.taken == 2.0
    assert one.ratio == pytest.approx(2.0 / one.needed.seconds)
    (row,) = (line for line in parts_table(one) if "experts  " in line)
    assert row.endswith("50.0%")
    assert "1000.000" in row
    assert "decode at batch 1" in summary_table([one])[1]


def test_weights_that_a_cache_may_hold_are_warned_of(model):
    (note,) = cache_notes(MACHINE, model)
    assert "may hold the weights (17 MB): steps can be quicker than memory allows" in note
    assert cache_notes(dataclasses.replace(MACHINE, cache=2**20), model) == []


def test_a_bandwidth_measured_in_a_cache_is_warned_of(model):
    (note,) = cache_notes(dataclasses.replace(MACHINE, cache=2**20, streamed=2**20), model)
    assert "memory may be slower" in note
