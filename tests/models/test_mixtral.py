import json

import numpy as np
import parity
import pytest

import jaxmoe
from jaxmoe.engine.model import Model
from jaxmoe.models.decoder import Execution
from jaxmoe.models.mixtral import Mixtral

HUB = {"remove": ("rope_parameters", "dtype")}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 32}

CONFIGS = {
    "grouped queries": {},
    "one key-value head, a window of one": {"num_key_value_heads": 1, "sliding_window": 1},
    "as many key-value heads as query heads, relu": {"num_key_value_heads": 4, "hidden_act": "relu"},
    "num_key_value_heads absent": {
        "num_attention_heads": 16, "num_key_value_heads": 8, "remove": ("num_key_value_heads",),
    },
    "head_dim wider than width / heads": {"head_dim": 20},
    "head_dim narrower than width / heads": {"head_dim": 2},
    "head_dim null, all experts": {"edit": {"head_dim": None}, "num_experts_per_tok": 4},
    "head_dim absent, a single expert": {"remove": ("head_dim",), "num_local_experts": 1, "num_experts_per_tok": 1},
    "sliding window": {"sliding_window": 5},
    "tied embeddings, one layer, a window longer than the sequence": {
        "tie_word_embeddings": True, "num_hidden_layers": 1, "sliding_window": 1000,
    },
    "one expert of many, large norm epsilon": {"num_experts_per_tok": 1, "rms_norm_eps": 0.3},
    "three of five experts, gelu": {"num_local_experts": 5, "num_experts_per_tok": 3, "hidden_act": "gelu"},
    "three layers, gelu_pytorch_tanh": {"num_hidden_layers": 3, "hidden_act": "gelu_pytorch_tanh"},
    "rope_parameters with a theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}},
    "yarn": {"head_dim": 8, "rope_parameters": YARN},
    "yarn, not truncated, of other betas": {
        "head_dim": 12, "rope_parameters": {**YARN, "truncate": False, "beta_fast": 4.0, "beta_slow": 0.5},
    },
    "yarn of equal betas, with two mscales": {
        "head_dim": 8,
        "rope_parameters": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    },
    "yarn from max_position_embeddings, with an attention factor": {
        "head_dim": 8,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "attention_factor": 0.7},
    },
    "llama3": {"rope_parameters": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    "llama3 without a middle band": {"rope_parameters": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 1.0}},
    "hub dialect": {
        **HUB,
        "edit": {"rope_theta": 50.0, "rope_scaling": None, "torch_dtype": "float32", "eos_token_id": [1, 2]},
    },
    "hub dialect without a theta": {**HUB, "edit": {"rope_scaling": None}},
    "hub dialect, linear by the name of type": {
        **HUB, "edit": {"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    },
    "hub dialect, yarn": {
        **HUB, "head_dim": 8,
        "edit": {"rope_theta": 100.0, "rope_scaling": {key: YARN[key] for key in YARN if key != "rope_theta"}},
    },
    "fused experts": {"fused": True},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_for_every_config(reference_checkpoint, name):
    reference = reference_checkpoint(**CONFIGS[name])
    parity.assert_same_logits(Model(reference.folder).logits(reference.tokens), reference.logits)


def test_null_key_value_heads_are_as_many_as_query_heads(reference_checkpoint):
    # As in transformers 4; transformers 5 refuses the null.
    stored = json.loads((reference_checkpoint().folder / "config.json").read_text())
    assert Mixtral.read_config({**stored, "num_key_value_heads": None}).kv_heads == stored["num_attention_heads"]


def test_logits_equal_transformers_from_many_files(reference_checkpoint):
    reference = reference_checkpoint(shard="20KB")
    assert (
        len(set(json.loads((reference.folder / "model.safetensors.index.json").read_text())["weight_map"].values())) > 2
    )
    parity.assert_same_logits(Model(reference.folder).logits(reference.tokens), reference.logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_equal_transformers_from_files_of_half_precision(reference_checkpoint, dtype):
    reference = reference_checkpoint(dtype=dtype)
    parity.assert_same_logits(Model(reference.folder).logits(reference.tokens), reference.logits)


@pytest.mark.parametrize("mesh", ["dp=2,ep=4", "ep=8", "ep=2,tp=2"])
def test_logits_equal_transformers_on_every_mesh(reference_checkpoint, mesh):
    reference = reference_checkpoint(sliding_window=5)
    model = Model(reference.folder, mesh)
    parity.assert_same_logits(model.logits(reference.tokens), reference.logits)
    parity.assert_same_logits_decoded(model, reference, prefill=6)


def test_layers_written_out_equal_layers_scanned(reference_checkpoint):
    reference = reference_checkpoint()
    scanned, unrolled = (
        Model(reference.folder, "dp=2,ep=4", execution=Execution(unroll=unroll)) for unroll in (False, True)
    )
    np.testing.assert_allclose(scanned.logits(reference.tokens), unrolled.logits(reference.tokens), atol=1e-5, rtol=0)


CACHED = {
    "grouped queries": {},
    "one wide key-value head, sliding window, yarn, tied": {
        "num_key_value_heads": 1, "head_dim": 12, "sliding_window": 5,
        "rope_parameters": YARN, "tie_word_embeddings": True,
    },
    "as many key-value heads, llama3, one expert": {
        "num_key_value_heads": 4, "num_experts_per_tok": 1,
        "rope_parameters": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CACHED)
def test_logits_through_the_cache_equal_transformers_without_one(reference_checkpoint, name):
    reference = reference_checkpoint(**CACHED[name])
    parity.assert_same_logits_decoded(Model(reference.folder), reference, prefill=3)


# A window of five: within it, just full, sliding, and nothing left to decode.
@pytest.mark.parametrize("prefill", [1, 5, 7, 24])
def test_logits_through_the_cache_equal_transformers_after_every_prefill(reference_checkpoint, prefill):
    reference = reference_checkpoint(**CACHED["one wide key-value head, sliding window, yarn, tied"])
    parity.assert_same_logits_decoded(Model(reference.folder), reference, prefill, page_size=4)


@pytest.mark.parametrize("name", CACHED)
def test_chunked_prefill_and_decode_equal_transformers_without_a_cache(reference_checkpoint, name):
    reference = reference_checkpoint(**CACHED[name])
    parity.assert_same_tokens_served(Model(reference.folder), reference)


def test_greedy_equals_transformers(reference_checkpoint):
    reference = reference_checkpoint(**CACHED["one wide key-value head, sliding window, yarn, tied"])
    prompt = reference.tokens[0, :5]
    assert list(jaxmoe.load(reference.folder).greedy(prompt, 12)) == reference.greedy(prompt.tolist(), 12)


def test_bfloat16_diverges_by_no_more_than_its_noise(reference_checkpoint):
    assert parity.divergence_in_bfloat16(reference_checkpoint()) < 0.08
