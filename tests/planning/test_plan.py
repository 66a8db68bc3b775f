"""The command, and the figures that it stands on."""

import importlib.util
import json

import pytest

from jaxmoe import plan
from jaxmoe.engine.config import EngineConfig
from jaxmoe.errors import ConfigError
from jaxmoe.models.decoder import Execution
from jaxmoe.models.presets import read_preset
from jaxmoe.planning.ahead import compile_step, tpu_mesh, unloaded_steps
from jaxmoe.planning.deployment import Deployment, Subject
from jaxmoe.planning.hardware import DEVICES, GIB, device_named
from jaxmoe.planning.memory import memory
from jaxmoe.planning.meshes import options, smallest
from jaxmoe.planning.roofline import active_slots, step_time
from jaxmoe.sharding.mesh import MeshSpec

H100, H200 = DEVICES["h100"], DEVICES["h200"]


def deploy(preset, mesh, axes="ep", device=H100, **limits):
    subject = Subject.read(preset, read_preset(preset), "bfloat16")
    limits = EngineConfig(**{"max_context": 4096, **limits})
    return Deployment(subject, MeshSpec.parse(mesh, axes), limits, Execution(platform=device.platform))


def command(capsys, *arguments):
    code = plan.main([*arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


# Copies of the experts, 2 and 8 of them, take the room that one leaves.
@pytest.mark.parametrize(
    ("mesh", "fits"),
    [("dp=2,ep=8", False), ("ep=32", True), ("dp=8,ep=16", False), ("ep=128", True), ("dp=4,ep=8,tp=4", True)],
)
def test_deepseek_v3_is_planned_on_16_32_and_128_devices_that_are_not_here(capsys, mesh, fits):
    code, out, err = command(capsys, "--model", "deepseek-v3", "--mesh", mesh, "--device", "h200")
    assert err == ""
    assert "671.0 B parameters, 37.6 B active a token, 11.6 B more predict a token further" in out
    assert all(title in out for title in ("MEMORY", "DECODE: at best", "PREFILL: at best", "MESHES of"))
    assert max(map(len, out.splitlines())) <= 100
    assert code == (0 if fits else 1)
    assert ("DOES NOT FIT" in out) != fits


def test_what_does_not_fit_is_told_with_the_smallest_mesh_that_does(capsys):
    code, out, _ = command(capsys, "--model", "deepseek-v3", "--mesh", "dp=2,ep=8", "--device", "h200")
    assert code == 1
    assert "DOES NOT FIT: needs 209.7 GiB on each device, 152.2 GiB of it experts; 129.2 GiB can be used." in out
    told = next(line for line in out.splitlines() if line.startswith("The smallest mesh that does is "))
    mesh = told.split("is ")[1].split(":")[0]
    code, out, _ = command(capsys, "--model", "deepseek-v3", "--mesh", mesh, "--device", "h200", "--batch", "32")
    assert code == 0
    assert "DOES NOT FIT" not in out


def test_the_smallest_mesh_is_the_smallest():
    load = deploy("deepseek-v3", "dp=2,ep=8", device=H200)
    best = smallest(load, H200)
    assert best is not None
    assert best.memory.fits
    assert best.deployment.sequences >= load.sequences
    assert not any(each.memory.fits for each in options(load, H200, best.spec.num_devices // 2))


def test_machines_get_the_same_figures(capsys):
    code, out, _ = command(capsys, "--model", "mixtral-8x7b", "--mesh", "ep=8", "--json")
    assert code == 0
    told = json.loads(out)
    used = memory(deploy("mixtral-8x7b", "ep=8"), H100)
    assert told["fits"]
    assert told["memory"]["needed"] == used.needed
    assert told["parameters"]["total"] == 46_702_792_704
    assert {each["kind"] for each in told["steps"]["decode"]["collectives"]} <= {"all-gather", "reduce-scatter"}


def test_machines_are_told_the_smallest_mesh_where_this_one_does_not_fit(capsys):
    arguments = ("--model", "deepseek-v3", "--mesh", "ep=16", "--json")
    told = json.loads(command(capsys, *arguments)[1])
    assert not told["fits"]
    enough = told["smallest_that_fits"]
    assert enough["fits"]
    code, out, _ = command(capsys, *arguments, "--mesh", enough["mesh"], "--batch", str(enough["sequences_a_rank"]))
    assert code == 0
    assert json.loads(out)["memory"]["needed"] == enough["needed"]
    assert json.loads(out)["smallest_that_fits"] is None


ADVICE = {
    ("deepseek-v3", "dp=8,ep=16", "h100"): "dp=1,ep=128 fits, and decodes in",
    ("deepseek-v3", "dp=4,ep=32", "h200"): "dp=1,ep=128 would decode 1.",
    ("mixtral-8x7b", "ep=8", "h100"): "No mesh of as many devices decodes faster.",
    ("mixtral-8x7b", "dp=1,ep=1", "h100"): "None of them fits.",
}


@pytest.mark.parametrize("what", ADVICE, ids=" ".join)
def test_a_better_mesh_is_told_and_no_better_one_made_up(capsys, what):
    model, mesh, device = what
    _, out, _ = command(capsys, "--model", model, "--mesh", mesh, "--device", device)
    assert ADVICE[what] in out.partition("MESHES of")[2]


def test_a_folder_is_planned_from_its_config_alone(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(read_preset("mixtral-8x7b")))
    code, out, _ = command(capsys, "--model", str(tmp_path), "--mesh", "ep=8")
    assert code == 0
    assert "46.7 B parameters, 12.9 B active a token" in out


WRONG = {
    ("--model", "gpt-4"): "'gpt-4' is neither a folder nor a known model; use one of mixtral-8x7b",
    ("--model", "mixtral-8x7b", "--device", "abacus"): "device 'abacus' is not known; use one of a100, h100",
    ("--model", "mixtral-8x7b", "--mesh", "ep"): "'ep' is not one of dp=N, ep=N, tp=N",
    ("--model", "mixtral-8x7b", "--mesh", "tp=11"): "tp=11 divides none of heads=32",
    ("--model", "mixtral-8x7b", "--context", "99999"): "context=99999 is beyond the model's 32768 positions",
    ("--model", "mixtral-8x7b", "--batch", "0"): "max_batch=0 must be a whole number of at least 1",
    ("--model", "mixtral-8x7b", "--aot", "v5p"): "--aot 'v5p' is not of the form tpu:NAME:TOPOLOGY",
    ("--model", "mixtral-8x7b", "--speculate", "mtp"): "needs a layer for multi-token prediction, which mixtral-8x7b",
    ("--model", "mixtral-8x7b", "--mesh", "ep=8", "--coverage"): "8 slots cannot hold 8 experts 2 times",
    ("--model", "mixtral-8x7b", "--device", "cpu", "--dispatch", "ragged_all_to_all"): "is not implemented on cpu",
}


@pytest.mark.parametrize("arguments", WRONG, ids=lambda arguments: " ".join(arguments[2:]) or arguments[1])
def test_what_cannot_be_planned_is_told_and_exits_with_2(capsys, arguments):
    code, out, err = command(capsys, *arguments)
    assert (code, out) == (2, "")
    assert WRONG[arguments] in err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_it_is_told_what_to_install(capsys):
    code, _, err = command(capsys, "--model", "mixtral-8x7b:scale=64", "--mesh", "ep=16", "--aot", "tpu:v5e:4x4")
    assert code == 2
    assert "pip install 'jaxmoe[tpu]'" in err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_steps_compile_for_a_slice_that_is_not_here(capsys):
    model = "deepseek-v3:scale=32,num_hidden_layers=4,n_routed_experts=32"
    arguments = ("--model", model, "--mesh", "ep=16", "--context", "256", "--batch", "8", "--aot", "tpu:v5e:4x4")
    code, out, _ = command(capsys, *arguments)
    assert code == 0
    assert "COMPILED for tpu:v5e:4x4" in out
    assert "ragged-all-to-all" in out


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_temporaries_on_a_tpu_do_not_grow_with_layers():
    def temporaries(layers):
        preset = f"deepseek-v3:scale=2,num_hidden_layers={layers},n_routed_experts=32"
        # Pages enough that no copy of a stack would fit the memory that is beside the main one.
        plan = deploy(preset, "ep=4", device=DEVICES["v5e"], max_batch=32, max_context=2048)
        mesh = tpu_mesh("v5e", "2x2", plan.spec)
        return compile_step(unloaded_steps(plan, mesh), plan.decode, mesh).temporaries

    assert temporaries(9) == pytest.approx(temporaries(5), rel=0.02)


def test_the_command_lists_every_device():
    assert tuple(DEVICES) == plan.DEVICES
    with pytest.raises(ConfigError, match="use one of a100"):
        device_named("h1000")


def test_few_tokens_touch_few_experts_and_many_touch_all():
    few, many = (deploy("deepseek-v3", "ep=32", max_batch=batch) for batch in (1, 64))
    # 32 tokens choose 8 of 256 experts each: 1 - (1 - 8/256)^32 of them are touched, 8 lie on each device.
    assert active_slots(few, few.decode) == pytest.approx(8 * (1 - (31 / 32) ** 32))
    assert active_slots(many, many.decode) == pytest.approx(8, rel=1e-6)


def test_one_sequence_on_one_device_reads_the_parameters_that_one_token_meets():
    one = deploy("mixtral-8x7b", "dp=1,ep=1", max_batch=1, max_context=16)
    step = step_time(one, one.decode, H200)
    read = sum(part.bytes for part in step.parts if part.name != "KV and scores")
    count = one.subject.count
    active = count.active - count.embedding + one.config.width
    assert read == pytest.approx(2 * active)
    multiplied = sum(part.flops for part in step.parts if part.name != "KV and scores")
    norms = (2 * one.config.layers + 1) * one.config.width
    assert multiplied == pytest.approx(2 * (count.active - count.embedding - norms))
    assert step.bound == "memory"


def test_drafting_takes_a_layer_and_the_logits_again():
    plain, drafting = (deploy("deepseek-v3", "ep=32", speculate=speculate) for speculate in (None, "mtp"))
    one, step = (step_time(each, each.decode, H200) for each in (plain, drafting))
    forward, further = ({part.name: part for part in step.parts if part.drafts == drafts} for drafts in (False, True))
    config = drafting.config
    for name, layers in (("attention", config.layers), ("experts", 58), ("shared experts", 58)):
        assert further[name].bytes == pytest.approx(forward[name].bytes / layers)
        assert further[name].flops == pytest.approx(forward[name].flops / layers)
    assert further["embedding, lm_head"].flops == forward["embedding, lm_head"].flops / 2
    assert further["mtp"].bytes == pytest.approx(2 * config.width * (2 * config.width + 3))
    # Two rows a sequence: twice the work, and as many tokens if every draft is right.
    assert forward["attention"].flops == 2 * next(part for part in one.parts if part.name == "attention").flops
    assert (step.tokens, step.drafts, one.tokens, one.drafts) == (2 * one.tokens, one.tokens, one.tokens, 0)


def test_experts_of_8_bits_are_read_in_half_the_time_and_drafts_are_told(capsys):
    def experts(*flags):
        arguments = ("--model", "deepseek-v3", "--mesh", "ep=32", "--device", "h200", "--json")
        parts = json.loads(command(capsys, *arguments, *flags)[1])["steps"]["decode"]["parts"]
        return next(part["bytes"] for part in parts if part["name"] == "experts")

    assert experts("--expert-weights", "int8") == pytest.approx(experts() / 2, rel=0.01)
    flags = ("--expert-weights", "int8", "--speculate", "mtp", "--rebalance", "--redundant-experts", "32")
    _, out, _ = command(capsys, "--model", "deepseek-v3", "--mesh", "ep=32", "--device", "h200", *flags)
    assert max(map(len, out.splitlines())) <= 100
    for told in (
        "9 of 288 expert slots a device, in int8, for 256 experts",
        "room to move",
        "at the start",
        "if every draft is right",
        "\n  mtp  ",
    ):
        assert told in out


def test_what_would_serve_but_cannot_be_loaded_does_not_fit(capsys):
    arguments = ("--model", "deepseek-v3", "--mesh", "ep=8", "--device", "h200", "--expert-weights", "int8")
    code, out, _ = command(capsys, *arguments, "--batch", "1", "--context", "1024")
    assert code == 1
    assert "DOES NOT FIT: serves in 114.7 GiB on each device, but starts with 213.5 GiB; 129.2 GiB can be used." in out


def test_a_long_prefill_is_bound_by_compute_and_a_decode_across_nodes_by_the_network():
    one = deploy("mixtral-8x7b", "dp=1,ep=1", max_batch=1, max_prefill_tokens=4096)
    assert step_time(one, one.prefill, H200).bound == "compute"
    far = deploy("deepseek-v3", "ep=128", max_batch=256)
    assert step_time(far, far.decode, H100).bound == "network"


COSTS = {
    # One all-gather of 7 MB that each of 8 receives over NVLink.
    ("h100", "all-gather", "ep=8", ("ep",)): 15e-6 + 7e6 / 450e9,
    # Of 16 in two nodes, 8 of 15 parts come over the other network.
    ("h100", "all-to-all", "ep=16", ("ep",)): 30e-6 + 7e6 * 8 / 15 / 50e9,
    # A gather takes what comes from 7 other nodes once, an eighth by each of the node; which outlasts NVLink's part.
    ("a100", "all-gather", "ep=64", ("ep",)): 30e-6 + 7e6 * 56 / 63 / 8 / 25e9,
    ("h100", "all-reduce", "ep=16,tp=2", ("tp",)): 15e-6 + 7e6 / 450e9,
    # The two nodes of dp have every pair of devices apart.
    ("h100", "all-reduce", "dp=2,ep=8", ("dp",)): 30e-6 + 7e6 / 50e9,
    # 4 chips of a torus: a ring, both ways.
    ("v5p", "all-gather", "ep=4", ("ep",)): 5e-6 + 7e6 / 200e9,
    ("v5p", "all-gather", "ep=64", ("ep",)): 5e-6 + 7e6 / 600e9,
    # A row to any of 4096 goes 4 hops along each of 3 dimensions: as long as 8 links in parallel over 16.
    ("v5p", "all-to-all", "ep=4096", ("ep",)): 5e-6 + 7e6 / (8 * 100e9 / 16),
    ("v5p", "all-to-all", "ep=1", ("ep",)): 0.0,
}


@pytest.mark.parametrize("what", COSTS, ids=str)
def test_collectives_cost_what_the_slower_network_takes(what):
    device, kind, mesh, axes = what
    assert DEVICES[device].seconds(kind, 7e6, axes, MeshSpec.parse(mesh)) == pytest.approx(COSTS[what])


def test_other_meshes_serve_the_same_sequences_and_each_layout_is_listed_once():
    load = deploy("deepseek-v3", "dp=8,ep=4", "dp,ep", device=H200)
    found = options(load, H200, 32)
    assert all(each.deployment.sequences >= load.sequences for each in found)
    layouts = [(each.spec.tp, each.spec.expert_devices) for each in found]
    assert len(layouts) == len(set(layouts)) == 21
    assert sum(each.spec == load.spec for each in found) == 1
    fitting = [each.decode.seconds for each in found if each.memory.fits and each.deployment.sequences == 2048]
    assert fitting == sorted(fitting)


def test_memory_of_a_device_is_as_vendors_state_it():
    assert DEVICES["v5p"].memory == 95 * GIB
    # 80 GB on the label, a little less once the driver has its share, a little more in units of 10^9.
    assert 79 * GIB < H100.memory < 86e9
