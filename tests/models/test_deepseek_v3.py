import json

import numpy as np
import parity
import pytest
import torch
from references import edit_config, read_tensors, write_tensors

import jaxmoe
from jaxmoe.engine.model import Model
from jaxmoe.models.decoder import Execution

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
WIDE_ROPE = {"qk_rope_head_dim": 8}
# The keys of the published config.json, those that say nothing included.
HUB = {
    "remove": (
        "rope_parameters", "dtype", "head_dim", "qk_head_dim", "rope_interleave", "output_router_logits",
        "pad_token_id",
    ),
    "edit": {
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModel": "modeling_deepseek.DeepseekV3Model",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
        "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "moe_layer_freq": 1,
        "num_nextn_predict_layers": 1, "pretraining_tp": 1, "rope_theta": 100, "scoring_func": "sigmoid",
        "seq_aux": True, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16, "type": "yarn",
        },
    },
}  # fmt: skip
KIMI = {
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "num_experts_per_tok": 4,
    "remove": HUB["remove"],
    "edit": {
        **HUB["edit"], "num_nextn_predict_layers": 0, "rope_theta": 50.0,
        "rope_scaling": {**HUB["edit"]["rope_scaling"], "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    },
    "unread": {"model_type": "kimi_k2"},
}  # fmt: skip

CONFIGS = {
    "groups of two experts, one dense layer": {},
    "queries without a rank, biases": {"q_lora_rank": None, "attention_bias": True},
    "biases, tied embeddings": {"attention_bias": True, "tie_word_embeddings": True},
    "odd ranks, values wider than keys": {
        "q_lora_rank": 7, "kv_lora_rank": 13, "qk_nope_head_dim": 5, "qk_rope_head_dim": 2, "v_head_dim": 20,
    },
    "values narrower than keys, one head": {
        "qk_nope_head_dim": 16, "v_head_dim": 3, "num_attention_heads": 1, "num_key_value_heads": 1,
    },
    "half-split rotation": {**WIDE_ROPE, "rope_interleave": False},
    "rotation not said, eight of eight groups": {
        **WIDE_ROPE, "remove": ("rope_interleave",), "n_routed_experts": 16, "n_group": 8, "topk_group": 8,
    },
    "rotation, normalisation, key-value heads null": {
        **WIDE_ROPE, "edit": {"rope_interleave": None, "norm_topk_prob": None, "num_key_value_heads": None},
    },
    "queries without a rank, linear": {
        **WIDE_ROPE, "q_lora_rank": None,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5},
    },
    "linear, sharpened": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5, "mscale_all_dim": 0.8},
    },
    "yarn, half-split": {**WIDE_ROPE, "rope_parameters": YARN, "rope_interleave": False},
    "yarn of equal mscales, no dense layer": {
        **WIDE_ROPE, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "first_k_dense_replace": 0,
    },
    "yarn of two mscales, not truncated": {
        "qk_rope_head_dim": 12,
        "rope_parameters": {
            **YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False, "beta_fast": 4.0, "beta_slow": 0.5,
        },
    },
    "yarn of one mscale": {**WIDE_ROPE, "rope_parameters": {**YARN, "mscale": 0.7}},
    "yarn of the other mscale": {**WIDE_ROPE, "rope_parameters": {**YARN, "mscale_all_dim": 0.7}},
    "yarn with an attention factor": {
        **WIDE_ROPE, "rope_parameters": {**YARN, "attention_factor": 0.7, "mscale": 1.0, "mscale_all_dim": 0.5},
    },
    "all layers but one dense, three shared experts": {"first_k_dense_replace": 2, "n_shared_experts": 3},
    "five layers, two of them dense, two shared experts": {
        "num_hidden_layers": 5, "first_k_dense_replace": 2, "n_shared_experts": 2,
    },
    "all layers dense": {"first_k_dense_replace": 3},
    "more dense layers than layers": {"first_k_dense_replace": 9, "num_hidden_layers": 2},
    "a single layer": {"num_hidden_layers": 1, "first_k_dense_replace": 0},
    "one of two groups, not normalised": {
        "n_group": 2, "topk_group": 1, "norm_topk_prob": False, "num_experts_per_tok": 4, "hidden_act": "gelu",
    },
    "no groups, one expert": {
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "routed_scaling_factor": 1.0, "n_routed_experts": 5,
    },
    "three of four groups of four experts, all that they hold": {
        "n_routed_experts": 16, "topk_group": 3, "num_experts_per_tok": 12, "norm_topk_prob": False,
    },
    "all experts negative after correction": {"correction": -2.0},
    "epsilons that differ": {"rms_norm_eps": 0.3},
    "published config": HUB,
    "Kimi-K2": KIMI,
    "fused experts": {"fused": True},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_for_every_config(reference_checkpoint, name):
    reference = reference_checkpoint("deepseek_v3", **CONFIGS[name])
    parity.assert_same_logits(Model(reference.folder).logits(reference.tokens), reference.logits)


