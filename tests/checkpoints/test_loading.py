import collections
import dataclasses
import json
import re
import shutil
import struct
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmoe.checkpoints import placing
from jaxmoe.checkpoints.loader import read_quantization
from jaxmoe.checkpoints.reading import ParameterReader, dequantise
from jaxmoe.checkpoints.safetensors import DTYPES, SafetensorsCheckpoint, StoredTensor
from jaxmoe.checkpoints.writer import save_hf
from jaxmoe.engine.model import Model
from jaxmoe.errors import CheckpointError, ConfigError
from jaxmoe.models.keys import Key
from jaxmoe.models.mixtral import KEYS
from jaxmoe.models.registry import family_of

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


COVERED = {
    "Mixtral": ("mixtral", {}),
    "Mixtral, tied": ("mixtral", {"tie_word_embeddings": True}),
    "Mixtral, fused": ("mixtral", {"fused": True}),
    "DeepSeek-V3": ("deepseek_v3", {}),
    "DeepSeek-V3, biases, no query rank": ("deepseek_v3", {"attention_bias": True, "q_lora_rank": None}),
    "DeepSeek-V3, all dense": ("deepseek_v3", {"first_k_dense_replace": 3}),
    "DeepSeek-V3, fused": ("deepseek_v3", {"fused": True}),
    "Llama 4": ("llama4", {}),
    "Llama 4, biases, tied": ("llama4", {"attention_bias": True, "tie_word_embeddings": True}),
    "Llama 4, multimodal": ("llama4", {"multimodal": True}),
}


@pytest.mark.parametrize("name", COVERED)
def test_every_tensor_of_a_checkpoint_is_named_by_one_key_exactly_once_or_ignored(reference_checkpoint, name):
    family, options = COVERED[name]
    folder = reference_checkpoint(family, **options).folder
    hf = json.loads((folder / "config.json").read_text())
    module = family_of(hf)
    config = module.read_config(hf)
    config = dataclasses.replace(config, mtp_layers=0)
    stored = {one.removeprefix(module.prefix) for one in load_file(folder / WEIGHTS)}
    stored = {one for one in stored if not re.fullmatch(module.ignored, one)} if module.ignored else stored
    named = collections.Counter()
    for key in module.keys.values():
        found = [one for one in key.alternatives if set(one.tensor_names(config.stacks, config.experts)) & stored]
        assert len(found) <= 1
        for one in found:
            named.update(one.tensor_names(config.stacks, config.experts))
    assert set(named.values()) == {1}
    assert named.keys() == stored


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
    told = error_of(folder)
    assert (
        "1 tensors of a dtype that is not one of F64, F32, F16, BF16, F8_E4M3, F8_E5M2: model.norm.weight of I8" in told
    )


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
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            "quantization_config: quant_method='compressed-tensors' is not supported; only 'fp8'",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: weight_block_size=None is not"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8], "fmt": "e5m2"}},
            "quantization_config: fmt='e5m2' is not supported; only 'e4m3' is",
        ),
        ({"model_type": "deepseek_v32"}, "model_type='deepseek_v32': its sparse attention with an indexer is not"),
        (
            {"model_type": "x", "auto_map": {"AutoModel": "code.X"}},
            "auto_map={'AutoModel': 'code.X'} names code of its own, which is never run",
        ),
        ({"hidden_size": None}, "config.json lacks 'hidden_size', which this model needs"),
        ({"hidden_size": "32"}, "hidden_size='32' must be of type int"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True must be of type int"),
        ({"num_attention_heads": 0}, "heads=0 must be at least 1"),
        ({"num_key_value_heads": 3}, "3 key-value heads do not divide 4 heads"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 must be between 1 and 4 experts"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is not one of silu, gelu"),
        ({"sliding_window": 0}, "attention over a window of 0 must be at least 1, or null"),
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
    save_hf(tmp_path, KEYS, model.config, model.params, np.dtype(np.float32))
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


@pytest.fixture
def in_pieces(monkeypatch):
    """Even tiny parameters come layer by layer and expert by expert, tables by five rows and what is left."""
    monkeypatch.setattr(placing, "SMALL", 0)
    monkeypatch.setattr(placing, "PORTION", 5 * 32 * 4)


@pytest.mark.parametrize("mesh", ["ep=1", "dp=2,ep=2,tp=2", "ep=8"])
@pytest.mark.parametrize(
    ("family", "options", "dtype"),
    [
        ("mixtral", {}, "bfloat16"),
        ("deepseek_v3", {"fp8": (16, 12)}, "float32"),
        ("deepseek_v3", {"fp8": (16, 12)}, "bfloat16"),
        ("llama4", {}, "float32"),
    ],
)
def test_shards_filled_piece_by_piece_are_those_that_come_whole(
    reference_checkpoint, request, family, options, dtype, mesh
):
    folder = reference_checkpoint(family, **options).folder
    whole = jax.tree.map(np.asarray, Model(folder, mesh, dtype).params)
    request.getfixturevalue("in_pieces")
    jax.tree.map(np.testing.assert_array_equal, Model(folder, mesh, dtype).params, whole)


def test_progress_comes_piece_by_piece_and_ends_at_the_bytes_of_all_parameters(reference, in_pieces):
    told = []
    params = Model(reference.folder, progress=lambda stage, done, total: told.append((done, total))).params
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert {of for _, of in told} == {total}
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1][0] == total
    assert len(told) > 2 * 4 * 2  # a layer, an expert and a parameter of the experts at a time


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_cast_to_the_compute_dtype(reference, dtype):
    params = Model(reference.folder, dtype=dtype).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    stored = load_file(reference.folder / WEIGHTS)["model.norm.weight"]
    np.testing.assert_array_equal(params["norm"], stored.astype(dtype))


