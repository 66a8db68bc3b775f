"""Llama 4, text (Scout, Maverick): rotated layers that look back within a chunk, every few an unrotated one that looks
back all the way; mixtures beside a shared expert, on all layers or on every second, with the score on the input.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Bool, Float

from jaxmoe.errors import CheckpointError
from jaxmoe.models.config import (
    Fields,
    LayerKind,
    ModelConfig,
    TemperatureTuning,
    rope_from,
    special_tokens,
    text_config,
)
from jaxmoe.models.decoder import Decoder
from jaxmoe.models.keys import GROUPED_QUERY, LAYER, SKELETON, Key, gated
from jaxmoe.moe.routing import Routing, top_k_sigmoid
from jaxmoe.spans import FULL, Span

_ATTENTION = LAYER + "self_attn."
_MLP = LAYER + "feed_forward."

# Parameter of the module <-> tensor of the checkpoint, with the axes of both sides.
KEYS = {
    **SKELETON,
    **GROUPED_QUERY,
    "attention.query_bias": Key(_ATTENTION + "q_proj.bias", "(H d) -> H d"),
    "attention.key_bias": Key(_ATTENTION + "k_proj.bias", "(H d) -> H d"),
    "attention.value_bias": Key(_ATTENTION + "v_proj.bias", "(H d) -> H d"),
    "attention.out_bias": Key(_ATTENTION + "o_proj.bias", "D"),
    **gated("dense", _MLP, "dense"),
    "router": Key(_MLP + "router.weight", "E D -> D E", "moe"),
    "experts.gate_up": Key(_MLP + "experts.gate_up_proj", "expert D (part F) -> D part F", "moe"),
    "experts.down": Key(_MLP + "experts.down_proj", "expert F D -> F D", "moe"),
    **gated("shared", _MLP + "shared_expert.", "moe"),
}


class Llama4(Decoder):
    """`Llama4ForCausalLM`, also as the text half of `Llama4ForConditionalGeneration`."""

    keys = KEYS
    prefix = "language_model."
    ignored = r"(vision_model|multi_modal_projector)\..*"
    weigh_input = True

    @staticmethod
    def read_config(hf: Mapping[str, Any]) -> ModelConfig:
        """See Decoder. Of a multimodal config the nested `text_config`."""
        text, where = text_config(hf), "config.json"
        if text is not hf:
            where = "config.json: text_config"
        fields = Fields(text, where)
        fields.ignore("for_llm_compressor")
        layers, heads = fields("num_hidden_layers", int, 48), fields("num_attention_heads", int, 40)
        max_position = fields("max_position_embeddings", int, 131072)
        width = fields("hidden_size", int)
        head_dim = fields("head_dim", int, width // max(heads, 1) if "head_dim" in text else 128)
        expert_width = fields("intermediate_size", int, 8192)
        # Hub configs have 4 where a truth value belongs; transformers 4 took it for one.
        tuned = fields("attn_temperature_tuning", int | bool, True)
        tuning = TemperatureTuning(fields("floor_scale", int, 8192), fields("attn_scale", float, 0.1))
        config = ModelConfig(
            model_type=hf.get("model_type", "llama4_text"),
            architectures=tuple(hf.get("architectures") or ("Llama4ForCausalLM",)),
            vocab_size=fields("vocab_size", int),
            width=width,
            kinds=_kinds(fields, where, layers),
            heads=heads,
            kv_heads=fields("num_key_value_heads", int, heads if "num_key_value_heads" in text else 8),
            head_dim=head_dim,
            experts=fields("num_local_experts", int, 16),
            experts_per_token=fields("num_experts_per_tok", int, 1),
            expert_width=expert_width,
            norm_eps=fields("rms_norm_eps", float, 1e-5),
            rope=rope_from(fields, 5e5, max_position),
            activation=fields("hidden_act", str, "silu"),
            tie_embeddings=_tied(hf, fields),
            max_position=max_position,
            score_scale=max(head_dim, 1) ** -0.5,
            shared_width=expert_width,
            dense_width=fields("intermediate_size_mlp", int, 16384),
            rope_interleaved=True,
            attention_bias=fields("attention_bias", bool, False),
            qk_norm=fields("use_qk_norm", bool, True),
            temperature=tuning if tuned else None,
            **special_tokens(text if any(key in text for key in ("eos_token_id", "bos_token_id")) else hf),
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
        return top_k_sigmoid(logits, self.config.experts_per_token, valid)


def _tied(hf: Mapping[str, Any], fields: Fields) -> bool:
    """A multimodal model's own word on tied embeddings is that of its top level."""
    within = fields("tie_word_embeddings", bool, False)
    return Fields(hf)("tie_word_embeddings", bool, False) if "text_config" in hf else within


def _kinds(fields: Fields, where: str, layers: int) -> tuple[LayerKind, ...]:
    step = fields("interleave_moe_layer_step", int, 1)
    interval = fields("no_rope_layer_interval", int, 4)
    if step < 1 or interval < 1:
        raise CheckpointError(
            f"{where}: interleave_moe_layer_step={step} and no_rope_layer_interval={interval} must be at least 1"
        )
    mixtures = fields.list_of("moe_layers", int)
    if mixtures is None:
        mixtures = list(range(step - 1, layers, step))
    # 1 marks a layer with rotation, despite the name.
    ropes = fields.list_of("no_rope_layers", int, layers)
    if not ropes:
        ropes = [int((layer + 1) % interval != 0) for layer in range(layers)]
    chunk = fields("attention_chunk_size", int, None if "attention_chunk_size" in fields else 8192)
    types = fields.list_of("layer_types", str, layers)
    if types is None:
        types = ["chunked_attention" if rope and chunk is not None else "full_attention" for rope in ropes]
    unknown = sorted(set(types) - {"chunked_attention", "full_attention"})
    if unknown:
        raise CheckpointError(
            f"{where}: layer_types has {', '.join(unknown)}; only chunked_attention and full_attention are supported"
        )
    if "chunked_attention" in types and chunk is None:
        raise CheckpointError(f"{where}: layer_types has chunked_attention, but attention_chunk_size is null")
    return tuple(
        LayerKind(
            moe=layer in mixtures,
            rope=bool(ropes[layer]),
            span=Span("chunk", chunk) if types[layer] == "chunked_attention" else FULL,
        )
        for layer in range(layers)
    )
