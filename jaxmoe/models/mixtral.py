"""Mixtral (arXiv:2401.04088): grouped-query attention, each layer a mixture of SwiGLU experts, softmax top-k router."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.models.config import Fields, ModelConfig, rope_from, token_ids
from jaxmoe.models.decoder import Decoder
from jaxmoe.models.keys import Key

_LAYER = "model.layers.{layer}."
_EXPERT = _LAYER + "block_sparse_moe.experts.{expert}."

# Parameter of the module <-> tensor of the checkpoint, with the axes of both sides.
KEYS = {
    "embed": Key("model.embed_tokens.weight", "V D"),
    "attention_norm": Key(_LAYER + "input_layernorm.weight", "D"),
    "attention.query": Key(_LAYER + "self_attn.q_proj.weight", "(H d) D -> D H d"),
    "attention.key": Key(_LAYER + "self_attn.k_proj.weight", "(H d) D -> D H d"),
    "attention.value": Key(_LAYER + "self_attn.v_proj.weight", "(H d) D -> D H d"),
    "attention.out": Key(_LAYER + "self_attn.o_proj.weight", "D (H d) -> H d D"),
    "expert_norm": Key(_LAYER + "post_attention_layernorm.weight", "D"),
    "router": Key(_LAYER + "block_sparse_moe.gate.weight", "E D -> D E"),
    "experts.gate_up": Key((_EXPERT + "w1.weight", _EXPERT + "w3.weight"), "F D -> D part F"),
    "experts.down": Key(_EXPERT + "w2.weight", "D F -> F D"),
    "norm": Key("model.norm.weight", "D"),
    "lm_head": Key("lm_head.weight", "V D"),
}


class Mixtral(Decoder):
    """`MixtralForCausalLM`; the common decoder is Mixtral's own."""

    keys = KEYS

    @staticmethod
    def read_config(hf: Mapping[str, Any]) -> ModelConfig:
        """From `config.json`. Raises CheckpointError naming what is missing, malformed or not understood."""
        fields = Fields(hf)
        width, heads = fields("hidden_size", int), fields("num_attention_heads", int)
        max_position = fields("max_position_embeddings", int, 131072)
        config = ModelConfig(
            model_type="mixtral",
            architectures=tuple(hf.get("architectures") or ("MixtralForCausalLM",)),
            vocab_size=fields("vocab_size", int),
            width=width,
            layers=fields("num_hidden_layers", int),
            heads=heads,
            # A key that is absent means the family's default of 8; null means as many as query heads.
            kv_heads=fields("num_key_value_heads", int, heads if "num_key_value_heads" in hf else 8),
            head_dim=fields("head_dim", int, width // max(heads, 1)),
            experts=fields("num_local_experts", int, 8),
            experts_per_token=fields("num_experts_per_tok", int, 2),
            expert_width=fields("intermediate_size", int),
            norm_eps=fields("rms_norm_eps", float, 1e-5),
            rope=rope_from(fields, 1e6, max_position),
            activation=fields("hidden_act", str, "silu"),
            sliding_window=fields("sliding_window", int, None),
            tie_embeddings=fields("tie_word_embeddings", bool, False),
            max_position=max_position,
            bos_token_id=next(iter(token_ids(hf, "bos_token_id")), None),
            eos_token_ids=token_ids(hf, "eos_token_id"),
            pad_token_id=next(iter(token_ids(hf, "pad_token_id")), None),
        )
        fields.finish()
        return config
