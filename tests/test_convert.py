"""Conversion both ways: bit by bit, from any mesh, whole or not at all."""

import json
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import transformers
from references import read_tensors, write_tensors

from jaxmoe import convert
from jaxmoe.checkpoints import folders, native
from jaxmoe.checkpoints.folders import REPLACED, UNFINISHED
from jaxmoe.engine.model import Model
from jaxmoe.errors import CheckpointError

FAMILIES = ["mixtral", "deepseek_v3", "llama4"]
MTP = {f"model.layers.3.{name}": shape for name, shape in {
    "enorm.weight": (32,), "hnorm.weight": (32,), "eh_proj.weight": (32, 64), "shared_head.norm.weight": (32,),
}.items()}  # fmt: skip


@pytest.fixture(scope="module")
def converted(reference_checkpoint, tmp_path_factory):
    """`converted(family, *options)`: the folder that convert made of a reference checkpoint, on four devices."""
    made = {}

    def make(family, *options):
        if (family, options) not in made:
            folder = tmp_path_factory.mktemp("converted") / family
            run(reference_checkpoint(family).folder, folder, "--mesh", "ep=4", *options)
            made[family, options] = folder
        return made[family, options]

    return make


@pytest.fixture
def source(reference_checkpoint):
    return reference_checkpoint().folder


def run(*arguments, code=0):
    assert convert.main([str(argument) for argument in arguments]) == code


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_bits(left, right):
    def same(one, other):
        assert one.dtype == other.dtype
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))

    jax.tree.map(same, left, right)


def same_tensors(folder, original):
    stored, expected = read_tensors(folder), read_tensors(original)
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert stored[name].dtype == tensor.dtype, name
        assert torch.equal(stored[name], tensor), name


