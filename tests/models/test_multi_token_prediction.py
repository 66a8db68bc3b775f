"""DeepSeek-V3's layer that predicts a token more, against transformers' own reading of the same files."""

import numpy as np
import parity
import pytest
import torch
from references import (
    dequantise,
    edit_config,
    quantise,
    quantization_config,
    read_tensors,
    tokens_with_margin,
    write_tensors,
)
from transformers import DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from jaxmoe.engine.model import Model
from jaxmoe.errors import JaxmoeError

CONFIGS = {
    "copies of embedding and head": {"copies": True},
    "no copies, queries without a rank, biases, tied embeddings, large epsilon": {
        "copies": False, "q_lora_rank": None, "attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 0.1,
        "rope_interleave": False,
    },
    "two layers, no dense one": {"copies": False, "num_hidden_layers": 2, "first_k_dense_replace": 0},
}  # fmt: skip


@pytest.fixture
def checkpoint(further_layer):
    """A factory of folders that hold a further layer, with the main model's Reference."""

    def make(**overrides):
        reference = further_layer(**overrides)
        return reference.folder, reference

    return make


def expected_logits(folder, model, tokens):
    """Of token i + 2 at row i, by transformers."""
    model.config.name_or_path = str(folder)
    # Where transformers looks for the layer: the published model has it at 61.
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}.*"]
    further = MtpModel.from_pretrained(model).eval()
    ids = torch.tensor(tokens)[None]
    with torch.no_grad():
        hidden = model.model(ids, use_cache=False).last_hidden_state
        places = torch.arange(1, ids.shape[1])[None]
        cache = MtpCache(config=further.config)
        joined = further.forward_layer(0, hidden[:, :-1], places, cache, input_ids=ids[:, 1:])
        return further._project_to_logits(joined)[0].numpy()


def logits_by_the_paper(folder, model, tokens):
    """The same, written out: only the decoder layer itself is transformers'."""
    layers, eps = model.config.num_hidden_layers, model.config.rms_norm_eps
    own = {
        name.removeprefix(f"model.layers.{layers}."): tensor
        for name, tensor in read_tensors(folder).items()
        if name.startswith(f"model.layers.{layers}.")
    }

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * own[f"{name}.weight"]

    def stacked(name, *parts):
        experts = range(model.config.n_routed_experts)
        return torch.stack([torch.cat([own[f"{name}.{n}.{part}.weight"] for part in parts]) for n in experts])

    layer = type(model.model.layers[0])(model.config, layers).eval()
    weights = {name: own[name] for name in layer.state_dict() if ".experts." not in name}
    weights["mlp.experts.gate_up_proj"] = stacked("mlp.experts", "gate_proj", "up_proj")
    weights["mlp.experts.down_proj"] = stacked("mlp.experts", "down_proj")
    layer.load_state_dict(weights)
    ids = torch.tensor(tokens)[None]
    with torch.no_grad():
        hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
        embedded = model.model.embed_tokens(ids[:, 1:])
        joined = torch.cat([norm(embedded, "enorm"), norm(hidden, "hnorm")], -1) @ own["eh_proj.weight"].T
        count = joined.shape[1]
        mask = torch.full((1, 1, count, count), -torch.inf).triu(1)
        rotation = model.model.rotary_emb(joined, torch.arange(count)[None])
        out = layer(joined, attention_mask=mask, position_embeddings=rotation)
        return model.lm_head(norm(out, "shared_head.norm"))[0].numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_the_token_after_next_equal_transformers(checkpoint, name):
    folder, reference = checkpoint(**CONFIGS[name])
    tokens = reference.tokens[0]
    expected = expected_logits(folder, reference.model, tokens)
    np.testing.assert_allclose(expected, logits_by_the_paper(folder, reference.model, tokens), atol=1e-4, rtol=0)
    model = Model(folder)
    parity.assert_same_logits(model.mtp_logits(tokens), expected)
    parity.assert_same_logits(model.logits(reference.tokens), reference.logits)


def test_the_further_layer_is_a_mixture_where_no_other_is(checkpoint):
    folder, reference = checkpoint(copies=False, first_k_dense_replace=3)
    # transformers learns from the other layers that experts lie in tensors of their own, and here there are none.
    expected = logits_by_the_paper(folder, reference.model, reference.tokens[0])
    parity.assert_same_logits(Model(folder).mtp_logits(reference.tokens[0]), expected)


@pytest.mark.parametrize("mesh", ["dp=2,ep=4", "ep=2,tp=2"])
def test_logits_of_the_token_after_next_are_the_same_on_every_mesh(checkpoint, mesh):
    folder, reference = checkpoint(copies=True)
    tokens = reference.tokens[0]
    expected = expected_logits(folder, reference.model, tokens)
    parity.assert_same_logits(Model(folder, mesh).mtp_logits(tokens), expected)


def test_the_further_layer_is_read_from_files_of_fp8(checkpoint):
    folder, _ = checkpoint(copies=True)
    quantised = quantise(read_tensors(folder), (16, 12))
    write_tensors(folder, dequantise(quantised, (16, 12)))
    model = DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    tokens = tokens_with_margin(model, 128)
    expected = expected_logits(folder, model, tokens[0])
    write_tensors(folder, quantised)
    edit_config(folder, {"quantization_config": quantization_config((16, 12))}, ())
    parity.assert_same_logits(Model(folder).mtp_logits(tokens[0]), expected)


def test_a_layer_that_is_promised_but_absent_is_missed_only_when_asked_for(reference_checkpoint):
    reference = reference_checkpoint("deepseek_v3", num_nextn_predict_layers=1)
    model = Model(reference.folder)
    parity.assert_same_logits(model.logits(reference.tokens), reference.logits)
    with pytest.raises(JaxmoeError, match="multi-token prediction"):
        model.mtp_logits(reference.tokens[0])


def test_a_layer_that_is_there_but_not_promised_is_ignored(checkpoint):
    folder, reference = checkpoint(copies=True)
    edit_config(folder, {"num_nextn_predict_layers": 0}, ())
    parity.assert_same_logits(Model(folder).logits(reference.tokens), reference.logits)


def test_a_layer_that_no_key_speaks_of_is_read(checkpoint):
    # The key's default is one layer.
    folder, reference = checkpoint(copies=True)
    edit_config(folder, {}, ("num_nextn_predict_layers",))
    tokens = reference.tokens[0]
    parity.assert_same_logits(Model(folder).mtp_logits(tokens), logits_by_the_paper(folder, reference.model, tokens))
