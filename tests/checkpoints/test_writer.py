import itertools
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from references import CLASSES

from jaxmoe.checkpoints.folders import write_config
from jaxmoe.checkpoints.loader import read_config
from jaxmoe.checkpoints.safetensors import INDEX, SafetensorsCheckpoint, read_header
from jaxmoe.checkpoints.writer import read_slice, save_hf
from jaxmoe.engine.model import Model

VARIANTS = {
    "mixtral": ("mixtral", {}),
    "mixtral, tied": ("mixtral", {"tie_word_embeddings": True}),
    "mixtral in bfloat16, fused": ("mixtral", {"dtype": "bfloat16", "fused": True}),
    "deepseek": ("deepseek_v3", {}),
    "deepseek without query rank, with biases": ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True}),
    "llama 4": ("llama4", {}),
    "llama 4 in float16, all mixtures, biases": (
        "llama4", {"dtype": "float16", "interleave_moe_layer_step": 1, "attention_bias": True},
    ),
}  # fmt: skip


def save(model, folder, **options):
    slots, family = np.asarray(model.placement.slot_expert), type(model.abstract)
    return save_hf(
        folder, family.keys, model.config, model.params, model.dtype, wide=family.wide(), slot_expert=slots, **options
    )


def tensors_of(folder):
    stored = SafetensorsCheckpoint(folder).tensors
    return {name: (tensor.dtype, tensor.shape, tensor.view().tobytes()) for name, tensor in stored.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_written_is_what_was_read_bit_by_bit(reference_checkpoint, tmp_path, name):
    family, options = VARIANTS[name]
    model = Model(reference_checkpoint(family, **options).folder, dtype=options.get("dtype", "float32"))
    written = save(model, tmp_path)
    # Experts that were read from one tensor are written under the hub's names.
    original = reference_checkpoint(family, **{**options, "fused": False})
    assert tensors_of(tmp_path) == tensors_of(original.folder)
    assert written == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))


@pytest.mark.parametrize("mesh", ["ep=4", "ep=3", "dp=2,ep=2,tp=2"])
@pytest.mark.parametrize("family", CLASSES)
def test_every_mesh_writes_the_same(reference_checkpoint, tmp_path, family, mesh):
    source = reference_checkpoint(family).folder
    save(Model(source, mesh), tmp_path)
    assert tensors_of(tmp_path) == tensors_of(source)


def test_routers_that_compute_in_float32_are_written_in_it(reference_checkpoint, tmp_path):
    save(Model(reference_checkpoint("deepseek_v3").folder, dtype="bfloat16"), tmp_path)
    wide = {name for name, (dtype, *_) in tensors_of(tmp_path).items() if dtype == "F32"}
    kinds = ("weight", "e_score_correction_bias")
    assert wide == {f"model.layers.{layer}.mlp.gate.{kind}" for layer in (1, 2) for kind in kinds}


def test_files_are_as_full_as_allowed_and_an_index_names_them(reference_checkpoint, tmp_path):
    reference = reference_checkpoint()
    total = save(Model(reference.folder), tmp_path, max_file_bytes=30_000)
    index = json.loads((tmp_path / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-{number:05}-of-{len(names):05}.safetensors" for number in range(1, len(names) + 1)]
    assert {file.name for file in tmp_path.iterdir()} == {INDEX, *names}
    assert index["metadata"]["total_size"] == total
    # No two neighbours would have fitted into one file.
    sizes = [sum(np.prod(t.shape) * 4 for t in read_header(tmp_path / name).values()) for name in names]
    assert max(sizes) <= 30_000 < min(a + b for a, b in itertools.pairwise(sizes))
    assert tensors_of(tmp_path) == tensors_of(reference.folder)


@pytest.mark.parametrize("family", CLASSES)
def test_transformers_computes_the_same_from_what_is_written(reference_checkpoint, tmp_path, family):
    reference = reference_checkpoint(family)
    save(Model(reference.folder, "ep=2"), tmp_path, max_file_bytes=30_000)
    write_config(tmp_path, read_config(reference.folder), "float32", 0)
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(told.values())
    with torch.no_grad():
        logits = loaded.eval()(torch.tensor(reference.tokens), use_cache=False).logits.numpy()
    np.testing.assert_array_equal(logits, reference.logits)


@pytest.mark.parametrize("spec", [P(), P("x"), P(None, "x"), P(None, None, "x"), P(None, "x", "y")])
def test_a_slice_is_put_together_from_the_shards_that_it_touches(spec):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    whole = np.arange(2 * 4 * 6 * 2, dtype=np.float32).reshape(2, 4, 6, 2)
    leaf = jax.device_put(whole, NamedSharding(mesh, spec))
    for place in ((), (1,), (1, 2)):
        np.testing.assert_array_equal(read_slice(leaf, place), whole[place])