def test_a_zero_in_place_of_masked_experts_would_be_noticed(reference_checkpoint):
    reference = reference_checkpoint("deepseek_v3", **CONFIGS["all experts negative after correction"])

    def masked_with_zero(router, args, output):
        logits, _, _ = output
        scores = logits.sigmoid()
        biased = scores + router.e_score_correction_bias
        grouped = biased.view(len(biased), router.num_group, -1)
        kept = grouped.topk(2)[0].sum(-1).topk(router.topk_group)[1]
        mask = torch.zeros(grouped.shape[:2]).scatter_(1, kept, 1).bool()
        chosen = grouped.masked_fill(~mask[..., None], 0.0).flatten(1).topk(router.top_k)[1]
        weights = scores.gather(1, chosen)
        return logits, router.routed_scaling_factor * weights / weights.sum(-1, keepdim=True), chosen

    hooks = [
        module.register_forward_hook(masked_with_zero)
        for name, module in reference.model.named_modules()
        if name.endswith("mlp.gate")
    ]
    other = reference.logits_of(reference.tokens)
    for hook in hooks:
        hook.remove()
    assert np.abs(other - reference.logits).max() > 1


def test_norms_of_latents_have_an_epsilon_of_their_own(reference_checkpoint):
    reference = reference_checkpoint("deepseek_v3", **CONFIGS["epsilons that differ"])
    attention = [layer.self_attn for layer in reference.model.model.layers]
    for norm in [norm for one in attention for norm in (one.q_a_layernorm, one.kv_a_layernorm)]:
        norm.variance_epsilon = 0.3
    other = reference.logits_of(reference.tokens)
    for norm in [norm for one in attention for norm in (one.q_a_layernorm, one.kv_a_layernorm)]:
        norm.variance_epsilon = 1e-6
    assert np.abs(other - reference.logits).max() > 0.1


@pytest.mark.parametrize("options", [{"shard": "20KB"}, {"dtype": "bfloat16"}], ids=["many files", "bfloat16"])
def test_logits_equal_transformers_from_other_files(reference_checkpoint, options):
    reference = reference_checkpoint("deepseek_v3", **options)
    parity.assert_same_logits(Model(reference.folder).logits(reference.tokens), reference.logits)


# Whole blocks, partial ones at the edges, one block larger than any weight.
@pytest.mark.parametrize("block", [(8, 8), (16, 12), (128, 128)], ids=str)
def test_logits_equal_transformers_from_files_of_fp8(reference_checkpoint, block):
    reference = reference_checkpoint("deepseek_v3", fp8=block, **HUB)
    places = json.loads((reference.folder / "model.safetensors.index.json").read_text())["weight_map"]
    scaled = "model.layers.0.self_attn.q_a_proj.weight"
    assert places[scaled] != places[f"{scaled}_scale_inv"]
    parity.assert_same_logits(Model(reference.folder).logits(reference.tokens), reference.logits)


@pytest.mark.parametrize("mesh", ["ep=4", "ep=2,tp=2"])
def test_logits_equal_transformers_from_files_of_fp8_on_every_mesh(reference_checkpoint, mesh):
    reference = reference_checkpoint("deepseek_v3", fp8=(16, 12), **HUB)
    parity.assert_same_logits(Model(reference.folder, mesh).logits(reference.tokens), reference.logits)


