import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.engine.batch import Packing, StepShape
from jaxmoe.engine.executables import Executables
from jaxmoe.engine.model import Model
from jaxmoe.models.decoder import RANK_ROWS, Execution
from jaxmoe.models.kv_cache import make_cache
from jaxmoe.moe.strategy import Mixture, num_collectives
from jaxmoe.sharding import Collective, collectives, read_collectives, summarise
from jaxmoe.sharding.mesh import MeshSpec, make_mesh

BATCH, LENGTH = 2, 12
DECODE, PREFILL = StepShape(batch=2, tokens=1, pages=8), StepShape(batch=1, tokens=6, pages=8)
PROGRAMS = {"forward": BATCH * LENGTH, "decode": DECODE.batch, "prefill": PREFILL.tokens}
# Two mixtures each; the others have dense layers as well, latent attention or chunks, shared experts.
FAMILIES = {
    "mixtral": "mixtral-8x7b:scale=128,num_hidden_layers=2,vocab_size=128,num_attention_heads=4,num_key_value_heads=2",
    "deepseek-v3": "deepseek-v3:scale=128,num_hidden_layers=5,vocab_size=128,n_routed_experts=32",
    "llama4": "llama-4-maverick:scale=128,num_hidden_layers=4,vocab_size=128,num_local_experts=8,head_dim=16",
}
MIXTURES = 2
OF_BATCH = ("sampling", "adjusting", "reporting")
SPREAD = [("dp=2,ep=4", "ep", ("ep",)), ("dp=2,ep=4", "dp,ep", ("dp", "ep")), ("ep=8", "ep", ("ep",))]


def each_pair(step):
    """Every two of spread, program and family meet once: nine of the 27, and for another step another nine."""
    families = list(FAMILIES)
    return [
        (*spread, program, families[(row + step * column) % 3])
        for row, spread in enumerate(SPREAD)
        for column, program in enumerate(PROGRAMS)
    ]


@functools.cache
def model_on(mesh, axes="ep", family="mixtral", strategy="all_to_all", unroll=True):
    # Layers written out, so that every collective of a step stands in its text once.
    execution = Execution(strategy=strategy, capacity_factor=1.0, unroll=unroll)
    return Model(None, mesh, execution=execution, random_weights=FAMILIES[family], expert_axes=axes)


def compiled(model, program):
    """The collectives of a program of the model."""
    with jax.set_mesh(model.mesh):
        if program == "forward":
            tokens = np.zeros((model.num_ranks, BATCH, LENGTH), np.int32)
            placed = jax.device_put((tokens, tokens), NamedSharding(model.mesh, RANK_ROWS))
            return collectives(model._forward, model.params, model.placement, *placed)
        pages = (8,) * len(model.config.spans)
        cache = make_cache(model.config, model.mesh, model.rules, pages, 4, model.dtype)
        executables = Executables(model, cache, Packing(model.config.spans, 4, 8))
        if program in OF_BATCH:
            return collectives(getattr(executables, f"compile_{program}")(DECODE.batch))
        return collectives(executables.compile({"decode": DECODE, "prefill": PREFILL}[program]))


def mixture_of(model, program):
    config = model.config
    devices = model.mesh_spec.expert_devices
    return Mixture(PROGRAMS[program], config.width, config.experts_per_token, devices, 4, 1.0)


@pytest.mark.parametrize(("mesh", "axes", "along", "program", "family"), each_pair(1))
def test_a_mixture_has_two_all_to_alls_and_at_most_one_scalar_all_reduce_and_nothing_else(
    mesh, axes, along, program, family
):
    model = model_on(mesh, axes, family)
    assert sum(kind.moe for kind in model.config.kinds) == MIXTURES
    shape, found = mixture_of(model, program), compiled(model, program)
    agreements = MIXTURES * (shape.most_rounds > 1)
    expected = {"all-to-all": 2 * MIXTURES, "all-reduce": agreements} if agreements else {"all-to-all": 2 * MIXTURES}
    assert collections.Counter(one.kind for one in found) == expected
    assert len(found) == MIXTURES * num_collectives("all_to_all", shape)
    assert {one.shapes for one in found if one.kind == "all-reduce"} <= {((),)}
    # What travels is rows, with their slots and weights on the way out; never a weight of an expert.
    travelling = [one for one in found if one.kind == "all-to-all"]
    assert {(one.axes, one.dtype) for one in travelling} == {(along, "u32")}
    rows = shape.devices * shape.capacity
    assert sorted(one.bytes for one in travelling) == sorted(MIXTURES * [rows * each for each in shape.row_bytes])


