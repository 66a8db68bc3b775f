"""Real steps of the embedded model, recorded."""

import gzip

import pytest
from smg_grpc_proto.generated import common_pb2

from jaxmoe.api import load
from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.request import Request, SamplingParams
from jaxmoe.errors import ConfigError, InvalidRequestError
from jaxmoe.measuring import trace
from jaxmoe.measuring.breakdown import break_down
from jaxmoe.measuring.phases import Driver, Phase
from jaxmoe.measuring.profile import PASSED_OVER, ProfiledEngine
from jaxmoe.serving.orders import Orders


def ask(engine, tokens):
    engine.submit(Request("one", (1, 2, 3), SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)))
    return [token for _ in range(tokens) for output in engine.step() for token in output.token_ids]


def test_every_part_of_the_model_is_found_in_recorded_steps(engine, tmp_path):
    Driver(engine).run(Phase("decode", 2), 64, 4, trace.step, trace.recording(tmp_path))
    recording = trace.read(tmp_path)
    assert len(recording.steps) == 4
    found = break_down(recording, engine.programs)
    assert all(found.parts[name] > 0 for name in ("attention", "experts", "dispatch", "lm_head", "sampling"))
    assert sum(found.shares.values()) == pytest.approx(1)
    assert all(share >= 0 for share in found.shares.values())
    assert {program.split("_batch")[0].split("_tokens")[0]: runs for program, runs in found.runs.items()} == {
        "jit_step": 4, "jit_sampling": 4,
    }  # fmt: skip
    known = {program.name for program in engine.programs}
    assert {op.program for op in recording.ops} <= known


def test_steps_that_overlap_are_broken_down_too(model, tmp_path):
    engine = Engine(model, EngineConfig(max_batch=2, max_context=64, max_prefill_tokens=16, warm_up=False))
    Driver(engine).run(Phase("decode", 2), 64, 4, trace.step, trace.recording(tmp_path))
    found = break_down(trace.read(tmp_path), engine.programs)
    assert all(found.parts[name] > 0 for name in ("attention", "experts", "dispatch", "lm_head", "sampling"))
    assert sum(found.shares.values()) == pytest.approx(1)


def test_exchanges_between_devices_are_found(tmp_path):
    engine = Engine(load(mesh="ep=2"), EngineConfig(max_batch=1, max_context=64, max_prefill_tokens=16, warm_up=False))
    Driver(engine).run(Phase("decode", 1), 64, 2, trace.step, trace.recording(tmp_path))
    found = break_down(trace.read(tmp_path), engine.programs)
    scopes = {scope for _, scope, _ in found.ops}
    assert "layer/moe/exchange" in scopes
    assert sum(found.shares.values()) == pytest.approx(1)


def test_a_profiled_engine_records_the_steps_after_the_first_few_and_changes_no_token(engine, tmp_path):
    expected = ask(engine, 12)
    said = []
    profiled = ProfiledEngine(engine, tmp_path, 3, said.append)
    assert ask(profiled, 12) == expected
    profiled.close()
    assert not profiled.has_work
    assert len(said) == 1
    assert "3 steps of" in said[0]
    assert "layer/attention" in said[0]
    assert len(trace.read(tmp_path).steps) == 3
    (for_perfetto,) = tmp_path.glob("plugins/profile/*/*.trace.json.gz")
    assert gzip.decompress(for_perfetto.read_bytes()).startswith(b"{")


def test_a_profile_cut_short_has_what_there_was(engine, tmp_path):
    said = []
    profiled = ProfiledEngine(engine, tmp_path, 100, said.append)
    ask(profiled, PASSED_OVER + 2)
    profiled.close()
    profiled.close()
    assert len(said) == 1
    assert "2 steps of" in said[0]


def test_a_profile_of_an_engine_that_never_got_that_far_is_none(engine, tmp_path):
    said = []
    ProfiledEngine(engine, tmp_path, 100, said.append).close()
    assert not said
    with pytest.raises(FileNotFoundError, match="holds no recording"):
        trace.read(tmp_path)


def test_steps_are_recorded_when_asked_for_and_only_then(engine, tmp_path):
    said = []
    profiled = ProfiledEngine(engine, tmp_path, 0, said.append)
    ask(profiled, PASSED_OVER + 3)
    assert not profiled.stop()
    orders = Orders(engine, profiled)
    assert start_profile(orders, num_steps=3).success
    with pytest.raises(ConfigError, match="already"):
        start_profile(orders)
    ask(profiled, 6)
    profiled.close()
    assert start_profile(orders, output_dir=str(tmp_path)).success
    ask(profiled, 5)
    assert common_pb2.ProfileResponse.FromString(orders("StopProfileRequest", b"")).success
    assert not common_pb2.ProfileResponse.FromString(orders("StopProfileRequest", b"")).success
    profiled.close()
    assert [said[0].count("3 steps of"), said[1].count("5 steps of")] == [1, 1]
    for wrong in ({"output_dir": "/elsewhere"}, {"num_steps": 0}, {"with_stack": True}, {"start_step": 7}):
        with pytest.raises(InvalidRequestError) as error:
            start_profile(orders, **wrong)
        assert error.value.field in wrong
    with pytest.raises(ConfigError, match="--profile DIR"):
        start_profile(Orders(engine))


def start_profile(orders, **fields):
    content = common_pb2.StartProfileRequest(**fields).SerializeToString()
    return common_pb2.ProfileResponse.FromString(orders("StartProfileRequest", content))
