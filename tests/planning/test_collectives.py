"""What is planned to travel is what travels in the compiled program."""

import collections
import functools

import pytest

from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.executables import Executables
from jaxmoe.engine.model import Model
from jaxmoe.models.decoder import Execution
from jaxmoe.models.kv_cache import make_cache
from jaxmoe.models.presets import read_preset
from jaxmoe.planning.collectives import exchanges
from jaxmoe.planning.deployment import Deployment, Subject
from jaxmoe.planning.memory import pages_of_a_sequence
from jaxmoe.sharding.collectives import read_collectives
from jaxmoe.sharding.mesh import MeshSpec

FAMILIES = {
    "mixtral": "mixtral-8x7b:scale=128,num_hidden_layers=2,vocab_size=128,num_attention_heads=4,num_key_value_heads=2",
    "deepseek-v3": "deepseek-v3:scale=128,num_hidden_layers=5,vocab_size=128,n_routed_experts=32",
    "llama4": "llama-4-maverick:scale=128,num_hidden_layers=4,vocab_size=128,num_local_experts=8,head_dim=16",
}
LIMITS = EngineConfig(max_batch=4, max_context=64, max_prefill_tokens=48)
MESHES = [("dp=2,ep=4", "ep"), ("dp=2,ep=4", "dp,ep"), ("ep=8", "ep"), ("ep=4,tp=2", "ep")]


@functools.cache
def model_on(family, mesh, axes, strategy):
    # Layers written out, so that every collective of a step stands in its text once.
    execution = Execution(strategy=strategy, capacity_factor=1.0, unroll=True)
    return Model(None, mesh, execution=execution, random_weights=FAMILIES[family], expert_axes=axes)


@pytest.mark.parametrize("strategy", ["auto", "all_to_all", "replicate"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("mesh", "axes"), MESHES)
def test_planned_collectives_are_those_of_the_compiled_steps(family, mesh, axes, strategy):
    model = model_on(family, mesh, axes, strategy)
    subject = Subject.read(family, read_preset(FAMILIES[family]), "float32")
    plan = Deployment(subject, MeshSpec.parse(mesh, axes), LIMITS, model.execution)
    pages = tuple(count * LIMITS.max_batch for count in pages_of_a_sequence(plan))
    cache = make_cache(model.config, model.mesh, model.rules, pages, LIMITS.page_size, model.dtype)
    executables = Executables(model, cache, plan.packing)
    for shape in (plan.decode, plan.prefill):
        found = read_collectives(executables.compile(shape).as_text())
        planned = collections.Counter()
        for each in exchanges(plan, shape):
            planned[each.kind, each.bytes] += each.times
        assert planned == collections.Counter((one.kind, one.bytes) for one in found)
        assert plan.strategy(shape) == model.strategy(shape.batch * shape.tokens)


def test_one_device_and_data_parallel_devices_exchange_nothing():
    subject = Subject.read("mixtral", read_preset(FAMILIES["mixtral"]), "float32")
    for mesh in ("dp=1,ep=1", "dp=8,ep=1"):
        plan = Deployment(subject, MeshSpec.parse(mesh), LIMITS)
        assert exchanges(plan, plan.decode) == []