@pytest.mark.parametrize(("mesh", "axes", "along", "program", "family"), each_pair(2))
def test_replicating_tokens_takes_one_all_gather_and_one_reduce_scatter(mesh, axes, along, program, family):
    model = model_on(mesh, axes, family, "replicate")
    shape, found = mixture_of(model, program), compiled(model, program)
    assert collections.Counter(one.kind for one in found) == {"all-gather": MIXTURES, "reduce-scatter": MIXTURES}
    assert {one.axes for one in found} == {along}
    to, back = shape.row_bytes
    sizes = {"all-gather": shape.devices * shape.tokens * to, "reduce-scatter": shape.tokens * back}
    assert all(one.bytes == sizes[one.kind] for one in found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("program", ["decode", "prefill"])
def test_scanned_layers_have_the_collectives_of_layers_written_out(program, family):
    """As a server runs them: nothing more, in the loop or before it, and no weight of all layers at once."""
    mesh, axes, _ = SPREAD[0]
    models = [model_on(mesh, axes, family, unroll=unroll) for unroll in (True, False)]
    written, scanned = ({dataclasses.replace(one, in_loop=False) for one in compiled(each, program)} for each in models)
    assert scanned == written


@pytest.mark.parametrize("program", OF_BATCH)
def test_sampling_has_no_collectives(program):
    assert compiled(model_on("dp=2,ep=4"), program) == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_one_device_has_no_collectives(program):
    assert compiled(model_on("dp=1,ep=1"), program) == []


def test_data_parallel_devices_exchange_nothing():
    assert compiled(model_on("dp=8"), "forward") == []


@pytest.mark.parametrize("family", FAMILIES)
def test_tp_sums_what_it_splits_token_by_token_and_gathers_logits(family):
    model = model_on("ep=2,tp=2", "ep", family)
    found, config, split = compiled(model, "decode"), model.config, model.rules.split
    by_tp = [one for one in found if one.axes == ("tp",)]
    # Attention in every layer, dense layers, experts and shared experts of mixtures, the embedding. XLA may join two.
    parts = {"heads": config.layers, "dense_width": config.layers - MIXTURES, "expert_width": MIXTURES}
    parts |= {"shared_width": MIXTURES, "vocab": 1}
    summed = [shape for one in by_tp if one.kind == "all-reduce" for shape in one.shapes]
    assert len(summed) == sum(count for name, count in parts.items() if name in split)
    assert {tuple(sorted(shape)) for shape in summed} == {(1, DECODE.batch, config.width)}
    gathered = [one.shapes for one in by_tp if one.kind == "all-gather"]
    assert gathered == [((1, DECODE.batch, config.vocab_size),)]
    rest = collections.Counter((one.kind, one.axes) for one in found if one.axes != ("tp",))
    assert rest == {("all-to-all", ("ep",)): 2 * MIXTURES}


def test_collectives_of_any_function_are_told_with_their_axes():
    mesh = make_mesh(MeshSpec(2, 2, 2))
    x = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P(("dp", "ep", "tp"))))

    def summed(axes):
        local = functools.partial(jax.lax.psum, axis_name=axes)
        return jax.shard_map(local, in_specs=P(("dp", "ep", "tp")), out_specs=P(None), check_vma=False)

    with jax.set_mesh(mesh):
        for axes in ("dp", "ep", "tp", ("dp", "tp"), ("ep", "tp"), ("dp", "ep", "tp")):
            (found,) = collectives(summed(axes), x)
            assert found == Collective("all-reduce", "f32", ((1, 4),), 16, (axes,) if isinstance(axes, str) else axes)
        (again,) = collectives(jax.jit(summed("ep")), x)
        assert again.axes == ("ep",)


def test_a_function_jitted_lowered_or_compiled_has_the_same_collectives():
    mesh = make_mesh(MeshSpec.parse("dp=2,ep=4"))
    x = jax.device_put(jnp.zeros((8, 8)), NamedSharding(mesh, P(("dp", "ep"))))
    by_columns = functools.partial(jax.sharding.reshard, out_shardings=P("dp", "ep"))
    with jax.set_mesh(mesh):
        lowered = jax.jit(by_columns).lower(x)
    expected = [Collective("all-to-all", "f32", 4 * ((1, 1, 1, 2),), 32, ("ep",))]
    for fn, args in ((by_columns, (x,)), (jax.jit(by_columns), (x,)), (lowered, ()), (lowered.compile(), ())):
        assert collectives(fn, *args, mesh=mesh) == expected
    with pytest.raises(TypeError, match="Lowered has its arguments already"):
        collectives(lowered, x, mesh=mesh)


