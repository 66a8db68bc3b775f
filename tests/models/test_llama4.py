import json

import numpy as np
import parity
import pytest

import jaxmoe
from jaxmoe.engine.model import Model
from jaxmoe.models.decoder import Execution

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 32}
MIXTURES = {"interleave_moe_layer_step": 1}
# What transformers works out and writes down, and hub configs do not have.
WORKED_OUT = ("layer_types", "moe_layers", "no_rope_layers")
HUB = {
    "remove": (*WORKED_OUT, "rope_parameters", "dtype", "no_rope_layer_interval", "tie_word_embeddings"),
    "edit": {
        "no_rope_layers": [], "rope_theta": 100.0, "torch_dtype": "bfloat16", "for_llm_compressor": False,
        "cache_implementation": "hybrid",
        "rope_scaling": {
            "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 16,
            "rope_type": "llama3",
        },
    },
    # An integer and a private switch, which transformers refuses to read.
    "unread": {"attn_temperature_tuning": 4, "_attn_implementation_autoset": True},
}  # fmt: skip

CONFIGS = {
    "every second layer a mixture, every fourth unrotated": {},
    "every layer a mixture, chunks of four": {**MIXTURES, "attention_chunk_size": 4},
    "every third layer a mixture, chunks of five": {
        "interleave_moe_layer_step": 3, "attention_chunk_size": 5, "num_hidden_layers": 5,
    },
    "a step longer than the model, chunks of one": {"interleave_moe_layer_step": 5, "attention_chunk_size": 1},
    "chunks of sixteen, two experts": {"attention_chunk_size": 16, "num_experts_per_tok": 2},
    "chunks longer than the sequence": {"attention_chunk_size": 1000},
    "no chunks, all experts": {"attention_chunk_size": None, "num_experts_per_tok": 4},
    "chunk size not said": {"attention_chunk_size": 8192, "remove": ("attention_chunk_size", "layer_types")},
    "rotation an empty list, every second": {
        "no_rope_layer_interval": 2, "remove": ("layer_types",), "edit": {"no_rope_layers": []},
    },
    "no layer rotated": {"no_rope_layer_interval": 1, "remove": WORKED_OUT},
    "all layers rotated": {"no_rope_layers": [1, 1, 1, 1]},
    "no layer rotated, by list": {"no_rope_layers": [0, 0, 0, 0], "floor_scale": 3, "attn_scale": 0.9},
    "rotation by a list longer than the model": {
        "no_rope_layers": [0, 1, 1, 0, 1, 0], "layer_types": ["full_attention", *["chunked_attention"] * 3],
    },
    "chunks where nothing is rotated and none where it is": {
        "no_rope_layers": [1, 0, 0, 1], "attention_chunk_size": 5,
        "layer_types": ["full_attention", "chunked_attention", "full_attention", "chunked_attention"],
    },
    "no norms of queries and keys": {"use_qk_norm": False},
    "no temperature": {"attn_temperature_tuning": False, "no_rope_layers": [0, 1, 0, 0]},
    "temperature that rises at every token": {"floor_scale": 1, "attn_scale": 0.7},
    "temperature by an integer": {"unread": {"attn_temperature_tuning": 4}},
    "no temperature by an integer": {"attn_temperature_tuning": False, "unread": {"attn_temperature_tuning": 0}},
    "no mixtures": {"moe_layers": []},
    "mixtures by list": {"moe_layers": [0, 3]},
    "mixtures by a list of one": {"moe_layers": [2], "num_local_experts": 5, "num_experts_per_tok": 3},
    "mixtures and rotation null": {
        **MIXTURES, "remove": ("layer_types",), "edit": {"moe_layers": None, "no_rope_layers": None},
    },
    "a single expert, a single layer": {"num_local_experts": 1, "num_hidden_layers": 1, **MIXTURES},
    "biases, one key-value head": {"attention_bias": True, "num_key_value_heads": 1},
    "wide heads, as many key-value heads as query heads": {"head_dim": 12, "num_key_value_heads": 4},
    "narrow heads": {"head_dim": 2},
    "head_dim and key-value heads null": {
        "num_key_value_heads": 4, "unread": {"head_dim": None, "num_key_value_heads": None},
    },
    "llama3": {"rope_parameters": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}},
    "yarn": {"rope_parameters": YARN, "use_qk_norm": False},
    "tied embeddings, gelu": {"tie_word_embeddings": True, "hidden_act": "gelu"},
    "large epsilon": {"rms_norm_eps": 0.3},
    "published config": {**MIXTURES, **HUB, "multimodal": True},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_for_every_config(reference_checkpoint, name):
    reference = reference_checkpoint("llama4", **CONFIGS[name])
    parity.assert_same_logits(Model(reference.folder).logits(reference.tokens), reference.logits)


