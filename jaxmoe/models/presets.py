"""Configs of published models, for planning and for benchmarks with random weights, whole or scaled down."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.errors import ConfigError

_DEEPSEEK = {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_LLAMA4 = {
    "model_type": "llama4_text",
    "architectures": ["Llama4ForCausalLM"],
    "vocab_size": 202048,
    "hidden_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 5e5,
    "bos_token_id": 200000,
    "eos_token_id": [200001, 200007, 200008],
}
_MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32000,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Each a config.json as its publisher has it on the Hugging Face hub, less what changes nothing here.
PRESETS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        **_MIXTRAL,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
    },
    "mixtral-8x22b": {
        **_MIXTRAL,
        "hidden_size": 6144,
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "intermediate_size": 16384,
        "max_position_embeddings": 65536,
    },
    "deepseek-v3": {
        **_DEEPSEEK,
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "vocab_size": 129280,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 163840,
        "rope_theta": 1e4,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "kimi-k2": {
        **_DEEPSEEK,
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
        "vocab_size": 163840,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "first_k_dense_replace": 1,
        "n_routed_experts": 384,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 131072,
        "rope_theta": 5e4,
        "rope_scaling": {
            "type": "yarn",
            "factor": 32,
            "original_max_position_embeddings": 4096,
            "beta_fast": 1,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "bos_token_id": 163584,
        "eos_token_id": 163585,
    },
    "llama-4-scout": {
        **_LLAMA4,
        "num_local_experts": 16,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "max_position_embeddings": 10485760,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama-4-maverick": {
        **_LLAMA4,
        "num_local_experts": 128,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "max_position_embeddings": 1048576,
    },
}

# What `scale` divides: how wide a model is, not how deep, nor how its experts are chosen.
_WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "vocab_size",
    "q_lora_rank",
    "kv_lora_rank",
)


def read_preset(text: str) -> dict[str, Any]:
    """The `config.json` that `NAME[:scale=N][,key=value...]` describes.

    scale: divides widths, ranks, heads and vocabulary; head dimensions, depth and the choice of experts stay.
    key=value: any key of the preset, as a number; given last it wins over scale.
    Raises ConfigError naming what is known.

    >>> read_preset("deepseek-v3:scale=16,num_hidden_layers=6")["hidden_size"]
    448
    """
    name, _, rest = text.partition(":")
    if name not in PRESETS:
        raise ConfigError(f"{name!r} is not a known model; use one of {', '.join(PRESETS)}")
    hf = dict(PRESETS[name])
    for part in filter(None, rest.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        known = [known for known, old in hf.items() if isinstance(old, int) and not isinstance(old, bool)]
        if not equals or not value.isascii() or not value.isdigit() or int(value) < 1:
            raise ConfigError(f"{text!r}: {part!r} is not of the form scale=N or key=N with a whole number N")
        if key == "scale":
            hf = _scaled(hf, int(value))
        elif key in known:
            hf[key] = int(value)
        else:
            raise ConfigError(f"{text!r}: {key!r} is not scale or one of {', '.join(sorted(known))}")
    return hf


def _scaled(hf: Mapping[str, Any], scale: int) -> dict[str, Any]:
    scaled = dict(hf)
    for key in _WIDTHS:
        if key in hf:
            scaled[key] = max(8, hf[key] // scale)
    # As many query heads to a key-value head as before.
    group = hf["num_attention_heads"] // hf["num_key_value_heads"]
    scaled["num_key_value_heads"] = max(1, hf["num_key_value_heads"] // scale)
    scaled["num_attention_heads"] = scaled["num_key_value_heads"] * group
    return scaled
