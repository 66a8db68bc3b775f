import collections
import json
import shutil
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmoe.checkpoints.loader import _Reader
from jaxmoe.checkpoints.safetensors import SafetensorsCheckpoint, StoredTensor
from jaxmoe.checkpoints.writer import save_hf
from jaxmoe.engine.model import Model
from jaxmoe.errors import CheckpointError, ConfigError
from jaxmoe.models.keys import Key
from jaxmoe.models.mixtral import KEYS

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EXPERTS = "model.layers.0.block_sparse_moe.experts."


@pytest.fixture
def reference(reference_checkpoint):
    return reference_checkpoint()


@pytest.fixture
def folder(reference, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(reference.folder, tmp_path / "checkpoint")


@pytest.fixture
def change_config(folder):
    def change(remove=(), **values):
        config = {**json.loads((folder / "config.json").read_text()), **values}
        config = {name: value for name, value in config.items() if name not in remove}
        (folder / "config.json").write_text(json.dumps(config))

    return change


def error_of(folder):
    with pytest.raises(CheckpointError) as error:
        Model(folder)
    return str(error.value)


@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_of_a_checkpoint_is_named_by_one_key_exactly_once(reference_checkpoint, tied):
    folder = reference_checkpoint(tie_word_embeddings=tied).folder
    names = collections.Counter(
        name.format(layer=layer, expert=expert)
        for key in KEYS.values()
        for name in key.tensors
        for layer in range(2 if key.per_layer else 1)
        for expert in range(4 if key.per_expert else 1)
    )
    assert set(names.values()) == {1}
    assert set(load_file(folder / WEIGHTS)) == set(names) - ({"lm_head.weight"} if tied else set())
    assert ("lm_head" in Model(folder).params) != tied


def test_missing_left_over_and_misshapen_tensors_are_told_in_one_error(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.norm.weight"], tensors[EXPERTS + "3.w2.weight"]
    tensors["model.layers.2.input_layernorm.weight"] = np.zeros(32, np.float32)
    tensors[EXPERTS + "0.w1.weight"] = tensors[EXPERTS + "0.w1.weight"].T.copy()
    save_file(tensors, folder / WEIGHTS)
    told = error_of(folder)
    assert f"2 tensors missing: {EXPERTS}3.w2.weight, model.norm.weight" in told
    assert "1 tensors not expected: model.layers.2.input_layernorm.weight" in told
    assert f"1 tensors of another shape: {EXPERTS}0.w1.weight is [32, 40], not [40, 32]" in told


def test_rotary_buffers_and_a_tied_head_are_ignored_by_name(folder, reference, change_config):
    change_config(tie_word_embeddings=True)
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(tensors, folder / WEIGHTS)
    assert "lm_head" not in Model(folder).params


def test_a_file_cut_short_is_told_with_both_sizes(folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-1])
    assert f"is cut short: {len(whole) - 1} bytes of the {len(whole)}" in error_of(folder)


def header(value):
    encoded = json.dumps(value).encode()
    return struct.pack("<Q", len(encoded)) + encoded


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is cut short or not a safetensors file (0 bytes)"),
        (b"\x10\0\0", "is cut short or not a safetensors file (3 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is cut short or not a safetensors file (43 bytes)"),
        (struct.pack("<Q", 4) + b"PK\3\4", "is not a readable safetensors file"),
        (header([1]), "is not a readable safetensors file"),
        (header({"a": 1}), "is not a readable safetensors file"),
        (header({"a": {"dtype": "F32", "shape": [2]}}), "is not a readable safetensors file"),
        (
            header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + bytes(4),
            "a has 4 bytes, not those of",
        ),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}), "is not a readable safetensors file"),
    ],
)
def test_what_is_not_a_safetensors_file_is_refused(folder, content, told):
    (folder / WEIGHTS).write_bytes(content)
    assert told in error_of(folder)


@pytest.mark.parametrize("layout", [[["model.norm.weight", WEIGHTS]], {"model.norm.weight": 3}])
def test_an_index_that_maps_no_names_to_files_is_refused(folder, layout):
    (folder / INDEX).write_text(json.dumps({"weight_map": layout}))
    assert f"{INDEX} must map names of tensors to names of files" in error_of(folder)


def test_an_index_never_leads_out_of_the_folder(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": f"../{WEIGHTS}"}}))
    assert "points outside the checkpoint folder" in error_of(folder)


def test_a_file_that_the_index_names_and_nobody_has_is_told(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}))
    assert "model-00001-of-00001.safetensors is missing; download the whole checkpoint" in error_of(folder)


def test_a_tensor_that_the_index_names_and_its_file_lacks_is_told(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"no.such.tensor": WEIGHTS}}))
    assert "names tensors that its files do not hold: no.such.tensor" in error_of(folder)


