"""What is planned to travel is what travels in the compiled program."""

import collections
import dataclasses
import functools

import pytest

from jaxmoe.engine.config import EngineConfig
from jaxmoe.models.decoder import Execution
from jaxmoe.models.presets import read_preset
from jaxmoe.planning.ahead import unloaded_steps
from jaxmoe.planning.collectives import exchanges
from jaxmoe.planning.deployment import Deployment, Subject
from jaxmoe.sharding import read_collectives
from jaxmoe.sharding.mesh import MeshSpec, make_mesh

FAMILIES = {
    "mixtral": "mixtral-8x7b:scale=128,num_hidden_layers=2,vocab_size=128,num_attention_heads=4,num_key_value_heads=2",
    "deepseek-v3": "deepseek-v3:scale=128,num_hidden_layers=5,vocab_size=128,n_routed_experts=32",
    "llama4": "llama-4-maverick:scale=128,num_hidden_layers=4,vocab_size=128,num_local_experts=8,head_dim=16",
}
LIMITS = EngineConfig(max_batch=4, max_context=64, max_prefill_tokens=48)
MESHES = [("dp=2,ep=4", "ep"), ("dp=2,ep=4", "dp,ep"), ("ep=8", "ep"), ("ep=4,tp=2", "ep")]
# Both steps of every family on every mesh; their strategies in turn.
TURNS = [{"decode": "all_to_all", "prefill": "replicate"}, {"decode": "replicate", "prefill": "all_to_all"}]
CASES = [
    (family, *mesh, strategy, step)
    for row, mesh in enumerate(MESHES)
    for column, family in enumerate(FAMILIES)
    for step, strategy in TURNS[(row + column) % 2].items()
]


@functools.cache
def subject(family):
    return Subject.read(family, read_preset(FAMILIES[family]), "float32")


def counted(planned):
    """How many there are of each kind, axes and bytes."""
    count = collections.Counter()
    for each in planned:
        count[each.kind, each.axes, each.bytes] += each.times
    return count


def found_in(text, mesh):
    """The same of a compiled program."""
    count = collections.Counter()
    for one in read_collectives(text, mesh.shape):
        # XLA joins sums of a token's experts and shared expert into one all-reduce of two arrays, where it can.
        joined = len(one.shapes) if one.kind == "all-reduce" else 1
        count[one.kind, one.axes, one.bytes // joined] += joined
    return count


@pytest.mark.parametrize(("family", "mesh", "axes", "strategy", "step"), CASES)
def test_planned_collectives_are_those_of_the_compiled_step(family, mesh, axes, strategy, step):
    # Layers written out, so that every collective of a step stands in its text once.
    execution = Execution(strategy=strategy, capacity_factor=1.0, unroll=True)
    plan = Deployment(subject(family), MeshSpec.parse(mesh, axes), LIMITS, execution)
    on = make_mesh(plan.spec)
    shape = getattr(plan, step)
    program = unloaded_steps(plan, on).compile(shape)
    assert counted(exchanges(plan, shape)) == found_in(program.as_text(), on)


@pytest.mark.parametrize("strategy", ["all_to_all", "replicate"])
@pytest.mark.parametrize(("mesh", "axes"), MESHES[1::2])
@pytest.mark.parametrize("drafts", [False, True], ids=["forward", "drafting"])
def test_planned_collectives_are_those_of_steps_that_draft(mesh, axes, strategy, drafts):
    execution = Execution(strategy=strategy, capacity_factor=1.0, unroll=True)
    limits = dataclasses.replace(LIMITS, speculate="mtp")
    plan = Deployment(subject("deepseek-v3"), MeshSpec.parse(mesh, axes), limits, execution)
    on = make_mesh(plan.spec)
    steps = unloaded_steps(plan, on)
    program = (steps.compile_drafting if drafts else steps.compile)(plan.decode)
    assert counted(exchanges(plan, plan.decode, drafts)) == found_in(program.as_text(), on)


def test_one_device_and_data_parallel_devices_exchange_nothing():
    for mesh in ("dp=1,ep=1", "dp=8,ep=1"):
        plan = Deployment(subject("mixtral"), MeshSpec.parse(mesh), LIMITS)
        assert exchanges(plan, plan.decode) == []


def test_auto_is_what_the_program_takes():
    # Wide enough for halved bytes to be worth another collective; two choices of eight devices halve them.
    preset = "mixtral-8x7b:scale=16,num_hidden_layers=2,vocab_size=128"
    wide = Subject.read("mixtral", read_preset(preset), "float32")
    plan = Deployment(wide, MeshSpec.parse("ep=8"), LIMITS)
    assert [plan.strategy(shape) for shape in (plan.decode, plan.prefill)] == ["replicate", "all_to_all"]
    kinds = [{each.kind for each in exchanges(plan, shape)} for shape in (plan.decode, plan.prefill)]
    assert kinds[0] == {"all-gather", "reduce-scatter"}
    assert kinds[1] == {"all-to-all", "all-reduce"}
