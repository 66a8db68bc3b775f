import collections

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxmoe.engine.batch import Packing, StepShape
from jaxmoe.engine.executables import Executables
from jaxmoe.engine.model import Model
from jaxmoe.models.decoder import RANK_ROWS, Execution
from jaxmoe.models.kv_cache import make_cache
from jaxmoe.moe.dispatch import capacity_for
from jaxmoe.sharding.collectives import Collective, read_collectives

BATCH, LENGTH = 2, 12
DECODE, PREFILL = StepShape(batch=2, tokens=1, pages=8), StepShape(batch=1, tokens=6, pages=8)
PROGRAMS = {"forward": BATCH * LENGTH, "decode": DECODE.batch, "prefill": PREFILL.tokens}


# Two mixtures each; the others have dense layers as well, latent attention or chunks, shared experts.
FAMILIES = {
    "mixtral": "mixtral-8x7b:scale=128,num_hidden_layers=2,vocab_size=128,num_attention_heads=4,num_key_value_heads=2",
    "deepseek-v3": "deepseek-v3:scale=128,num_hidden_layers=5,vocab_size=128,n_routed_experts=32",
    "llama4": "llama-4-maverick:scale=128,num_hidden_layers=4,vocab_size=128,num_local_experts=8,head_dim=16",
}


@pytest.fixture(scope="module")
def compile_on():
    """`compile_on("dp=2,ep=4", "decode")`: the model, and the collectives of that program, its layers written out."""
    models = {}

    def compile_on(mesh, program, family="mixtral"):
        if (mesh, family) not in models:
            preset = FAMILIES[family]
            models[mesh, family] = Model(None, mesh, execution=Execution(unroll=True), random_weights=preset)
        model = models[mesh, family]
        return model, read_collectives((forward if program == "forward" else step)(model, program).as_text())

    def forward(model, program):
        tokens = np.zeros((model.num_ranks, BATCH, LENGTH), np.int32)
        with jax.set_mesh(model.mesh):
            placed = jax.device_put((tokens, tokens), NamedSharding(model.mesh, RANK_ROWS))
            return model._forward.lower(model.params, model.placement, *placed).compile()

    def step(model, program):
        pages = (8,) * len(model.config.spans)
        cache = make_cache(model.config, model.mesh, model.rules, pages, 4, model.dtype)
        executables = Executables(model, cache, Packing(model.config.spans, 4))
        if program == "sampling":
            return executables.compile_sampling(DECODE.batch)
        return executables.compile({"decode": DECODE, "prefill": PREFILL}[program])

    return compile_on


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_mixture_has_two_all_to_alls_and_one_scalar_all_reduce_and_nothing_else(compile_on, program, family):
    model, found = compile_on("dp=2,ep=4", program, family)
    layers = sum(kind.moe for kind in model.config.kinds)
    assert layers == 2
    assert collections.Counter(one.kind for one in found) == {"all-to-all": 2 * layers, "all-reduce": layers}
    assert {one.shapes for one in found if one.kind == "all-reduce"} == {((),)}
    # What travels is rows, each with its slot on the way out; never a weight.
    rows = 4 * capacity_for(PROGRAMS[program] * model.config.experts_per_token, 4, model.execution.capacity_factor)
    payloads = [one.bytes for one in found if one.kind == "all-to-all"]
    assert sorted(payloads) == sorted(
        layers * [rows * 4 * width for width in (model.config.width, model.config.width + 1)]
    )


def test_sampling_has_no_collectives(compile_on):
    _, found = compile_on("dp=2,ep=4", "sampling")
    assert found == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_one_device_has_no_collectives(compile_on, program):
    _, found = compile_on("dp=1,ep=1", program)
    assert found == []


def test_data_parallel_devices_exchange_nothing(compile_on):
    _, found = compile_on("dp=8", "forward")
    assert found == []


def test_split_heads_and_widths_are_summed_and_only_logits_are_gathered(compile_on):
    model, found = compile_on("ep=2,tp=2", "decode")
    config, layers = model.config, model.config.layers
    kinds = collections.Counter(one.kind for one in found)
    assert kinds == {"all-to-all": 2 * layers, "all-reduce": 3 * layers + 1, "all-gather": 1}
    assert [one.shapes for one in found if one.kind == "all-gather"] == [((1, DECODE.batch, config.vocab_size),)]
    summed = {shape for one in found if one.kind == "all-reduce" for shape in one.shapes}
    assert {shape[-1:] for shape in summed} == {(), (config.width,)}


READINGS = {
    "f32[4,8]{1,0} all-gather(%a), dimensions={0}": Collective("all-gather", "f32", ((4, 8),), 128),
    "bf16[2,3]{1,0:T(8,128)(2,1)S(1)} reduce-scatter(%a)": Collective("reduce-scatter", "bf16", ((2, 3),), 12),
    "s32[] all-reduce(%a), to_apply=%max": Collective("all-reduce", "s32", ((),), 4),
    "pred[5]{0} collective-permute(%a)": Collective("collective-permute", "pred", ((5,),), 5),
    "f8e4m3fn[16]{0} collective-broadcast(%a)": Collective("collective-broadcast", "f8e4m3fn", ((16,),), 16),
    "s4[3]{0} all-to-all(%a)": Collective("all-to-all", "s4", ((3,),), 2),
    "(f32[2]{0}, /*index=1*/f32[2]{0}) all-to-all(%a, %b)": Collective("all-to-all", "f32", ((2,), (2,)), 16),
    "(f32[2]{0}, bf16[2]{0}) all-reduce(%a, %b)": Collective("all-reduce", "bf16,f32", ((2,), (2,)), 12),
    "f32[9]{0} ragged-all-to-all(%a, %b, %c)": Collective("ragged-all-to-all", "f32", ((9,),), 36),
}


@pytest.mark.parametrize("text", READINGS)
def test_an_instruction_is_read_with_its_type_and_size(text):
    assert read_collectives(f"  %some.1 = {text}, channel_id=1") == [READINGS[text]]
    assert read_collectives(f"  ROOT %some.1 = {text}, channel_id=1") == [READINGS[text]]


def test_a_start_and_its_end_are_one_collective_of_the_size_of_its_result():
    hlo = """
      %ag.1 = (f32[2,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%a), dimensions={0}
      %p.1 = (f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%b)
      %sum = f32[2,8]{1,0} add(%a, %a)
      %ag.2 = f32[4,8]{1,0} all-gather-done(%ag.1)
      %p.2 = f32[2]{0} collective-permute-done(%p.1)
    """
    assert read_collectives(hlo) == [
        Collective("all-gather", "f32", ((4, 8),), 128),
        Collective("collective-permute", "f32", ((2,),), 8),
    ]


def test_what_only_mentions_a_collective_is_none():
    hlo = """
      %all-to-all.3 = f32[2]{0} get-tuple-element(%all-to-all.2), index=0
      %x = f32[2]{0} fusion(%all-gather.1), calls=%c, metadata={op_name="jit(f)/shard_map/all_gather"}
    """
    assert read_collectives(hlo) == []
