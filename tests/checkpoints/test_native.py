"""The native format, and conversion both ways: bit by bit, on any mesh, whole or not at all."""

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
from safetensors.numpy import load_file

from jaxmoe import convert
from jaxmoe.checkpoints import native
from jaxmoe.engine.model import Model
from jaxmoe.errors import CheckpointError

FAMILIES = ["mixtral", "deepseek_v3", "llama4"]


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


def run(*arguments, code=0):
    assert convert.main([str(argument) for argument in arguments]) == code


def same_bits(left, right):
    def same(one, other):
        assert one.dtype == other.dtype
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))

    jax.tree.map(same, left, right)


@pytest.mark.parametrize("mesh", ["ep=8", "ep=3", "dp=2,tp=2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_four_devices_saved_loads_bit_by_bit_on_any_mesh(reference_checkpoint, converted, family, mesh):
    same_bits(Model(converted(family), mesh).params, Model(reference_checkpoint(family).folder, mesh).params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_bit_by_bit_and_routers_in_full(reference_checkpoint, converted, dtype):
    folder = converted("deepseek_v3", "--dtype", dtype)
    expected = Model(reference_checkpoint("deepseek_v3").folder, dtype=dtype).params
    same_bits(Model(folder, dtype=dtype).params, expected)
    assert expected["router"].dtype == np.float32
    widened = Model(folder).params
    assert {leaf.dtype for leaf in jax.tree.leaves(widened)} == {np.dtype("float32")}
    np.testing.assert_array_equal(widened["norm"], np.asarray(expected["norm"]).astype(np.float32))


def test_experts_that_slots_repeat_are_saved_once(reference_checkpoint, converted, tmp_path):
    run(reference_checkpoint().folder, tmp_path / "of_three", "--mesh", "ep=3")
    same_bits(Model(tmp_path / "of_three").params, Model(converted("mixtral")).params)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_comes_back_as_it_went_in_many_files(reference_checkpoint, converted, tmp_path, family):
    original = reference_checkpoint(family)
    run(converted(family), tmp_path / "back", "--to", "hf", "--max-file-size", "0.00008")
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 1
    stored = {name: array for file in files for name, array in load_file(file).items()}
    expected = load_file(original.folder / "model.safetensors")
    assert stored.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(stored[name], array, name)
    there = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        logits = there(torch.tensor(original.tokens), use_cache=False).logits.numpy()
    np.testing.assert_allclose(logits, original.logits, atol=1e-5)


def test_a_multimodal_checkpoint_is_written_as_its_text_model(reference_checkpoint, tmp_path):
    original = reference_checkpoint("llama4", multimodal=True)
    run(original.folder, tmp_path / "text", "--to", "hf")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == "llama4_text"
    np.testing.assert_allclose(Model(tmp_path / "text").logits(original.tokens), original.logits, atol=5e-4, rtol=0)


def test_fp8_weights_are_written_as_numbers(reference_checkpoint, tmp_path):
    original = reference_checkpoint("deepseek_v3", fp8=(16, 16))
    run(original.folder, tmp_path / "hf", "--to", "hf", "--dtype", "float32")
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    same_bits(Model(tmp_path / "hf").params, Model(original.folder).params)


def test_an_existing_folder_is_replaced_only_when_told(reference_checkpoint, tmp_path, capsys):
    target = tmp_path / "there"
    target.mkdir()
    (target / "precious").touch()
    run(reference_checkpoint().folder, target, code=2)
    assert f"{target} exists" in capsys.readouterr().err
    assert (target / "precious").exists()
    run(reference_checkpoint().folder, target, "--force")
    assert not (target / "precious").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


@pytest.mark.parametrize("stage", ["ocp.save", "_sync"])
def test_a_conversion_that_fails_leaves_nothing(reference_checkpoint, tmp_path, monkeypatch, stage):
    def fail(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(f"jaxmoe.checkpoints.native.{stage}", fail)
    with pytest.raises(OSError, match="no space left"):
        convert.main([str(reference_checkpoint().folder), str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_is_killed_leaves_nothing_that_loads(tmp_path):
    program = (
        "import sys, time, jaxmoe.checkpoints.native as native, jaxmoe.convert as convert\n"
        "native.ocp.save, save = lambda *a: (save(*a), print('saved', flush=True), time.sleep(60)), native.ocp.save\n"
        f"convert.main(['demo:mixtral', {str(tmp_path / 'out')!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "saved\n"
        process.send_signal(signal.SIGKILL)
    left = list(tmp_path.iterdir())
    assert [path.name for path in left] == ["out.unfinished"]
    with pytest.raises(CheckpointError):
        Model(left[0])
    run("demo:mixtral", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    Model(tmp_path / "out")


def test_a_folder_without_its_manifest_is_told(converted, tmp_path):
    folder = shutil.copytree(converted("mixtral"), tmp_path / "copy")
    (folder / native.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="its conversion did not finish; delete it"):
        Model(folder)


def test_a_config_of_another_model_is_told(converted, tmp_path):
    folder = shutil.copytree(converted("mixtral"), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_local_experts": 3}))
    with pytest.raises(CheckpointError, match=r"does not hold what its config.json promises: experts\.down, experts"):
        Model(folder)
