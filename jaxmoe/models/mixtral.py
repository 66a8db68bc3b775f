"""Mixtral (arXiv:2401.04088): grouped-query attention, each layer a mixture of SwiGLU experts, softmax top-k router."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Bool, Float

from jaxmoe.models.config import Fields, LayerKind, ModelConfig, rope_from, special_tokens
from jaxmoe.models.decoder import Decoder
from jaxmoe.models.keys import GROUPED_QUERY, LAYER, SKELETON, Key
from jaxmoe.moe.routing import Routing, softmax_top_k
from jaxmoe.spans import FULL, Span

_MIXTURE = LAYER + "block_sparse_moe."
_EXPERT = _MIXTURE + "experts.{expert}."
# In files that transformers 5 saved in its own names.
_FUSED = LAYER + "mlp."

# Parameter of the module <-> tensor of the checkpoint, with the axes of both sides.
KEYS = {
    **SKELETON,
    **GROUPED_QUERY,
    "router": Key(_MIXTURE + "gate.weight", "E D -> D E", "moe", Key(_FUSED + "gate.weight", "E D -> D E", "moe")),
    "experts.gate_up": Key(
        (_EXPERT + "w1.weight", _EXPERT + "w3.weight"),
        "F D -> D part F",
        "moe",
        Key(_FUSED + "experts.gate_up_proj", "expert (part F) D -> D part F", "moe"),
    ),
    "experts.down": Key(
        _EXPERT + "w2.weight", "D F -> F D", "moe", Key(_FUSED + "experts.down_proj", "expert D F -> F D", "moe")
    ),
}


class Mixtral(Decoder):
    """`MixtralForCausalLM`."""

    keys = KEYS

    @staticmethod
    def read_config(hf: Mapping[str, Any]) -> ModelConfig:
        """See Decoder."""
        fields = Fields(hf)
        width, heads = fields("hidden_size", int), fields("num_attention_heads", int)
        max_position = fields("max_position_embeddings", int, 131072)
        head_dim = fields("head_dim", int, width // max(heads, 1))
        window = fields("sliding_window", int, None)
        span = FULL if window is None else Span("window", window)
        config = ModelConfig(
            model_type="mixtral",
            architectures=tuple(hf.get("architectures") or ("MixtralForCausalLM",)),
            vocab_size=fields("vocab_size", int),
            width=width,
            kinds=(LayerKind(span=span),) * fields("num_hidden_layers", int),
            heads=heads,
            # A key that is absent means the family's default of 8; null means as many as query heads.
            kv_heads=fields("num_key_value_heads", int, heads if "num_key_value_heads" in hf else 8),
            head_dim=head_dim,
            experts=fields("num_local_experts", int, 8),
            experts_per_token=fields("num_experts_per_tok", int, 2),
            expert_width=fields("intermediate_size", int),
            norm_eps=fields("rms_norm_eps", float, 1e-5),
            rope=rope_from(fields, 1e6, max_position),
            activation=fields("hidden_act", str, "silu"),
            tie_embeddings=fields("tie_word_embeddings", bool, False),
            max_position=max_position,
            score_scale=max(head_dim, 1) ** -0.5,
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
        return softmax_top_k(logits, self.config.experts_per_token, valid)
