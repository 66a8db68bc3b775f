import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.engine.batch import Packing, StepShape
from jaxmoe.engine.executables import Executables
from jaxmoe.engine.model import Model
from jaxmoe.errors import MeshError
from jaxmoe.models.decoder import RANK_ROWS, Execution
from jaxmoe.models.kv_cache import make_cache
from jaxmoe.moe.strategy import Mixture, num_collectives
from jaxmoe.sharding import Collective, read_collectives, summarise
from jaxmoe.sharding import collectives as collectives_of
from jaxmoe.sharding.mesh import MeshSpec, make_mesh

BATCH, LENGTH = 2, 12
DECODE, PREFILL = StepShape(batch=2, tokens=1, pages=8), StepShape(batch=1, tokens=6, pages=8)
PROGRAMS = {"forward": BATCH * LENGTH, "decode": DECODE.batch, "prefill": PREFILL.tokens}


# Two mixtures each; the others have dense layers as well, latent attention or chunks, shared experts.
FAMILIES = {
    "mixtral": "mixtral-8x7b:scale=128,num_hidden_layers=2,vocab_size=128,num_attention_heads=4,num_key_value_heads=2",
    "deepseek-v3": "deepseek-v3:scale=128,num_hidden_layers=5,vocab_size=128,n_routed_experts=32,num_attention_heads=2,"
    "num_key_value_heads=2",
    "llama4": "llama-4-maverick:scale=128,num_hidden_layers=4,vocab_size=128,num_local_experts=8,num_attention_heads=4,"
    "num_key_value_heads=2,head_dim=16",
}
LAYERS = 2  # mixtures of each


@pytest.fixture(scope="module")
def compile_on():
    """`compile_on("dp=2,ep=4", "decode")`: the model, and the collectives of that program, its layers written out."""
    models = {}

    def compile_on(mesh, program, family="mixtral", strategy="all_to_all", expert_axes="ep"):
        key = (mesh, family, strategy, expert_axes)
        if key not in models:
            models[key] = Model(
                None,
                MeshSpec.parse(mesh, expert_axes),
                execution=Execution(strategy=strategy, unroll=True),
                random_weights=FAMILIES[family],
            )
        model = models[key]
        assert sum(kind.moe for kind in model.config.kinds) == LAYERS
        compiled = forward(model) if program == "forward" else step(model, program)
        return model, collectives_of(compiled, mesh=model.mesh)

    def forward(model):
        tokens = np.zeros((model.num_ranks, BATCH, LENGTH), np.int32)
        with jax.set_mesh(model.mesh):
            placed = jax.device_put((tokens, tokens), NamedSharding(model.mesh, RANK_ROWS))
            return model._forward.lower(model.params, model.placement, *placed)

    def step(model, program):
        pages = (8,) * len(model.config.spans)
        cache = make_cache(model.config, model.mesh, model.rules, pages, 4, model.dtype)
        executables = Executables(model, cache, Packing(model.config.spans, 4))
        if program == "sampling":
            return executables.compile_sampling(DECODE.batch)
        return executables.compile({"decode": DECODE, "prefill": PREFILL}[program])

    return compile_on


def mixture_of(model, program):
    """The shape of each of its mixture layers in that program."""
    config, devices = model.config, model.mesh_spec.expert_devices
    return Mixture(PROGRAMS[program], config.width, config.experts_per_token, devices, model.dtype.itemsize)


def of_kind(found, kind):
    return [one for one in found if one.kind == kind]


def assert_exchanges(found, shape, axes):
    """Two all-to-alls a mixture over these axes, of the rows of one round, and what finds out how many rounds.

    An exchange sends the slots and weights of its rows along, and never a weight of the model.
    """
    several = shape.most_rounds > 1
    travelling = of_kind(found, "all-to-all")
    assert {one.axes for one in travelling} == {axes}
    assert {one.in_loop for one in travelling} == {several}
    payloads = [shape.devices * shape.capacity * bytes_of_row for bytes_of_row in shape.row_bytes]
    assert sorted(one.bytes for one in travelling) == sorted(LAYERS * payloads)
    agreed = [one for one in of_kind(found, "all-reduce") if one.shapes == ((),)]
    assert [one.axes for one in agreed] == LAYERS * several * [("dp", "ep")]
    assert len(travelling) + len(agreed) == LAYERS * num_collectives("all_to_all", shape)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_mixture_has_two_all_to_alls_and_at_most_one_scalar_all_reduce_and_nothing_else(compile_on, program, family):
    model, found = compile_on("dp=2,ep=4", program, family)
    shape = mixture_of(model, program)
    assert_exchanges(found, shape, ("ep",))
    assert len(found) == LAYERS * num_collectives("all_to_all", shape)