def test_what_stands_in_a_loop_is_marked_however_deep():
    mesh = make_mesh(MeshSpec.parse("dp=2,ep=4"))
    spec = P("dp", None)

    def summed(x):
        def again(x):
            return jax.lax.cond(x[0, 0] > 0, lambda x: jax.lax.psum(x, "ep"), jnp.cos, x)

        return jax.lax.while_loop(lambda x: jnp.max(x) < 9, again, jax.lax.psum(x, "ep"))

    x = jax.ShapeDtypeStruct((2, 5), jnp.float32, sharding=NamedSharding(mesh, spec))
    found = collectives(jax.shard_map(summed, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False), x, mesh=mesh)
    assert {(one.kind, one.axes, one.bytes) for one in found} == {("all-reduce", ("ep",), 20)}
    assert sorted(one.in_loop for one in found) == [False, True]


def test_rounds_are_a_loop_and_one_round_is_none():
    model = model_on("dp=2,ep=4")
    for program in ("forward", "decode"):
        several = mixture_of(model, program).most_rounds > 1
        looped = {one.in_loop for one in compiled(model, program) if one.kind == "all-to-all"}
        assert several == (program == "forward")
        assert looped == {several}


def test_a_table_has_one_line_for_equal_collectives():
    hlo = "%a = (f32[4,8]{1,0}, f32[4,8]{1,0}) all-to-all(%b, %c), replica_groups={{0,1,2,3},{4,5,6,7}}\n"
    found = read_collectives(2 * hlo + "%d = s32[] all-reduce(%e), replica_groups={{0,3}}", {"dp": 2, "ep": 4})
    assert summarise(found).splitlines() == [
        "count  kind        axes  in a loop  bytes  arrays",
        "    2  all-to-all  ep    no           256  2 x f32[4,8]",
        "    1  all-reduce  -     no             4  s32[]",
    ]


GROUPS = {
    "replica_groups={{0,1},{2,3},{4,5},{6,7}}": ("tp",),
    "replica_groups={{0,2,1,3},{4,5,6,7}}": ("ep", "tp"),
    "replica_groups=[4,2]<=[8]": ("tp",),
    "replica_groups=[4,2]<=[2,4]T(1,0)": ("dp",),
    "replica_groups=[4,2]<=[2,2,2]T(0,2,1)": ("ep",),
    "replica_groups=[1,8]<=[8]": ("dp", "ep", "tp"),
    "replica_groups={}": ("dp", "ep", "tp"),
    "replica_groups={{0,3},{1,2},{4,7},{5,6}}": (),
    "source_target_pairs={{0,2},{2,0},{5,7}}": ("ep",),
    "replica_groups=mesh['dp'=2,'ep'=2,'tp'=2] {'ep'}": ("ep",),
    "replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=1,'axis_4'=2] {'axis_1'}": ("dp", "ep"),
    "replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1','axis_0'}": ("dp", "ep", "tp"),
    "replica_groups=mesh['axis_0'=8] {'axis_0':(1)4}": ("dp", "ep"),
    "replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}": ("ep",),
    "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}": ("dp",),
    "replica_groups=mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'a'}": ("ep", "tp"),
    "channel_id=1": (),
}


@pytest.mark.parametrize("text", GROUPS)
def test_devices_that_exchange_are_told_as_axes(text):
    (found,) = read_collectives(f"%a = f32[2]{{0}} all-reduce(%b), {text}, to_apply=%c", {"dp": 2, "ep": 2, "tp": 2})
    assert found.axes == GROUPS[text]


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
      %ag.1 = (f32[2,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%a), replica_groups={{0,1},{2,3}}, dimensions={0}
      %p.1 = (f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%b), source_target_pairs={{0,2},{1,3}}
      %sum = f32[2,8]{1,0} add(%a, %a)
      %ag.2 = f32[4,8]{1,0} all-gather-done(%ag.1)
      %p.2 = f32[2]{0} collective-permute-done(%p.1)
    """
    assert read_collectives(hlo, {"dp": 2, "ep": 2}) == [
        Collective("all-gather", "f32", ((4, 8),), 128, ("ep",)),
        Collective("collective-permute", "f32", ((2,),), 8, ("dp",)),
    ]


def test_what_only_mentions_a_collective_is_none():
    hlo = """
      %all-to-all.3 = f32[2]{0} get-tuple-element(%all-to-all.2), index=0
      %x = f32[2]{0} fusion(%all-gather.1), calls=%c, metadata={op_name="jit(f)/shard_map/all_gather"}
    """
    assert read_collectives(hlo) == []