def test_text_of_a_multimodal_model_is_that_of_the_text_alone(reference_checkpoint):
    alone, wrapped = (reference_checkpoint("llama4", multimodal=multimodal) for multimodal in (False, True))
    assert json.loads((wrapped.folder / "config.json").read_text())["model_type"] == "llama4"
    np.testing.assert_array_equal(Model(wrapped.folder).logits(alone.tokens), Model(alone.folder).logits(alone.tokens))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_of_a_multimodal_model_are_tied_by_the_top_level_of_its_config(reference_checkpoint, tied):
    reference = reference_checkpoint(
        "llama4", multimodal=True, tie_word_embeddings=tied, unread={"tie_word_embeddings": not tied}
    )
    parity.assert_same_logits(Model(reference.folder).logits(reference.tokens), reference.logits)


@pytest.mark.parametrize("options", [{"shard": "20KB"}, {"dtype": "bfloat16"}], ids=["many files", "bfloat16"])
def test_logits_equal_transformers_from_other_files(reference_checkpoint, options):
    reference = reference_checkpoint("llama4", **options)
    parity.assert_same_logits(Model(reference.folder).logits(reference.tokens), reference.logits)


CACHED = {
    "chunks of five, every fourth unrotated": {"attention_chunk_size": 5},
    "chunks where nothing is rotated, yarn, two experts, biases": {
        **MIXTURES, "no_rope_layers": [1, 0, 0, 1], "attention_chunk_size": 8, "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "chunked_attention", "full_attention", "chunked_attention"],
        "rope_parameters": YARN, "use_qk_norm": False, "attention_bias": True,
    },
    "no chunks, one wide key-value head, tied": {
        "attention_chunk_size": None, "num_key_value_heads": 1, "head_dim": 12, "tie_word_embeddings": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CACHED)
def test_logits_through_the_cache_equal_transformers_without_one(reference_checkpoint, name):
    reference = reference_checkpoint("llama4", **CACHED[name])
    parity.assert_same_logits_decoded(Model(reference.folder), reference, prefill=6)


# Within the first chunk, at its end, in the midst of the second one, and nothing left to decode.
@pytest.mark.parametrize(("prefill", "page_size"), [(1, 16), (5, 1), (7, 4), (24, 5)])
def test_logits_through_the_cache_equal_transformers_after_every_prefill(reference_checkpoint, prefill, page_size):
    reference = reference_checkpoint("llama4", **CACHED["chunks of five, every fourth unrotated"])
    parity.assert_same_logits_decoded(Model(reference.folder), reference, prefill, page_size=page_size)


@pytest.mark.parametrize("name", CACHED)
def test_tokens_served_equal_transformers(reference_checkpoint, name):
    reference = reference_checkpoint("llama4", **CACHED[name])
    parity.assert_same_tokens_served(Model(reference.folder), reference)


def test_greedy_equals_transformers(reference_checkpoint):
    reference = reference_checkpoint("llama4", **CACHED["chunks of five, every fourth unrotated"])
    prompt = reference.tokens[0, :5]
    assert list(jaxmoe.load(reference.folder).greedy(prompt, 12)) == reference.greedy(prompt.tolist(), 12)


@pytest.mark.parametrize("mesh", ["dp=2,ep=4", "ep=8", "ep=2,tp=2"])
def test_logits_equal_transformers_on_every_mesh(reference_checkpoint, mesh):
    # A dense rotated layer and a mixture that is not, of fewer experts than eight devices.
    reference = reference_checkpoint(
        "llama4", num_hidden_layers=2, no_rope_layers=[1, 0], attention_chunk_size=5, attention_bias=True
    )
    model = Model(reference.folder, mesh)
    parity.assert_same_logits(model.logits(reference.tokens), reference.logits)
    parity.assert_same_logits_decoded(model, reference, prefill=6)


def test_every_expert_computed_equals_tokens_exchanged(reference_checkpoint):
    # Scores belong on the experts' inputs.
    reference = reference_checkpoint("llama4", num_experts_per_tok=2)
    for execution in (Execution(strategy="dense"), Execution(strategy="all_to_all")):
        logits = Model(reference.folder, "ep=4", execution=execution).logits(reference.tokens)
        parity.assert_same_logits(logits, reference.logits)


def test_bfloat16_diverges_by_no_more_than_its_noise(reference_checkpoint):
    assert parity.divergence_in_bfloat16(reference_checkpoint("llama4")) < 0.08