def test_a_folder_without_weights_or_config_or_no_folder_is_told(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    assert f"holds neither {WEIGHTS} nor {INDEX}" in error_of(folder)
    (folder / "config.json").unlink()
    assert "config.json is missing; a checkpoint is a folder with config.json and *.safetensors" in error_of(folder)
    assert f"{tmp_path / 'elsewhere'} is not a folder" in error_of(tmp_path / "elsewhere")


def test_a_tensor_of_a_dtype_that_is_not_read_is_told(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"] = np.zeros(32, np.int8)
    save_file(tensors, folder / WEIGHTS)
    assert "dtype I8 is not one of F64, F32, F16, BF16" in error_of(folder)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "config.json is not readable JSON"),
        ("\xff", "config.json is not readable JSON"),
        ("[]", "config.json must hold a JSON object, not list"),
        ("{}", "model_type=None is not one this version serves (mixtral"),
    ],
)
def test_a_config_that_is_no_json_object_is_told(folder, text, told):
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert told in error_of(folder)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not one this version serves (mixtral"),
        (
            {"router_scaling": 2, "logit_softcap": 1},
            "effect on the model is not known here: logit_softcap, router_scaling",
        ),
        ({"quantization_config": {"bits": 4}}, "effect on the model is not known here: quantization_config"),
        ({"hidden_size": None}, "config.json lacks 'hidden_size', which this model needs"),
        ({"hidden_size": "32"}, "hidden_size='32' must be of type int"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True must be of type int"),
        ({"num_attention_heads": 0}, "heads=0 must be at least 1"),
        ({"num_key_value_heads": 3}, "3 key-value heads do not divide 4 heads"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 must be between 1 and 4 experts"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is not one of silu, gelu"),
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1 or null"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be a token id, a list of them or null"),
        ({"eos_token_id": [1, "</s>"]}, "eos_token_id=[1, '</s>'] must be a token id, a list of them or null"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' is not one of default, linear",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "rope factor=0.5 must be at least 1"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "wobble": 1}}, "not known here: wobble"),
    ],
)
def test_a_config_value_that_cannot_be_served_is_told_by_name(folder, change_config, values, told):
    change_config(**values)
    assert told in error_of(folder)


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size"]
)
def test_a_key_that_every_model_needs_is_told_when_absent(folder, change_config, key):
    change_config(remove=(key,))
    assert f"config.json lacks {key!r}, which this model needs" in error_of(folder)


def test_an_unknown_compute_dtype_is_refused(reference):
    with pytest.raises(ConfigError, match="dtype='int8' is not one of float32, bfloat16, float16"):
        Model(reference.folder, dtype="int8")


def test_what_is_written_is_what_was_read(reference, tmp_path):
    model = Model(reference.folder)
    save_hf(tmp_path, KEYS, model.config, model.params, np.float32)
    stored, written = load_file(reference.folder / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert stored.keys() == written.keys()
    for name in stored:
        np.testing.assert_array_equal(written[name], stored[name], name)
    shutil.copy(reference.folder / "config.json", tmp_path)
    np.testing.assert_array_equal(Model(tmp_path).logits(reference.tokens), model.logits(reference.tokens))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_written_in_half_precision_loads_as_it_was_rounded(reference, tmp_path, dtype):
    model = Model(reference.folder)
    save_hf(tmp_path, KEYS, model.config, model.params, np.dtype(dtype))
    shutil.copy(reference.folder / "config.json", tmp_path)
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype).astype(np.float32), model.params)
    jax.tree.map(np.testing.assert_array_equal, Model(tmp_path).params, rounded)


@pytest.mark.parametrize("mesh", ["ep=4", "tp=2", "dp=2,ep=2,tp=2", "ep=8"])
def test_every_mesh_holds_the_same_weights(reference, mesh):
    expected = jax.tree.map(np.asarray, Model(reference.folder).params)
    model = Model(reference.folder, mesh)
    params = jax.tree.map(np.asarray, model.params)
    # With more devices than experts, slots repeat the experts.
    experts = np.asarray(model.placement.slot_expert[0])
    expected["experts"] = {name: stacked[:, experts] for name, stacked in expected["experts"].items()}
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_cast_to_the_compute_dtype(reference, dtype):
    params = Model(reference.folder, dtype=dtype).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    stored = load_file(reference.folder / WEIGHTS)["model.norm.weight"]
    np.testing.assert_array_equal(params["norm"], stored.astype(dtype))


class Opened(dict):
    """Tensors by name, and the names that were asked for."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.names = set()

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)


def test_a_shard_of_experts_opens_the_tensors_of_those_experts_alone(reference):
    tensors = Opened(SafetensorsCheckpoint(reference.folder).tensors)
    slot_expert = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    read = _Reader(tensors, KEYS["experts.gate_up"], (2, 4, 32, 2, 40), slot_expert, np.dtype(np.float32))
    shard = read((slice(None), slice(2, 3), slice(None), slice(None), slice(0, 20)))
    names = [f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w" for layer, expert in ((0, 2), (1, 1))]
    assert tensors.names == {f"{name}{part}.weight" for name in names for part in (1, 3)}
    whole = load_file(reference.folder / WEIGHTS)
    for layer, name in enumerate(names):
        for at, part in enumerate((1, 3)):
            np.testing.assert_array_equal(shard[layer, 0, :, at], whole[f"{name}{part}.weight"].T[:, :20])


def test_a_shard_that_a_replica_asks_for_again_is_not_read_again(reference):
    tensors = Opened(SafetensorsCheckpoint(reference.folder).tensors)
    read = _Reader(tensors, KEYS["norm"], (32,), np.zeros((2, 4), int), np.dtype(np.float32))
    first = read((slice(0, 32),))
    tensors.clear()
    assert read((slice(None),)) is first


def test_a_shard_of_a_tensor_larger_than_memory_is_read_from_its_own_bytes(tmp_path):
    rows, columns = 2**20, 2**18
    file, sparse = tmp_path / "sparse", StoredTensor(tmp_path / "sparse", 8, (rows, columns), "BF16")
    with file.open("wb") as stream:
        stream.seek(8 + 2 * (columns * 1000 + 10))
        stream.write(np.arange(4, dtype=ml_dtypes.bfloat16).tobytes())
        stream.truncate(8 + 2 * rows * columns)
    read = _Reader({"w": sparse}, Key("w", "V D -> D V"), (columns, rows), np.zeros((1, 1), int), np.dtype(np.float32))
    shard = read((slice(10, 14), slice(999, 1001)))
    np.testing.assert_array_equal(shard, [[0, 0], [0, 1], [0, 2], [0, 3]])
