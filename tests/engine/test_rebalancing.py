"""Experts move between steps: tokens stay the same, nothing compiles, and what goes wrong changes nothing."""

import json

import jax
import numpy as np
import pytest

from jaxmoe.cli import rebalance_config
from jaxmoe.engine.config import EngineConfig, Rebalance
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.model import Model
from jaxmoe.engine.request import Request, SamplingParams
from jaxmoe.errors import ConfigError
from jaxmoe.moe.balancing import plan
from jaxmoe.serve import parse

MIXTRAL = "mixtral-8x7b:scale=128,num_hidden_layers=2,vocab_size=128,num_attention_heads=4,num_key_value_heads=2"
DEEPSEEK = "deepseek-v3:scale=128,num_hidden_layers=4,vocab_size=128,n_routed_experts=16"
STREAMS, TOKENS = 32, 12
PROMPTS = [tuple((7 * stream + 3 * place) % 120 for place in range(4 + stream % 9)) for stream in range(STREAMS)]


def limits(**rebalance):
    return EngineConfig(
        page_size=8,
        max_batch=8,
        max_context=32,
        max_prefill_tokens=16,
        max_prefill_sequences=2,
        rebalance=Rebalance(**rebalance),
    )


def answers(engine, after_step=lambda number: None):
    """Of all streams, by number; `after_step` is called between steps."""
    tokens = [[] for _ in PROMPTS]
    for stream, prompt in enumerate(PROMPTS):
        params = SamplingParams(temperature=stream % 2, seed=stream, max_tokens=TOKENS, ignore_eos=True)
        engine.submit(Request(str(stream), prompt, params))
    number = 0
    while engine.has_work:
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
        number += 1
        after_step(number)
    return tokens


def shuffled(model, seed):
    rng = np.random.default_rng(seed)
    return rng.permuted(model.slot_expert, axis=1)


@pytest.fixture
def compiles():
    """Counts what JAX compiles, in whatever way."""
    found = []

    def listen(event, _, **__):
        if "compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def model():
    return Model(None, "dp=2,ep=4", random_weights=MIXTRAL, redundant_experts=12)


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        (MIXTRAL, {"mesh": "dp=2,ep=4"}),
        (MIXTRAL, {"mesh": "ep=4,tp=2", "expert_weights": "int8"}),
        (DEEPSEEK, {"mesh": "dp=2,ep=4", "expert_axes": "dp,ep", "kernels": "xla"}),
    ],
    ids=["a copy for each dp", "int8 and tp", "one copy for all"],
)
def test_tokens_of_32_streams_are_the_same_while_experts_move_and_nothing_compiles(preset, options, compiles):
    model = Model(None, random_weights=preset, redundant_experts=8, **options)
    slot = model.mover.slot_bytes
    engine = Engine(model, limits(bytes_per_step=2 * slot))
    expected = answers(engine)
    targets = [shuffled(model, 0), shuffled(model, 1)]
    moved, fetch, of_step = [], model.mover.fetch, [0]

    def counting(*arguments):
        of_step[0] += 1
        return fetch(*arguments)

    def after_step(number):
        moved.append(of_step[0])
        of_step[0] = 0
        if targets and number >= 3 and (engine.last_rebalance is None or engine.last_rebalance.outcome == "done"):
            engine.rebalance(targets.pop(0))

    model.mover.fetch = counting
    goal = targets[1]
    compiles.clear()
    assert answers(engine, after_step) == expected
    assert (model.slot_expert == goal).all()
    assert compiles == []
    assert engine.late_compiles == 0
    report = engine.last_rebalance
    assert max(moved) == 2
    assert (report.outcome, report.looked_at, report.moved_layers) == ("done", len(goal), len(goal))
    assert report.moved_bytes == report.moved_experts * slot
    assert report.worst_step_seconds >= report.worst_moving_seconds > 0
    assert answers(engine) == expected


def test_an_expert_that_arrives_other_than_it_left_keeps_the_old_map(model):
    engine = Engine(model, limits())
    expected, before = answers(engine), model.slot_expert
    fetch = model.mover.fetch

    def torn(stacks, layer, source, slot):
        sent, there = fetch(stacks, layer, source, slot)
        if layer == 1:
            # As if a word had been lost on the way.
            model.mover._room = tuple(held ^ (held.dtype.type(1)) for held in model.mover._room)
            there = model.mover._digest(model.mover._room, np.int32(slot))
        return sent, there

    model.mover.fetch = torn
    try:
        target = shuffled(model, 2)
        assert answers(engine, lambda number: engine.rebalance(target) if number == 2 else None) == expected
    finally:
        model.mover.fetch = fetch
    report = engine.last_rebalance
    assert (report.outcome, report.moved_layers) == ("failed", 1)
    assert "MoveError: expert" in report.reason
    assert "reached slot" in report.reason
    np.testing.assert_array_equal(model.slot_expert, [target[0], before[1]])
    assert answers(engine) == expected


def test_after_the_deadline_what_has_not_moved_stays(model):
    engine = Engine(model, limits(deadline=1e-9))
    before = model.slot_expert
    engine.rebalance(shuffled(model, 3))
    with pytest.raises(ConfigError, match="on the move already"):
        engine.rebalance()
    while engine.has_work:
        assert engine.step() == []
    assert engine.last_rebalance.outcome == "deadline"
    np.testing.assert_array_equal(model.slot_expert, before)