CACHED = {
    "groups, yarn that sharpens": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}, **WIDE_ROPE},
    "queries without a rank, half-split, biases, no dense layer": {
        "q_lora_rank": None, "rope_interleave": False, "attention_bias": True, "first_k_dense_replace": 0,
        "n_group": 1, "topk_group": 1, "v_head_dim": 12, "rope_parameters": YARN,
    },
    "all layers dense, tied": {"first_k_dense_replace": 3, "tie_word_embeddings": True},
}  # fmt: skip


@pytest.mark.parametrize("name", CACHED)
def test_logits_through_the_cache_equal_transformers_without_one(reference_checkpoint, name):
    reference = reference_checkpoint("deepseek_v3", **CACHED[name])
    parity.assert_same_logits_decoded(Model(reference.folder), reference, prefill=6)


@pytest.mark.parametrize("prefill", [1, 16, 17, 24])
def test_logits_through_the_cache_equal_transformers_after_every_prefill(reference_checkpoint, prefill):
    reference = reference_checkpoint("deepseek_v3", **CACHED["groups, yarn that sharpens"])
    parity.assert_same_logits_decoded(Model(reference.folder), reference, prefill)


@pytest.mark.parametrize("name", CACHED)
def test_tokens_served_equal_transformers(reference_checkpoint, name):
    reference = reference_checkpoint("deepseek_v3", **CACHED[name])
    parity.assert_same_tokens_served(Model(reference.folder), reference)


def test_greedy_equals_transformers(reference_checkpoint):
    reference = reference_checkpoint("deepseek_v3", **CACHED["groups, yarn that sharpens"])
    prompt = reference.tokens[0, :5]
    assert list(jaxmoe.load(reference.folder).greedy(prompt, 12)) == reference.greedy(prompt.tolist(), 12)


@pytest.mark.parametrize("mesh", ["dp=2,ep=4", "ep=8", "ep=2,tp=2"])
def test_logits_equal_transformers_on_every_mesh(reference_checkpoint, mesh):
    # Of four experts, which eight devices hold twice.
    reference = reference_checkpoint(
        "deepseek_v3", num_hidden_layers=2, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2
    )
    model = Model(reference.folder, mesh)
    parity.assert_same_logits(model.logits(reference.tokens), reference.logits)
    parity.assert_same_logits_decoded(model, reference, prefill=6)


def test_every_expert_computed_equals_tokens_exchanged(reference_checkpoint):
    reference = reference_checkpoint("deepseek_v3")
    dense = Model(reference.folder, "ep=4", execution=Execution(strategy="dense"))
    parity.assert_same_logits(dense.logits(reference.tokens), reference.logits)


def test_bfloat16_diverges_by_no_more_than_its_noise(reference_checkpoint):
    assert parity.divergence_in_bfloat16(reference_checkpoint("deepseek_v3")) < 0.08


@pytest.mark.parametrize("value", [0, None])
def test_a_model_without_shared_experts_has_no_tensors_for_them(reference_checkpoint, tmp_path, value):
    # transformers has no such model; one whose shared experts give nothing is the same.
    reference = reference_checkpoint("deepseek_v3")
    shared = [mlp for name, mlp in reference.model.named_modules() if name.endswith("mlp.shared_experts")]
    kept = [mlp.down_proj.weight.data.clone() for mlp in shared]
    for mlp in shared:
        mlp.down_proj.weight.data.zero_()
    expected = reference.logits_of(reference.tokens)
    for mlp, weight in zip(shared, kept, strict=True):
        mlp.down_proj.weight.data.copy_(weight)
    (tmp_path / "config.json").write_text((reference.folder / "config.json").read_text())
    edit_config(tmp_path, {"n_shared_experts": value}, ())
    tensors = read_tensors(reference.folder)
    write_tensors(tmp_path, {name: tensor for name, tensor in tensors.items() if "shared_experts" not in name})
    parity.assert_same_logits(Model(tmp_path).logits(reference.tokens), expected)
