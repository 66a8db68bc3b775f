import pytest

from jaxmoe.measuring.scopes import part_of, scope_of, scopes

HLO = """HloModule jit_step, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %inner = f32[4]{0} negate(%p), metadata={op_name="jit(step)/layer/attention/neg" stack_frame_id=1}
}

%body (carry: (s32[], f32[4])) -> (s32[], f32[4]) {
  %carry = (s32[], f32[4]{0}) parameter(0)
  %value = f32[4]{0} get-tuple-element(%carry), index=1
  %count = s32[] get-tuple-element(%carry), index=0
  %copy.1 = s32[] copy(%count)
  %reduce_scatter.3 = f32[2]{0} reduce-scatter(%value), metadata={op_name="jit(step)/while/body/closed_call/layer/moe/reduce_scatter"}
  ROOT %tuple.2 = (s32[], f32[4]{0}) tuple(%copy.1, %value)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %fusion.1 = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/layer/attention/neg"}
  %dot.7 = f32[4]{0} dot(%fusion.1, %x), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  %add.2 = f32[4]{0} add(%dot.7, %x), metadata={op_name="jit(step)/layer/add"}
  %tuple.1 = (s32[], f32[4]{0}) tuple(%x, %add.2)
  %while.1 = (s32[], f32[4]{0}) while(%tuple.1), condition=%cond, body=%body, metadata={op_name="jit(step)/layer/moe/while"}
  ROOT %slice.1 = f32[4]{0} slice(%x), metadata={op_name="jit(step)/slice"}
}
"""  # noqa: E501 - as XLA prints it

PATHS = {
    "jit(f)/while/body/closed_call/layer/attention/btd,dhk->bthk/dot_general": "layer/attention",
    "jit(f)/layer/moe/while/body/jit(floor_divide)/rem": "layer/moe",
    "jit(f)/layer/moe/shard_map/cond/branch_1_fun/mul": "layer/moe",
    "jit(f)/layer/attention/transpose;layer/attention/reshape": "layer/attention",
    "jit(f)/slice": "",
    "packed": "",
}


@pytest.mark.parametrize("path", PATHS)
def test_a_scope_is_what_a_path_has_beside_control_flow_and_the_primitive(path):
    assert scope_of(path) == PATHS[path]


def test_instructions_have_the_scope_they_were_traced_in():
    found = scopes(HLO)
    assert found["fusion.1"] == found["inner"] == "layer/attention"
    assert found["while.1"] == "layer/moe"
    assert found["slice.1"] == ""


def test_a_matmul_that_the_compiler_left_without_a_name_belongs_where_its_neighbours_do():
    assert scopes(HLO)["dot.7"] == "layer/attention"


def test_a_copy_without_a_name_or_neighbours_belongs_to_its_loop():
    assert scopes(HLO)["copy.1"] == "layer/moe"


def test_collectives_are_told_from_what_they_serve_by_their_kind_and_not_by_their_name():
    assert scopes(HLO)["reduce_scatter.3"] == "layer/moe/exchange"


PARTS = {
    "layer/moe": "experts",
    "layer/moe/exchange": "dispatch",
    "layer/attention/exchange": "attention",
    "layer/route": "dispatch",
    "layer/moe/feed_forward": "feed-forward",
    "logits": "lm_head",
    "sampling/inner": "sampling",
    "layer": "other",
    "a_scope_to_come": "other",
    "": "other",
}


@pytest.mark.parametrize("scope", PARTS)
def test_the_innermost_known_scope_is_the_part(scope):
    assert part_of(scope) == PARTS[scope]