def test_programs_with_one_round_and_with_several_are_both_looked_at(compile_on):
    model, _ = compile_on("dp=2,ep=4", "decode")
    assert [mixture_of(model, program).most_rounds > 1 for program in PROGRAMS] == [True, False, False]


@pytest.mark.parametrize(
    ("program", "family"),
    [*((program, "mixtral") for program in PROGRAMS), ("decode", "deepseek-v3"), ("decode", "llama4")],
)
def test_experts_over_all_ranks_are_exchanged_over_both_axes_at_once(compile_on, program, family):
    model, found = compile_on("dp=2,ep=4", program, family, expert_axes="dp,ep")
    shape = mixture_of(model, program)
    assert shape.devices == 8
    assert_exchanges(found, shape, ("dp", "ep"))
    assert len(found) == LAYERS * num_collectives("all_to_all", shape)


@pytest.mark.parametrize(("program", "expert_axes"), [*((program, "ep") for program in PROGRAMS), ("decode", "dp,ep")])
def test_replicating_tokens_is_one_gather_and_one_scatter_a_mixture(compile_on, program, expert_axes):
    model, found = compile_on("dp=2,ep=4", program, strategy="replicate", expert_axes=expert_axes)
    shape = mixture_of(model, program)
    assert {one.axes for one in found} == {tuple(expert_axes.split(","))}
    assert not any(one.in_loop for one in found)
    out, back = (shape.tokens * bytes_of_row for bytes_of_row in shape.row_bytes)
    assert [one.bytes for one in of_kind(found, "all-gather")] == LAYERS * [shape.devices * out]
    assert [one.bytes for one in of_kind(found, "reduce-scatter")] == LAYERS * [back]
    assert len(found) == LAYERS * num_collectives("replicate", shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_replicating_tokens_costs_two_collectives_in_every_family(compile_on, family):
    _, found = compile_on("dp=2,ep=4", "decode", family, strategy="replicate")
    assert collections.Counter(one.kind for one in found) == {"all-gather": LAYERS, "reduce-scatter": LAYERS}


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


@pytest.mark.parametrize("family", FAMILIES)
def test_split_heads_and_widths_are_summed_and_only_logits_are_gathered(compile_on, family):
    model, found = compile_on("ep=2,tp=2", "decode", family)
    config, shape = model.config, mixture_of(model, "decode")
    assert {"heads", "expert_width", "vocab"} <= model.rules.split
    assert_exchanges(found, shape, ("ep",))
    summed, gathered = of_kind(found, "all-reduce"), of_kind(found, "all-gather")
    assert {one.axes for one in summed + gathered} == {("tp",)}
    # XLA may sum several arrays at once. They are the embedding; attention, and experts or the dense part, of each
    # layer; and shared experts.
    arrays = [math.prod(array) for one in summed for array in one.shapes]
    sums = 1 + 2 * config.layers + LAYERS * bool(config.shared_width)
    assert arrays == sums * [DECODE.batch * config.width]
    assert [one.shapes for one in gathered] == [((1, DECODE.batch, config.vocab_size),)]
    assert len(found) == len(summed) + len(gathered) + LAYERS * num_collectives("all_to_all", shape)


def test_a_function_is_compiled_for_arrays_and_for_their_shapes_alike():
    mesh = make_mesh(MeshSpec.parse("dp=2,ep=4"))
    array = jax.device_put(jnp.zeros((8, 8)), NamedSharding(mesh, P(("dp", "ep"))))
    shape = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
    expected = [Collective("all-to-all", "f32", 4 * ((1, 1, 1, 2),), 32, ("ep",))]
    by_columns = functools.partial(jax.sharding.reshard, out_shardings=P("dp", "ep"))
    assert collectives_of(by_columns, array, mesh=mesh) == expected
    assert collectives_of(by_columns, shape, mesh=mesh) == expected
    assert collectives_of(jax.jit(by_columns), shape, mesh=mesh) == expected
    with jax.set_mesh(mesh):
        assert collectives_of(by_columns, shape) == expected
        lowered = jax.jit(by_columns).lower(array)
    assert collectives_of(lowered) == collectives_of(lowered.compile()) == expected
    with pytest.raises(TypeError, match="Lowered has its arguments already"):
        collectives_of(lowered, array)


def test_what_a_function_does_again_and_again_is_marked():
    mesh = make_mesh(MeshSpec.parse("dp=2,ep=4"))

    def summed(x):
        def once(x):
            return jax.lax.psum(x, "ep")

        def until_large(x):
            return jax.lax.while_loop(lambda x: jnp.max(x) < 9, lambda x: jax.lax.psum(x, "ep"), x)

        return until_large(once(x))

    spec = P("dp", None)
    run = jax.shard_map(summed, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    found = collectives_of(run, jax.device_put(jnp.ones((2, 5)), NamedSharding(mesh, spec)), mesh=mesh)
    assert [(one.kind, one.axes, one.bytes) for one in found] == 2 * [("all-reduce", ("ep",), 20)]
    assert sorted(one.in_loop for one in found) == [False, True]


MESH = {"dp": 2, "ep": 4, "tp": 1}
GROUPS = {
    "replica_groups={{0,1,2,3},{4,5,6,7}}": ("ep",),
    "replica_groups={{3,2,1,0},{4,5,6,7}}": ("ep",),
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}": ("dp",),
    "replica_groups={{0,1,2,3,4,5,6,7}}": ("dp", "ep"),
    "replica_groups={}": ("dp", "ep"),
    "replica_groups={{0,1},{2,3},{4,5},{6,7}}": (),
    "replica_groups={{0,1,2,3}}": (),
    "replica_groups=[2,4]<=[8]": ("ep",),
    "replica_groups=[4,2]<=[2,4]T(1,0)": ("dp",),
    "replica_groups=[1,8]<=[8]": ("dp", "ep"),
    "replica_groups=[4,2]<=[8]": (),
    "replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_2'}": ("ep",),
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}": ("dp",),
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}": ("dp", "ep"),
    "replica_groups=mesh['a'=8] {'a':(2)4}": ("ep",),
    "replica_groups=mesh['a'=8] {'a':(1)2}": ("dp",),
    "replica_groups=mesh['a'=8] {'a':(2)2}": (),
    "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}": ("dp",),
    "replica_groups=mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'a'}": ("ep",),
    "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}": ("ep",),
    "source_target_pairs={{0,4},{4,0}}": ("dp",),
    "source_target_pairs={{0,5}}": ("dp", "ep"),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_axes_are_those_whose_groups_an_instruction_joins(groups):
    kind = "collective-permute" if groups.startswith("source") else "all-to-all"
    (found,) = read_collectives(f"%a = f32[8]{{0}} {kind}(%b), channel_id=1, {groups}, dimensions={{0}}", MESH)
    assert found == Collective(kind, "f32", ((8,),), 32, GROUPS[groups])


