import json

import jax
import numpy as np
import pytest
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from jaxmoe.checkpoints import native as format_
from jaxmoe.checkpoints.folders import UNFINISHED, write_config
from jaxmoe.checkpoints.loader import read_config
from jaxmoe.checkpoints.native import MANIFEST, PARAMS, StoredReader, load_native, save_native
from jaxmoe.engine.model import Model
from jaxmoe.errors import CheckpointError

SMALL = {
    "mixtral": {"num_hidden_layers": 2},
    "deepseek_v3": {"num_hidden_layers": 2, "num_nextn_predict_layers": 1},
    "llama4": {"num_hidden_layers": 4},
}


def save(model, folder, dtype):
    folder.mkdir()
    write_config(folder, read_config(model.folder), dtype, model.config.mtp_layers)
    slots = np.asarray(model.placement.slot_expert)
    save_native(folder, model.abstract.keys, model.config, model.params, slots, dtype)
    return folder


def bits(params):
    return jax.tree.map(lambda leaf: (leaf.dtype.name, np.asarray(leaf).tobytes()), params)


@pytest.fixture
def native(reference_checkpoint, tmp_path):
    return save(Model(reference_checkpoint().folder, "ep=4"), tmp_path / "native", "float32")


def change_json(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def error_of(folder):
    with pytest.raises(CheckpointError) as error:
        Model(folder)
    return str(error.value)


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_bit_comes_back(reference_checkpoint, tmp_path, family, dtype):
    model = Model(reference_checkpoint(family, **SMALL[family]).folder, dtype=dtype)
    again = Model(save(model, tmp_path / "native", dtype), dtype=dtype)
    assert bits(again.params) == bits(model.params)
    assert again.config.kinds == model.config.kinds
    if family == "deepseek_v3":
        assert again.params["router"].dtype == np.float32


@pytest.mark.parametrize("saved", ["ep=4", "ep=3", "dp=2,tp=2"])
def test_what_one_mesh_saved_every_mesh_loads(reference_checkpoint, tmp_path, saved):
    source = reference_checkpoint().folder
    folder = save(Model(source, saved), tmp_path / "native", "float32")
    for mesh in ("dp=1,ep=1", "ep=8", "dp=2,tp=2", "ep=3", "dp=2,ep=2,tp=2"):
        expected, loaded = Model(source, mesh), Model(folder, mesh)
        assert bits(loaded.params) == bits(expected.params), mesh
        shardings = [jax.tree.map(lambda leaf: leaf.sharding, model.params) for model in (expected, loaded)]
        assert shardings[0] == shardings[1]


def test_experts_are_stored_in_their_order_whatever_slots_they_had(reference_checkpoint, tmp_path):
    model = Model(reference_checkpoint().folder)
    slots = np.array([[3, 1, 0, 2, 1], [1, 1, 2, 0, 3]])
    rows = np.arange(2)[:, None]
    experts = {name: np.asarray(leaf)[rows, slots] for name, leaf in model.params["experts"].items()}
    params = {**model.params, "experts": experts}
    save_native(tmp_path, model.abstract.keys, model.config, params, slots, "float32")
    # Orbax itself reads what was written.
    assert bits(ocp.load(tmp_path / PARAMS, model.params)) == bits(model.params)
    loaded = load_native(tmp_path, model.abstract, model.abstract.keys, model.config, slots[:, :4], model.mesh)
    np.testing.assert_array_equal(loaded["experts"]["down"], experts["down"][:, :4])


@pytest.mark.parametrize("mesh", ["dp=1,ep=1", "ep=4"])
def test_what_is_larger_than_the_buffer_is_saved_too(reference_checkpoint, tmp_path, monkeypatch, mesh):
    monkeypatch.setattr(format_, "BUFFER_BYTES", 100)
    source = reference_checkpoint().folder
    folder = save(Model(source, mesh), tmp_path / "native", "float32")
    assert bits(Model(folder).params) == bits(Model(source).params)


def test_progress_ends_with_all_bytes(reference_checkpoint, tmp_path):
    model, written, read = Model(reference_checkpoint().folder), [], []
    slots = np.asarray(model.placement.slot_expert)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    keys = model.abstract.keys
    save_native(tmp_path, keys, model.config, model.params, slots, "float32", lambda *at: written.append(at))
    place = (keys, model.config, slots, model.mesh)
    load_native(tmp_path, model.abstract, *place, progress=lambda *at: read.append(at))
    for calls in (written, read):
        assert calls[-1] == (total, total)
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_weights_are_cast_to_the_compute_dtype(native):
    expected, loaded = Model(native).params, Model(native, dtype="bfloat16").params
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype("bfloat16"), expected)
    assert bits(loaded) == bits(rounded)


def test_a_shard_reads_its_own_chunks_alone(reference_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(format_, "CHUNK_BYTES", 1 << 14)
    model = Model(reference_checkpoint().folder)
    slots = np.asarray(model.placement.slot_expert)
    save_native(tmp_path, model.abstract.keys, model.config, model.params, slots, "float32")
    store = format_._open(tmp_path, "experts.gate_up", ts.Context({"cache_pool": {"total_bytes_limit": 0}}))
    read, whole = (
        StoredReader(store, model.abstract.keys["experts.gate_up"], slots, np.float32),
        np.asarray(model.params["experts"]["gate_up"]),
    )
    _bytes_read()
    shard = read(((0, 2), (1, 2), (0, 32), (0, 2), (0, 40)))
    np.testing.assert_array_equal(shard, whole[:, 1:2])
    assert shard.nbytes <= _bytes_read() < 1.5 * shard.nbytes < whole.nbytes / 2


def _bytes_read():
    """Since the last call."""
    metric = "/tensorstore/kvstore/file/bytes_read"
    found = ts.experimental_collect_matching_metrics(metric)
    total = sum(value["value"] for entry in found for value in entry["values"])
    last, _bytes_read.last = getattr(_bytes_read, "last", 0), total
    return total - last


def test_further_layers_are_there_if_they_were_saved(reference_checkpoint, tmp_path):
    # transformers saves none of the layers that the config promises.
    reference = reference_checkpoint("deepseek_v3", **SMALL["deepseek_v3"])
    model = Model(reference.folder)
    assert model.config.mtp_layers == 0
    assert Model(save(model, tmp_path / "native", "float32")).config.mtp_layers == 0


def test_a_conversion_that_did_not_finish_is_refused(native):
    told = "its conversion did not finish; delete it and run convert again"
    left = native.rename(native.with_name(f"native{UNFINISHED}"))
    assert told in error_of(left)
    (left / MANIFEST).unlink()
    assert told in error_of(left.rename(native))


def test_a_manifest_of_another_version_is_refused(native):
    change_json(native / MANIFEST, format=1)
    assert "format 1 is not the 2 that this version reads; convert the original" in error_of(native)


@pytest.mark.parametrize("parameters", [None, [], {"norm": 3}, {"norm": {"shape": [32]}}])
def test_a_manifest_without_parameters_is_refused(native, parameters):
    change_json(native / MANIFEST, parameters=parameters)
    assert "does not" in error_of(native)


def test_a_config_that_the_weights_do_not_fit_is_refused_with_all_differences(native):
    change_json(native / "config.json", vocab_size=100, tie_word_embeddings=True)
    error = error_of(native)
    assert "1 parameters not expected: lm_head" in error
    assert "1 parameters of another shape: embed is [128, 32], not [100, 32]" in error


def test_data_that_are_cut_short_are_refused(native):
    data = max((native / PARAMS).rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size // 2)
    assert f"{native / PARAMS} cannot be read, convert again" in error_of(native)