@pytest.mark.parametrize("mesh", ["ep=8", "ep=3", "dp=2,tp=2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_four_devices_saved_loads_bit_by_bit_on_any_mesh(reference_checkpoint, converted, family, mesh):
    same_bits(Model(converted(family), mesh).params, Model(reference_checkpoint(family).folder, mesh).params)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_comes_back_as_it_went_in_many_files(reference_checkpoint, converted, tmp_path, family):
    original, back = reference_checkpoint(family), tmp_path / "back"
    run(converted(family), back, "--to", "hf", "--max-file-size", "0.00008", "--mesh", "ep=3")
    assert len(list(back.glob("*.safetensors"))) > 1
    same_tensors(back, original.folder)
    there = transformers.AutoModelForCausalLM.from_pretrained(
        back, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        logits = there(torch.tensor(original.tokens), use_cache=False).logits.numpy()
    np.testing.assert_array_equal(logits, original.logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_keep_the_dtype_that_they_have(reference_checkpoint, tmp_path, family, dtype):
    # A config may promise another.
    original = reference_checkpoint(family, dtype=dtype, unread={"dtype": "float32"})
    run(original.folder, tmp_path / "native")
    assert config_of(tmp_path / "native")["dtype"] == dtype
    run(tmp_path / "native", tmp_path / "hf", "--to", "hf")
    same_bits(Model(tmp_path / "hf", dtype=dtype).params, Model(original.folder, dtype=dtype).params)


def test_half_precision_is_kept_in_routers_that_compute_in_full(reference_checkpoint, tmp_path):
    run(reference_checkpoint("deepseek_v3").folder, tmp_path / "native", "--dtype", "bfloat16")
    params = Model(tmp_path / "native").params
    exact = Model(reference_checkpoint("deepseek_v3").folder).params
    np.testing.assert_array_equal(params["router"], exact["router"])
    np.testing.assert_array_equal(params["norm"], np.asarray(exact["norm"]).astype("bfloat16").astype(np.float32))


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_multimodal_checkpoint_is_written_as_its_text_model(reference_checkpoint, tmp_path, to):
    original = reference_checkpoint("llama4", multimodal=True, tie_word_embeddings=True)
    run(original.folder, tmp_path / "text", "--to", to)
    written = config_of(tmp_path / "text")
    assert (written["model_type"], written["architectures"]) == ("llama4_text", ["Llama4ForCausalLM"])
    same_bits(Model(tmp_path / "text").params, Model(original.folder).params)
    if to == "hf":
        loaded, told = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "text", attn_implementation="eager", experts_implementation="eager", output_loading_info=True
        )
        assert not any(told.values())
        with torch.no_grad():
            logits = loaded(torch.tensor(original.tokens), use_cache=False).logits.numpy()
        np.testing.assert_allclose(logits, original.logits, atol=1e-5)


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_fp8_weights_are_written_as_numbers(reference_checkpoint, tmp_path, to):
    original = reference_checkpoint("deepseek_v3", fp8=(16, 16))
    run(original.folder, tmp_path / "out", "--to", to)
    assert "quantization_config" not in config_of(tmp_path / "out")
    same_bits(Model(tmp_path / "out").params, Model(original.folder).params)


def test_a_layer_that_predicts_further_goes_along(reference_checkpoint, tmp_path):
    # transformers neither writes nor reads the layer: it gets the tensors of the one before it.
    reference = reference_checkpoint("deepseek_v3", unread={"num_nextn_predict_layers": 1}, add=MTP)
    folder = shutil.copytree(reference.folder, tmp_path / "further")
    tensors = read_tensors(folder)
    tensors |= {
        name.replace("layers.2.", "layers.3."): tensor + 1 for name, tensor in tensors.items() if ".layers.2." in name
    }
    write_tensors(folder, tensors)
    run(folder, tmp_path / "native")
    run(tmp_path / "native", tmp_path / "hf", "--to", "hf", "--mesh", "ep=3")
    for written in ("native", "hf"):
        model = Model(tmp_path / written)
        assert model.config.mtp_layers == 1
        same_bits(model.params, Model(folder).params)
    same_tensors(tmp_path / "hf", folder)


def test_files_of_the_tokenizer_go_along(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "source")
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tiktoken.model", "LICENSE.txt"]
    for name in names:
        (folder / name).write_text(name)
    (folder / "modeling_mixtral.py").touch()
    for to in ("orbax", "hf"):
        run(folder, tmp_path / to, "--to", to)
        assert all((tmp_path / to / name).read_text() == name for name in names)
        assert not (tmp_path / to / "modeling_mixtral.py").exists()


def test_what_was_written_is_told_with_the_way_to_serve_it(source, tmp_path, capsys):
    run(source, tmp_path / "native", "--dtype", "bfloat16")
    told = capsys.readouterr().err
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(Model(source, dtype="bfloat16").params))
    assert f"{total / 1e6:,.1f} MB of bfloat16 weights in " in told
    assert f"python -m jaxmoe.serve --model {tmp_path / 'native'} --dtype bfloat16" in told


def test_an_existing_checkpoint_is_replaced_only_when_told(source, converted, tmp_path, capsys):
    target = shutil.copytree(converted("mixtral"), tmp_path / "there")
    before = contents(target)
    run(source, target, "--to", "hf", code=2)
    assert f"{target} exists; choose another name, or replace it with --force" in capsys.readouterr().err
    assert contents(target) == before
    run(source, target, "--to", "hf", "--force")
    same_tensors(target, source)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_what_is_no_checkpoint_is_never_replaced(source, tmp_path, force):
    target = tmp_path / "precious"
    target.mkdir()
    run(source, target, *force, code=2)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("target", [".", ".."])
def test_a_checkpoint_is_not_written_over_itself(source, target, capsys):
    before = contents(source)
    run(source, source / target, "--force", code=2)
    assert "is or holds" in capsys.readouterr().err
    assert contents(source) == before


def test_a_disk_without_room_is_told_before_anything_is_written(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    run(source, tmp_path / "out", code=2)
    assert "GB free, of 0.0 that are needed; choose a DST on another disk" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


STAGES = {
    "before the weights": (folders, "copy_companions"),
    "in the weights": (native.ocp, "save_async"),
    "before the manifest": (native.json, "dumps"),
    "before the last rename": (folders, "_sync_one"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_conversion_that_fails_leaves_all_as_it_was(source, converted, tmp_path, monkeypatch, capsys, stage):
    target = shutil.copytree(converted("mixtral"), tmp_path / "there")
    before, there = contents(source), contents(target)

    def fail(*args, **options):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage], fail)
        run(source, target, "--force", code=2)
    assert "no space left" in capsys.readouterr().err
    assert (contents(source), contents(target)) == (before, there)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


KILLED = """
import os, signal, sys
import jaxmoe.checkpoints.folders as folders, jaxmoe.checkpoints.native as native, jaxmoe.convert as convert
def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)
{patch}
convert.main(sys.argv[1:])
"""
MOMENTS = {
    "while weights are written": (
        "save = native.ocp.save_async\nnative.ocp.save_async = lambda *args: (save(*args), die())",
        UNFINISHED,
    ),
    "before the last rename": ("folders._sync_one = die", UNFINISHED),
    "between the renames of a replacement": (
        "rename = folders.Path.rename\n"
        "folders.Path.rename = lambda self, to: (rename(self, to), die() if to.name.endswith('replaced') else None)",
        REPLACED,
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_conversion_that_is_killed_leaves_nothing_half_done_that_loads(converted, tmp_path, moment):
    patch, suffix = MOMENTS[moment]
    target = tmp_path / "out"
    if suffix == REPLACED:
        shutil.copytree(converted("mixtral"), target)
    command = [sys.executable, "-c", KILLED.format(patch=patch), "demo:mixtral", str(target), "--force"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    left = {path.name: path for path in tmp_path.iterdir()}
    assert left.keys() == {f"out{UNFINISHED}", f"out{suffix}"}
    with pytest.raises(CheckpointError, match="its conversion did not finish; delete it and run convert again"):
        Model(left[f"out{UNFINISHED}"])
    if suffix == REPLACED:
        # The older checkpoint is back under its name before anything else happens.
        run("demo:mixtral", target, code=2)
        assert contents(target) == contents(converted("mixtral"))
    run("demo:mixtral", target, "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    same_bits(Model(target).params, Model(convert.find_model("demo:mixtral")).params)


def test_two_conversions_do_not_write_the_same_folder(source, tmp_path, capsys):
    with folders.new_folder(tmp_path / "out") as first:
        (first / "config.json").touch()
        run(source, tmp_path / "out", code=2)
        assert "is being written by another process" in capsys.readouterr().err
        assert (first / "config.json").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


@pytest.mark.parametrize("options", [["--max-file-size", "0"], ["--mesh", "ep=0"]])
def test_options_that_cannot_be_are_told(source, tmp_path, options, capsys):
    run(source, tmp_path / "out", *options, code=2)
    assert "error: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
