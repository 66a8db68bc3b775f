"""DeepSeek-V3 (arXiv:2412.19437; also R1, V3.1 and Kimi-K2): latent attention, some dense layers, then mixtures of many
small experts beside a shared one, chosen by sigmoid scores group by group, and a layer that predicts a token more.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmoe.errors import CheckpointError
from jaxmoe.models.config import (
    Fields,
    GroupRouting,
    LatentAttention,
    LayerKind,
    ModelConfig,
    rope_from,
    special_tokens,
)
from jaxmoe.models.decoder import Decoder
from jaxmoe.models.keys import LAYER, SKELETON, Key, gated
from jaxmoe.moe.routing import Routing, sigmoid_group_top_k
from jaxmoe.ops.rope import yarn_mscale

_ATTENTION = LAYER + "self_attn."
_MLP = LAYER + "mlp."
_EXPERT = _MLP + "experts.{expert}."

# Parameter of the module <-> tensor of the checkpoint, with the axes of both sides.
KEYS = {
    **SKELETON,
    "attention.query": Key(_ATTENTION + "q_proj.weight", "N D -> D N"),
    "attention.query_a": Key(_ATTENTION + "q_a_proj.weight", "r D -> D r"),
    "attention.query_a_bias": Key(_ATTENTION + "q_a_proj.bias", "r"),
    "attention.query_norm": Key(_ATTENTION + "q_a_layernorm.weight", "r"),
    "attention.query_b": Key(_ATTENTION + "q_b_proj.weight", "N r -> r N"),
    "attention.latent": Key(_ATTENTION + "kv_a_proj_with_mqa.weight", "r D -> D r"),
    "attention.latent_bias": Key(_ATTENTION + "kv_a_proj_with_mqa.bias", "r"),
    "attention.latent_norm": Key(_ATTENTION + "kv_a_layernorm.weight", "r"),
    "attention.key_value": Key(_ATTENTION + "kv_b_proj.weight", "(H d) r -> r H d"),
    "attention.out": Key(_ATTENTION + "o_proj.weight", "D (H d) -> H d D"),
    "attention.out_bias": Key(_ATTENTION + "o_proj.bias", "D"),
    **gated("dense", _MLP, "dense"),
    "router": Key(_MLP + "gate.weight", "E D -> D E", "moe"),
    "router_bias": Key(_MLP + "gate.e_score_correction_bias", "E", "moe"),
    "experts.gate_up": Key(
        (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
        "F D -> D part F",
        "moe",
        Key(_MLP + "experts.gate_up_proj", "expert (part F) D -> D part F", "moe"),
    ),
    "experts.down": Key(
        _EXPERT + "down_proj.weight", "D F -> F D", "moe", Key(_MLP + "experts.down_proj", "expert D F -> F D", "moe")
    ),
    **gated("shared", _MLP + "shared_experts.", "moe"),
    "mtp.embed_norm": Key(LAYER + "enorm.weight", "D", "mtp"),
    "mtp.hidden_norm": Key(LAYER + "hnorm.weight", "D", "mtp"),
    "mtp.project": Key(LAYER + "eh_proj.weight", "D W -> W D", "mtp"),
    "mtp.norm": Key(LAYER + "shared_head.norm.weight", "D", "mtp"),
}


class DeepseekV3(Decoder):
    """`DeepseekV3ForCausalLM`."""

    keys = KEYS
    # The further layer's copies of what the main model has.
    ignored = r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight"
    router_dtype = jnp.dtype("float32")

    @staticmethod
    def read_config(hf: Mapping[str, Any]) -> ModelConfig:
        """See Decoder."""
        fields = Fields(hf)
        fields.must_be("scoring_func", "sigmoid")
        fields.must_be("topk_method", "noaux_tc")
        fields.must_be("moe_layer_freq", 1)
        # Follow from other keys, or concern training alone.
        fields.ignore("head_dim", "qk_head_dim", "aux_loss_alpha", "seq_aux", "num_local_experts")
        heads = fields("num_attention_heads", int)
        kv_heads = fields("num_key_value_heads", int, heads)
        if kv_heads != heads:
            raise CheckpointError(
                f"config.json: num_key_value_heads={kv_heads} differs from num_attention_heads={heads}; "
                "latent attention has a key and a value for every head"
            )
        latent = LatentAttention(
            # A key that is absent means the family's default; null means queries without a rank of their own.
            q_lora_rank=fields("q_lora_rank", int, None if "q_lora_rank" in hf else 1536),
            kv_lora_rank=fields("kv_lora_rank", int, 512),
            nope_dim=fields("qk_nope_head_dim", int, 128),
            rope_dim=fields("qk_rope_head_dim", int, 64),
            value_dim=fields("v_head_dim", int, 128),
        )
        for name, value in dataclasses.asdict(latent).items():
            if value is not None and value < 1:
                raise CheckpointError(f"config.json: {name}={value} of latent attention must be at least 1")
        experts, per_token = fields("n_routed_experts", int, 256), fields("num_experts_per_tok", int, 8)
        groups = GroupRouting(
            groups=fields("n_group", int, 1 if "n_group" in hf else 8),
            groups_kept=fields("topk_group", int, 1 if "topk_group" in hf else 4),
            normalise=fields("norm_topk_prob", bool, "norm_topk_prob" not in hf),
            scale=fields("routed_scaling_factor", float, 2.5),
        )
        _check_groups(groups, experts, per_token)
        layers, dense = fields("num_hidden_layers", int), fields("first_k_dense_replace", int, 3)
        max_position = fields("max_position_embeddings", int, 4096)
        expert_width = fields("moe_intermediate_size", int, 2048)
        rope = rope_from(fields, 1e4, max_position)
        sharpened = yarn_mscale(rope.factor, rope.mscale_all_dim) if rope.mscale_all_dim else 1.0
        mtp_layers = fields("num_nextn_predict_layers", int, 0 if "num_nextn_predict_layers" in hf else 1)
        if mtp_layers not in (0, 1):
            raise CheckpointError(
                f"config.json: num_nextn_predict_layers={mtp_layers} is not supported; only 0 or 1 is"
            )
        config = ModelConfig(
            model_type=hf.get("model_type", "deepseek_v3"),
            architectures=tuple(hf.get("architectures") or ("DeepseekV3ForCausalLM",)),
            vocab_size=fields("vocab_size", int),
            width=fields("hidden_size", int),
            kinds=tuple(LayerKind(moe=layer >= dense) for layer in range(layers)),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=latent.rope_dim,
            experts=experts,
            experts_per_token=per_token,
            expert_width=expert_width,
            norm_eps=fields("rms_norm_eps", float, 1e-6),
            rope=rope,
            activation=fields("hidden_act", str, "silu"),
            tie_embeddings=fields("tie_word_embeddings", bool, False),
            max_position=max_position,
            score_scale=(latent.nope_dim + latent.rope_dim) ** -0.5 * sharpened**2,
            shared_width=expert_width * fields("n_shared_experts", int, 0 if "n_shared_experts" in hf else 1),
            dense_width=fields("intermediate_size", int, 18432),
            rope_interleaved=fields("rope_interleave", bool, "rope_interleave" not in hf),
            attention_bias=fields("attention_bias", bool, False),
            latent=latent,
            groups=groups,
            mtp_layers=mtp_layers,
            **special_tokens(hf),
        )
        fields.finish()
        return config

    def route(
        self,
        logits: Float[Array, "N E"],
        bias: Float[Array, "E"] | None,
        valid: Bool[Array, "N"],
    ) -> Routing:
        """See Decoder."""
        config, groups = self.config, self.config.groups
        assert groups is not None
        assert bias is not None
        return sigmoid_group_top_k(
            logits,
            bias,
            config.experts_per_token,
            groups.groups,
            groups.groups_kept,
            groups.normalise,
            groups.scale,
            valid,
        )


def _check_groups(groups: GroupRouting, experts: int, per_token: int) -> None:
    if groups.groups < 1 or experts % groups.groups:
        raise CheckpointError(f"config.json: n_group={groups.groups} does not divide {experts} experts")
    if not 1 <= groups.groups_kept <= groups.groups:
        raise CheckpointError(f"config.json: topk_group={groups.groups_kept} must be between 1 and {groups.groups}")
    choice = experts // groups.groups * groups.groups_kept
    if per_token > choice:
        raise CheckpointError(
            f"config.json: num_experts_per_tok={per_token} is more than the {choice} experts of the "
            f"{groups.groups_kept} groups that are kept"
        )
