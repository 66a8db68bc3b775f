"""What is planned is what is loaded, and what XLA says it needs."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest

from jaxmoe import plan as plan_command
from jaxmoe import serve
from jaxmoe.cli import engine_config, model_options, rebalance_config
from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.model import Model
from jaxmoe.models.decoder import Execution
from jaxmoe.models.kv_cache import make_cache
from jaxmoe.models.presets import read_preset
from jaxmoe.planning.ahead import compile_step, unloaded_steps
from jaxmoe.planning.deployment import Deployment, Subject
from jaxmoe.planning.hardware import device_named
from jaxmoe.planning.memory import loading_bytes, memory, pages_of_a_sequence, sequence_bytes, weight_bytes, workspace
from jaxmoe.sharding.mesh import MeshSpec, make_mesh

SMALL = {
    "mixtral": "mixtral-8x7b:scale=64,num_hidden_layers=2,vocab_size=128,num_attention_heads=4,num_key_value_heads=2",
    "deepseek-v3": "deepseek-v3:scale=64,num_hidden_layers=5,vocab_size=128,n_routed_experts=32",
    "llama4": "llama-4-maverick:scale=64,num_hidden_layers=4,vocab_size=128,num_local_experts=8,head_dim=16",
}
# Weights and pages outweigh the temporaries, as they do in use; layers repeat, so that they are scanned.
WEIGHTY = {
    "mixtral": "mixtral-8x7b:scale=16,num_hidden_layers=4",
    "deepseek-v3": "deepseek-v3:scale=32,num_hidden_layers=7,n_routed_experts=64",
    "llama4": "llama-4-maverick:scale=16,num_hidden_layers=8,num_local_experts=16,head_dim=64",
}
MESHES = [
    ("dp=2,ep=4", "ep", 0),
    ("dp=2,ep=4", "dp,ep", 3),
    ("ep=8", "ep", 0),
    ("ep=4,tp=2", "ep", 1),
    ("dp=2,ep=2,tp=2", "dp,ep", 0),
    ("ep=2,tp=4", "ep", 0),
]
SPAN = "attention_chunk_size=64"


def deploy(preset, mesh, axes, redundant=0, dtype="float32", **limits):
    subject = Subject.read(preset, read_preset(preset), dtype)
    return Deployment(
        subject, MeshSpec.parse(mesh, axes), EngineConfig(**limits), redundant_experts=redundant
    )  # fmt: skip


def held(arrays):
    """Bytes on every device, which must all hold alike."""
    leaves = jax.tree.leaves(arrays)
    by_device = {}
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            by_device[shard.device] = by_device.get(shard.device, 0) + shard.data.nbytes
    assert len(set(by_device.values())) == 1
    assert len(by_device) == 8
    return next(iter(by_device.values()))


@functools.cache
def load(preset, mesh, axes, redundant=0, dtype="float32"):
    return Model(None, mesh, dtype, random_weights=preset, expert_axes=axes, redundant_experts=redundant)


def cache_of(model, plan):
    limits = plan.limits
    pages = tuple(count * limits.max_batch for count in pages_of_a_sequence(plan))
    return make_cache(model.config, model.mesh, model.rules, pages, limits.page_size, model.dtype)


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize(("mesh", "axes", "redundant"), MESHES)
def test_planned_bytes_are_those_of_the_arrays_that_are_loaded(family, mesh, axes, redundant):
    preset, dtype = SMALL[family] + (f",{SPAN}" if family == "llama4" else ""), "bfloat16"
    plan = deploy(preset, mesh, axes, redundant, dtype, max_batch=3, max_context=128, max_prefill_tokens=16)
    model = load(preset, mesh, axes, redundant, dtype)
    assert sum(weight_bytes(plan).values()) == held(model.params)
    assert sequence_bytes(plan) * 3 == held(cache_of(model, plan))


FLAGS = {
    ("mixtral", "--mesh", "dp=2,ep=4", "--dtype", "bfloat16"): ("--expert-weights", "int8", "--rebalance"),
    ("mixtral", "--mesh", "ep=4,tp=2", "--redundant-experts", "8"): ("--expert-weights", "bfloat16", "--coverage"),
    ("llama4", "--mesh", "ep=4,tp=2"): ("--rebalance-interval", "8", "--redundant-experts", "4"),
    ("deepseek-v3", "--mesh", "dp=2,ep=4", "--expert-axes", "dp,ep", "--redundant-experts", "3"): (
        "--expert-weights", "float8", "--speculate", "mtp", "--rebalance",
    ),
    ("deepseek-v3", "--mesh", "dp=2,ep=2,tp=2"): ("--speculate", "mtp", "--expert-weights", "int8", "--rebalance"),
}  # fmt: skip


@pytest.mark.parametrize("what", FLAGS, ids=" ".join)
def test_a_server_allocates_what_is_planned_for_the_same_flags(capsys, what):
    family, *layout = what
    limits = ("--max-batch", "3", "--max-context", "128", "--max-prefill-tokens", "16")
    flags = (*layout, *FLAGS[what], *limits)
    plan_command.main(["--model", SMALL[family], "--dtype", "float32", *flags, "--json"])
    planned = json.loads(capsys.readouterr().out)["memory"]
    args = serve.parse(["--random-weights", SMALL[family], *flags])
    model = Model(None, random_weights=args.random_weights, **model_options(args))
    config = engine_config(args, warm_up=False, rebalance=rebalance_config(args), speculate=args.speculate)
    engine = Engine(model, config)
    assert sum(planned["weights"].values()) == held(model.params)
    assert planned["kv"] == held(engine.cache_arrays)
    slots = model.placement.slot_expert.shape[1] // model.mesh_spec.expert_devices
    assert planned["moving"] == held(model.mover._room) * (slots + 1) // slots


def test_experts_in_fewer_bits_arrive_in_the_dtype_that_is_computed_in():
    def deployed(kept):
        subject = Subject.read("mixtral", read_preset(SMALL["mixtral"]), "bfloat16", kept)
        return Deployment(subject, MeshSpec.parse("ep=8"), EngineConfig())

    whole, kept = (sum(weight_bytes(deployed(dtype)).values()) for dtype in ("same", "int8"))
    assert loading_bytes(deployed("same")) == whole
    config = deployed("int8").config
    third = config.layers * config.width * config.expert_width
    scales = config.layers * (2 * config.expert_width + config.width) * 4
    assert kept == whole - 3 * third + scales
    # When bfloat16 gates and ups, two thirds of the experts, are replaced, the rest has been.
    assert loading_bytes(deployed("int8")) == kept + 2 * 2 * third


def test_every_kind_of_weights_is_counted_under_its_name():
    model = load(SMALL["deepseek-v3"], "ep=8", "ep")
    plan = deploy(SMALL["deepseek-v3"], "ep=8", "ep")
    planned, params = weight_bytes(plan), model.params
    further = {name: held(params[name]) // len(plan.config.stacks["moe"]) for name in ("experts", "shared", "router")}
    assert planned["experts"] == held(params["experts"]) - further["experts"]
    assert planned["shared experts"] == held(params["shared"]) - further["shared"]
    assert planned["dense feed-forward"] == held(params["dense"])
    assert planned["embedding, lm_head"] == held([params["embed"], params["lm_head"]])
    assert planned["attention"] == held(params["attention"]) * plan.config.layers // (plan.config.layers + 1)
    assert planned["mtp"] > held(params["mtp"]) + sum(further.values())


def test_layers_that_see_a_chunk_keep_no_more_than_it_however_long_the_context():
    preset = "llama-4-scout"
    near, far = (deploy(preset, "ep=8", "ep", dtype="bfloat16", max_context=tokens) for tokens in (65536, 131072))
    (chunk, full), (chunk_of_far, full_of_far) = (pages_of_a_sequence(plan) for plan in (near, far))
    assert (chunk, full) == (528, 4096)
    assert (chunk_of_far, full_of_far) == (528, 8192)
    token_and_layer = 2 * 8 * 128 * 2
    assert sequence_bytes(near) == (36 * 528 * 16 + 12 * 65536) * token_and_layer


@pytest.mark.parametrize("family", WEIGHTY)
@pytest.mark.parametrize(("mesh", "axes"), [("dp=2,ep=4", "ep"), ("ep=8", "ep"), ("ep=4,tp=2", "ep")])
def test_weights_pages_and_workspace_are_within_a_twentieth_of_what_xla_says(family, mesh, axes):
    plan = deploy(WEIGHTY[family], mesh, axes, max_batch=8, max_context=1024, max_prefill_tokens=64)
    on = make_mesh(plan.spec)
    steps = unloaded_steps(plan, on)
    exact = sum(weight_bytes(plan).values()) + sequence_bytes(plan) * 8
    for shape in (plan.decode, plan.prefill):
        told = compile_step(steps, shape, on)
        planned = exact + workspace(plan, shape).total
        assert planned == pytest.approx(told.needed, rel=0.05)


def test_a_step_that_drafts_needs_what_is_planned_and_drafting_after_it_no_more():
    plan = deploy(WEIGHTY["deepseek-v3"], "ep=8", "ep", max_batch=8, max_context=1024, speculate="mtp")
    on = make_mesh(plan.spec)
    steps = unloaded_steps(plan, on)
    forward = compile_step(steps, plan.decode, on)
    planned = sum(weight_bytes(plan).values()) + sequence_bytes(plan) * 8 + workspace(plan, plan.decode).total
    assert planned == pytest.approx(forward.needed, rel=0.05)
    assert steps.compile_drafting(plan.decode).memory_analysis().temp_size_in_bytes <= forward.temporaries


def test_on_a_tpu_a_latent_takes_whole_tiles():
    plan = deploy("deepseek-v3", "ep=32", "ep", dtype="bfloat16", max_context=4096)
    on_tpu = dataclasses.replace(plan, execution=Execution(platform="tpu"))
    assert sequence_bytes(plan) == 62 * 4096 * 576 * 2
    assert sequence_bytes(on_tpu) == 62 * 4096 * 640 * 2


def test_a_server_makes_no_more_pages_than_the_plan_has_room_for():
    plan = deploy("mixtral-8x7b", "ep=8", "ep", dtype="bfloat16", max_batch=64, max_context=4096)
    used = memory(plan, device_named("h100"))
    assert used.fits
    assert used.needed == used.all_weights + used.kv + used.workspace.total
    assert used.kv < used.kv_capacity < used.limit - used.all_weights


def test_a_dtype_of_half_the_bytes_halves_weights_and_pages():
    whole, half = (deploy(SMALL["mixtral"], "ep=8", "ep", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert sum(weight_bytes(whole).values()) == 2 * sum(weight_bytes(half).values())
    assert sequence_bytes(whole) == 2 * sequence_bytes(half)
    assert half.subject.dtype == jnp.bfloat16