CROWDED = np.tile([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7], (2, 1))


@pytest.mark.parametrize("trigger", ["threshold", "interval", "call"])
def test_loads_are_planned_for_when_it_is_time(model, trigger):
    model.place_experts(CROWDED)
    how = {"threshold": {"threshold": 1.0}, "interval": {"interval": 30}, "call": {}}[trigger]
    engine = Engine(model, limits(devices_at_least=2, **how))

    def after_step(number):
        if trigger == "call" and number == 10 and engine.last_rebalance is None:
            engine.rebalance()

    reports = []
    while not reports or reports[-1] is None or reports[-1].outcome == "running":
        answers(engine, after_step)
        reports.append(engine.last_rebalance)
    first = next(report for report in reports if report is not None)
    assert (first.trigger, first.outcome) == (trigger, "done")
    assert first.after > first.before
    for layer in model.slot_expert.reshape(2, 4, -1).tolist():
        assert all(len(set(row)) == len(row) for row in layer)
    assert min(np.bincount(layer, minlength=8).min() for layer in model.slot_expert) >= 2


def without(stack, slots):
    held = np.array(stack)
    held[:, slots] = np.nan
    return jax.device_put(held, stack.sharding)


def test_without_one_device_every_expert_is_reached_and_tokens_are_the_same(model):
    covered = plan(np.zeros((2, 8)), 4, model.slot_expert, 2)
    model.place_experts(covered)
    engine = Engine(model, limits())
    expected, whole = answers(engine), model.params["experts"]
    for device in range(4):
        model.mask_devices({device})
        # What it holds is as good as lost.
        model.params["experts"] = {
            name: without(stack, slice(5 * device, 5 * device + 5)) for name, stack in whole.items()
        }
        assert answers(engine) == expected
    model.params["experts"] = whole
    model.mask_devices()
    with pytest.raises(ConfigError, match=r"layer 0 of the placement has no slot for experts \["):
        model.mask_devices({0, 1, 2})
    with pytest.raises(ConfigError, match=r"devices \[4\] cannot be masked; there are 4"):
        model.mask_devices({4})
    assert answers(engine) == expected


def test_a_placement_is_saved_loaded_and_started_from(model, tmp_path):
    path = tmp_path / "placement.json"
    prompt = [list(PROMPTS[0])]
    logits = model.logits(prompt)
    model.place_experts(shuffled(model, 5))
    model.save_placement(path)
    again = Model(None, "ep=2", random_weights=MIXTRAL, placement=path)
    np.testing.assert_array_equal(again.slot_expert, model.slot_expert)
    np.testing.assert_allclose(again.logits(prompt), logits, atol=1e-4)
    for options, told in (
        ({"mesh": "ep=8"}, r"has 20 slots, which 8 devices cannot share"),
        ({"mesh": "ep=4", "redundant_experts": 4}, r"has 20 slots, redundant_experts=4 asks for 12"),
        ({"random_weights": MIXTRAL.replace("layers=2", "layers=3")}, r"is a placement of \[2, 20\]; the model has 3"),
    ):
        with pytest.raises(ConfigError, match=told):
            Model(None, **{"random_weights": MIXTRAL, "placement": path, **options})
    for text, told in (
        ("{", "is not a placement"),
        ("{}", "its format is not"),
        (json.dumps({"format": "jaxmoe-placement-1", "slot_expert": [[0, 1]] * 2}), "has no slot for experts"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=told):
            Model(None, random_weights=MIXTRAL, placement=path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Model(None, random_weights=MIXTRAL, placement=tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be written to"):
        model.save_placement(tmp_path / "none" / "placement.json")


def test_what_cannot_be_is_told_before_anything_moves(model):
    with pytest.raises(ConfigError, match="start it with --rebalance"):
        Engine(model, EngineConfig(warm_up=False, max_context=32)).rebalance()
    few = Model(None, "ep=4", random_weights=MIXTRAL)
    with pytest.raises(ConfigError, match="use --redundant-experts 8"):
        Engine(few, EngineConfig(warm_up=False, max_context=32, rebalance=Rebalance(devices_at_least=2)))
    engine = Engine(few, EngineConfig(warm_up=False, max_context=32, rebalance=Rebalance()))
    with pytest.raises(ConfigError, match=r"a placement of \(2, 7\)"):
        engine.rebalance(few.slot_expert[:, :7])
    assert not engine.has_work


@pytest.mark.parametrize(
    ("options", "told"),
    [({"interval": -1}, "interval=-1"), ({"threshold": 1.5}, "threshold=1.5"), ({"deadline": 0}, "deadline=0")],
)
def test_settings_that_cannot_work_are_told(options, told):
    with pytest.raises(ConfigError, match=f"rebalance {told} must be"):
        Rebalance(**options)


def test_what_the_command_line_asks_for():
    assert rebalance_config(parse([])) is None
    assert rebalance_config(parse(["--rebalance"])) == Rebalance()
    asked = ["--rebalance-threshold", "0.8", "--rebalance-budget", "0.5", "--rebalance-deadline", "9", "--coverage"]
    expected = Rebalance(threshold=0.8, bytes_per_step=1 << 19, deadline=9.0, devices_at_least=2)
    assert rebalance_config(parse(asked)) == expected