def test_devices_that_a_mesh_does_not_have_are_an_error():
    with pytest.raises(MeshError, match=r"device 7 and the mesh \{'ep': 4\} has 4"):
        read_collectives("%a = f32[8]{0} all-to-all(%b), replica_groups={{0,7}}", {"ep": 4})


def test_a_table_counts_equal_collectives_together():
    hlo = "%a = (f32[4,8]{1,0}, f32[4,8]{1,0}) all-to-all(%b, %c), replica_groups={{0,1,2,3},{4,5,6,7}}\n"
    assert summarise(read_collectives(2 * hlo + "%d = s32[] all-reduce(%e), replica_groups={{0,3}}", MESH)) == (
        "count  kind        axes  in loop  bytes  arrays\n"
        "    2  all-to-all  ep    no         256  2 x f32[4,8]\n"
        "    1  all-reduce  -     no           4  s32[]"
    )


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
      %ag.1 = (f32[2,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%a), replica_groups={{0,4},{1,5},{2,6},{3,7}}
      %p.1 = (f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%b)
      %sum = f32[2,8]{1,0} add(%a, %a)
      %ag.2 = f32[4,8]{1,0} all-gather-done((f32[2,8]{1,0}, f32[4,8]{1,0}) %ag.1)
      %p.2 = f32[2]{0} collective-permute-done(%p.1)
    """
    assert read_collectives(hlo, MESH) == [
        Collective("all-gather", "f32", ((4, 8),), 128, ("dp",)),
        Collective("collective-permute", "f32", ((2,),), 8),
    ]


def test_what_only_mentions_a_collective_is_none():
    hlo = """
      %all-to-all.3 = f32[2]{0} get-tuple-element(%all-to-all.2), index=0
      %x = f32[2]{0} fusion(%all-gather.1), calls=%c, metadata={op_name="jit(f)/shard_map/all_gather"}
    """
    assert read_collectives(hlo) == []
