import types

import pytest

from jaxmoe.engine.programs import Program
from jaxmoe.measuring.breakdown import BETWEEN, HOST, NS, break_down, table
from jaxmoe.measuring.trace import Op, Recording

HLO = """HloModule jit_step

%body (carry: f32[4]) -> f32[4] {
  %carry = f32[4]{0} parameter(0)
  ROOT %matmul = f32[4]{0} negate(%carry), metadata={op_name="jit(step)/layer/moe/while/body/dot_general"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %scores = f32[4]{0} negate(%x), metadata={op_name="jit(step)/layer/attention/dot_general"}
  %loop = f32[4]{0} while(%scores), condition=%cond, body=%body, metadata={op_name="jit(step)/layer/moe/while"}
  ROOT %gather = f32[4]{0} all-gather(%loop), metadata={op_name="jit(step)/layer/moe/all_gather"}
}
"""
STEP = Program("step", "jit_step", types.SimpleNamespace(as_text=lambda: HLO), 0.0, 0.0, False)


def op(name, start, end, device=0, run=1, program="jit_step"):
    return Op(start, end, device, program, name, run)


def seconds(steps, *ops):
    """Nanoseconds of each operation, between them, and of the host."""
    found = break_down(Recording(tuple(steps), tuple(sorted(ops))), [STEP])
    assert sum(found.shares.values()) == pytest.approx(1)
    by_op = {name: round(each / NS) for (_, _, name), each in found.ops.items()}
    return by_op | {BETWEEN: round(found.between / NS), HOST: round(found.host / NS)}


def test_the_host_has_what_is_before_the_first_operation_and_after_the_last():
    assert seconds([(0, 100)], op("scores", 10, 30), op("loop", 50, 90)) == {
        "scores": 20, "loop": 40, BETWEEN: 20, HOST: 20,
    }  # fmt: skip


def test_a_loop_has_what_its_operations_leave():
    found = seconds([(0, 50)], op("loop", 0, 50), op("matmul", 10, 20), op("matmul", 25, 45))
    assert found == {"loop": 20, "matmul": 30, BETWEEN: 0, HOST: 0}


def test_of_two_operations_at_once_the_one_begun_last_counts():
    assert seconds([(0, 40)], op("scores", 0, 30), op("matmul", 10, 40))["scores"] == 10


def test_devices_that_compute_at_once_share_the_time():
    found = seconds([(0, 40)], op("scores", 0, 40), op("matmul", 20, 40, device=1))
    assert (found["scores"], found["matmul"]) == (30, 10)


def test_a_device_that_waits_in_a_collective_has_no_time_while_another_computes():
    found = seconds([(0, 40)], op("gather", 0, 40), op("matmul", 0, 30, device=1), op("gather", 30, 40, device=1))
    assert (found["gather"], found["matmul"]) == (10, 30)


def test_what_runs_outside_the_steps_is_not_theirs():
    assert "matmul" not in seconds([(0, 10), (50, 60)], op("scores", 0, 10), op("matmul", 20, 40))


def test_the_parts_of_the_model_are_told_by_scopes():
    recording = Recording(
        ((0, 40),), (op("scores", 0, 10), op("matmul", 10, 30), op("unknown", 30, 40, program="jit_other"))
    )
    parts = break_down(recording, [STEP]).parts
    assert {name: round(each / NS) for name, each in parts.items() if each} == {
        "attention": 10, "experts": 20, "other": 10,
    }  # fmt: skip


def test_the_table_lists_programs_scopes_and_operations():
    recording = Recording(((0, 100), (100, 200)), (op("scores", 10, 30), op("scores", 110, 130, run=2)))
    text = "\n".join(table(break_down(recording, [STEP])))
    assert all(word in text for word in ("2 steps", "jit_step", "layer/attention", "scores of jit_step", HOST, BETWEEN))


def test_a_recording_without_steps_has_a_table_too():
    assert table(break_down(Recording((), ()), [STEP])) == ["  no step was recorded"]