def test_a_shard_of_experts_opens_the_tensors_of_those_experts_alone(reference, monkeypatch):
    tensors = SafetensorsCheckpoint(reference.folder).tensors
    opened = []
    view = StoredTensor.view
    monkeypatch.setattr(StoredTensor, "view", lambda tensor: opened.append(tensor) or view(tensor))
    slot_expert = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    read = ParameterReader(tensors, KEYS["experts.gate_up"], (2, 4, 32, 2, 40), (0, 1), slot_expert, 4, np.float32)
    shard = read(((0, 2), (2, 3), (0, 32), (0, 2), (0, 20)))
    names = [f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w" for layer, expert in ((0, 2), (1, 1))]
    assert opened == [tensors[f"{name}{part}.weight"] for name in names for part in (1, 3)]
    whole = load_file(reference.folder / WEIGHTS)
    for layer, name in enumerate(names):
        for at, part in enumerate((1, 3)):
            np.testing.assert_array_equal(shard[layer, 0, :, at], whole[f"{name}{part}.weight"].T[:, :20])


def test_a_shard_of_a_tensor_larger_than_memory_is_read_from_its_own_bytes(tmp_path):
    rows, columns = 2**20, 2**18
    file, sparse = tmp_path / "sparse", StoredTensor(tmp_path / "sparse", 8, (rows, columns), "BF16")
    with file.open("wb") as stream:
        stream.seek(8 + 2 * (columns * 1000 + 10))
        stream.write(np.arange(4, dtype=ml_dtypes.bfloat16).tobytes())
        stream.truncate(8 + 2 * rows * columns)
    read = ParameterReader(
        {"w": sparse}, Key("w", "V D -> D V"), (columns, rows), (0,), np.zeros((1, 1), int), 1, np.float32
    )
    shard = read(((10, 14), (999, 1001)))
    np.testing.assert_array_equal(shard, [[0, 0], [0, 1], [0, 2], [0, 3]])


LAYERS, NUM_EXPERTS, SIZES = (1, 3), 3, {"H": 4, "d": 6, "D": 10, "F": 7, "V": 9, "r": 5}
# Keys of every pattern, with the axes in memory after the stacked ones.
PATTERNS = {
    "plain": (Key("w", "V D"), "V D"),
    "stacked": (Key("l{layer}.w", "D"), "D"),
    "merged rows": (Key("l{layer}.w", "(H d) D -> D H d"), "D H d"),
    "merged columns": (Key("l{layer}.w", "D (H d) -> H d D"), "H d D"),
    "merged alone": (Key("l{layer}.w", "(H d) -> H d"), "H d"),
    "two tensors": (Key(("l{layer}.a", "l{layer}.b"), "F D -> D part F"), "D part F"),
    "experts apart": (Key("l{layer}.e{expert}.w", "D F -> F D"), "F D"),
    "experts apart, two tensors": (
        Key(("l{layer}.e{expert}.a", "l{layer}.e{expert}.b"), "F D -> D part F"),
        "D part F",
    ),
    "experts together": (Key("l{layer}.w", "expert F D -> F D"), "F D"),
    "experts together, halves": (Key("l{layer}.w", "expert (part F) D -> D part F"), "D part F"),
    "experts together, halves of columns": (Key("l{layer}.w", "expert D (part F) -> D part F"), "D part F"),
}
SLOTS = np.array([[0, 1, 2, 0], [2, 0, 1, 1]])


def write_pattern(folder, key, axes):
    """Random memory with one slot an expert, stored as the key says; returns the memory with SLOTS."""
    rng = np.random.default_rng(0)
    inner = [{**SIZES, "part": 2}[axis] for axis in axes.split()]
    leading = [len(LAYERS)] * key.per_layer + [NUM_EXPERTS] * key.per_expert
    memory = rng.normal(size=(*leading, *inner)).astype(np.float32)
    tensors = {}
    for row, layer in enumerate(LAYERS if key.per_layer else (0,)):
        of_layer = memory[row] if key.per_layer else memory
        apart = "{expert}" in key.tensors[0]
        for expert in range(NUM_EXPERTS) if apart else (0,):
            one = of_layer[expert] if apart else of_layer
            for part, name in enumerate(key.tensors):
                half = np.take(one, part, axis=key.part_axis) if len(key.tensors) > 1 else one
                tensors[name.format(layer=layer, expert=expert)] = key.to_stored(half)
    save_file(tensors, folder / WEIGHTS)
    return np.stack([memory[row, SLOTS[row]] for row in range(2)]) if key.per_expert else memory


@pytest.mark.parametrize("name", PATTERNS)
def test_any_window_of_any_pattern_is_that_of_the_whole(tmp_path, name):
    key, axes = PATTERNS[name]
    memory = write_pattern(tmp_path, key, axes)
    tensors = SafetensorsCheckpoint(tmp_path).tensors
    read = ParameterReader(tensors, key, memory.shape, LAYERS, SLOTS, NUM_EXPERTS, np.float32)
    np.testing.assert_array_equal(read(tuple((0, size) for size in memory.shape)), memory)
    rng = np.random.default_rng(1)
    for _ in range(20):
        starts = [rng.integers(0, size) for size in memory.shape]
        window = tuple(
            (start, rng.integers(start + 1, size + 1)) for start, size in zip(starts, memory.shape, strict=True)
        )
        np.testing.assert_array_equal(read(window), memory[tuple(slice(*bounds) for bounds in window)])


@pytest.mark.parametrize("name", ["merged rows", "merged columns", "two tensors", "experts apart, two tensors"])
@pytest.mark.parametrize("block", [(4, 4), (16, 3), (128, 128)])
def test_any_window_of_fp8_blocks_is_that_of_the_whole(tmp_path, name, block):
    key, axes = PATTERNS[name]
    write_pattern(tmp_path, key, axes)
    rng = np.random.default_rng(2)
    plain, quantised = {}, {}
    for tensor, values in load_file(tmp_path / WEIGHTS).items():
        scale = rng.uniform(0.5, 2, [-(-size // length) for size, length in zip(values.shape, block, strict=True)])
        scale = scale.astype(np.float32)
        fp8 = values.astype(ml_dtypes.float8_e4m3fn)
        spread = scale.repeat(block[0], 0)[: values.shape[0]].repeat(block[1], 1)[:, : values.shape[1]]
        plain[tensor] = fp8.astype(np.float32) * spread
        quantised |= {tensor: fp8, tensor + "_scale_inv": scale}
    shape = [{**SIZES, "part": 2}[axis] for axis in axes.split()]
    shape = [len(LAYERS)] * key.per_layer + [SLOTS.shape[1]] * key.per_expert + shape
    rows = []
    for tensors in (plain, quantised):
        save_file(tensors, tmp_path / WEIGHTS)
        stored = SafetensorsCheckpoint(tmp_path).tensors
        read = ParameterReader(stored, key, shape, LAYERS, SLOTS, NUM_EXPERTS, np.float32, block)
        windows = [tuple((0, size) for size in shape), tuple((size // 3, size - size // 4) for size in shape)]
        rows.append([read(window) for window in windows])
    for expected, found in zip(*rows, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("form", ["F8_E4M3", "F8_E5M2"])
def test_a_device_dequantises_every_fp8_number_as_the_host_does(form):
    values = np.arange(256, dtype=np.uint8).view(DTYPES[form]).reshape(2, 128)
    values = np.where(np.isfinite(values.astype(np.float32)), values, values[0, 0])
    scale = np.array([[1, 3e-4], [7e2, 0.3]], np.float32)
    columns = np.arange(128, dtype=np.int32) // 64
    expected = values.astype(np.float32) * scale.repeat(64, 1)
    for np_like in (np, jax.numpy):
        found = dequantise(np_like.asarray(values), np_like.asarray(scale), columns, order=(0, 1), np=np_like)
        np.testing.assert_array_equal(found, expected)


def whole_tensors(folder):
    return {name: np.array(tensor.view()) for name, tensor in SafetensorsCheckpoint(folder).tensors.items()}


def in_one_file(folder, tensors):
    (folder / INDEX).unlink(missing_ok=True)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("whole", [True, False])
def test_single_tensors_of_an_fp8_checkpoint_may_be_left_as_they_were(reference_checkpoint, tmp_path, request, whole):
    block = 16
    folder = shutil.copytree(reference_checkpoint("deepseek_v3", fp8=(block, block)).folder, tmp_path / "copy")
    expected = jax.tree.map(np.asarray, Model(folder).params)
    tensors = whole_tensors(folder)
    name = next(name for name in tensors if name.endswith("experts.1.up_proj.weight"))
    spread = tensors.pop(name + "_scale_inv").repeat(block, 0).repeat(block, 1)
    stored = tensors[name].astype(np.float32)
    tensors[name] = stored * spread[: stored.shape[0], : stored.shape[1]]
    in_one_file(folder, tensors)
    if not whole:
        request.getfixturevalue("in_pieces")
    jax.tree.map(np.testing.assert_array_equal, Model(folder, "ep=2").params, expected)


def test_a_scale_of_another_shape_and_one_without_fp8_are_told_in_one_error(reference_checkpoint, tmp_path):
    folder = shutil.copytree(reference_checkpoint("deepseek_v3", fp8=(16, 16)).folder, tmp_path / "copy")
    tensors = whole_tensors(folder)
    first, second, third = sorted(name for name in tensors if name.endswith("_scale_inv"))[:3]
    tensors[first] = np.ones((1, 77), np.float32)
    weight = second.removesuffix("_scale_inv")
    tensors[weight] = tensors[weight].astype(np.float32)
    del tensors[third]
    in_one_file(folder, tensors)
    told = error_of(folder)
    assert f"1 tensors missing: {third}" in told
    assert f"1 tensors not expected: {second}" in told
    assert f"1 tensors of another shape: {first} is [1, 77], not [" in told


@pytest.mark.parametrize("scale_fmt", ["ue8m0", "float", None])
def test_every_way_to_name_float32_scales_is_read(scale_fmt):
    stored = {"quant_method": "fp8", "weight_block_size": [128, 64], "scale_fmt": scale_fmt}
    assert read_quantization({"quantization_config": stored}) == (128, 64)


def test_a_tensor_that_is_there_with_and_without_prefix_is_told(reference_checkpoint, tmp_path):
    folder = shutil.copytree(reference_checkpoint("llama4", multimodal=True).folder, tmp_path / "copy")
    tensors = whole_tensors(folder)
    tensors["model.norm.weight"] = tensors["language_model.model.norm.weight"]
    in_one_file(folder, tensors)
    assert "1 tensors not expected: language_model.model.norm.weight" in error_of(folder)


def test_fp8_without_scales_or_without_a_word_on_them_is_told(reference_checkpoint, tmp_path):
    folder = shutil.copytree(reference_checkpoint("deepseek_v3", fp8=(16, 16)).folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "quantization_config"})
    )
    told = error_of(folder)
    assert "in fp8 without a quantization_config that says how they are scaled: model.layers." in told
    assert "tensors not expected: model.layers.0." in told


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ("pytorch_model.bin", "pickled weights are never read"),
        ("consolidated.00.pth", "the publisher's own layout is not read"),
        ("adapter_model.safetensors", "an adapter is not a whole model"),
        ("model-q4.gguf", "GGUF is not read"),
        ("part-1.safetensors", f"without {INDEX} nothing tells which files belong together"),
    ],
)
def test_what_a_folder_holds_instead_of_weights_is_told(folder, held, told):
    (folder / WEIGHTS).rename(folder / held)
    assert told in error_of(folder)


MEASURE = """
import resource, sys
import jax, numpy as np
from pathlib import Path
jax.numpy.zeros(1).block_until_ready()
from jaxmoe.engine.model import Model
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = Model(Path(sys.argv[1]))
print(peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)))
"""


def test_the_host_holds_little_more_than_the_parameters_while_loading(tmp_path):
    layers, experts, width, inner = 12, 8, 256, 1024
    config = {
        "model_type": "mixtral", "vocab_size": 128, "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": experts,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    family = family_of(config)
    read = family.read_config(config)
    shapes = {"V": 128, "D": width, "F": inner, "E": experts, "H": 4, "d": width // 4}
    tensors = {}
    for path, key in family.keys.items():
        sizes = {**shapes, "H": 2} if path in ("attention.key", "attention.value") else shapes
        for name in key.tensor_names(read.stacks, experts):
            tensors[name] = np.zeros(key.stored_shape(sizes), ml_dtypes.bfloat16)
    save_file(tensors, tmp_path / WEIGHTS)
    ran = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, held = map(int, ran.stdout.split())
    assert held > 300e6
    # The pieces under way, pages of the file while they are mapped, and what compiling a few programs takes.
    assert grown < held + 180e6
