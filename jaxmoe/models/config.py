"""What a checkpoint is: one frozen ModelConfig, read from Hugging Face's `config.json` in either of its dialects."""

import dataclasses
import functools
from collections.abc import Mapping
from types import UnionType
from typing import Any

from jaxmoe.errors import CheckpointError
from jaxmoe.ops.gating import ACTIVATIONS
from jaxmoe.ops.rope import RopeConfig
from jaxmoe.sharding.mesh import MeshSpec
from jaxmoe.sharding.rules import Rules
from jaxmoe.spans import FULL, Span

# Present in many configs and without effect on what the model computes at inference; how weights are quantised is the
# loader's business, which refuses what it cannot read.
HARMLESS_KEYS = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id", "cache_implementation",
        "chunk_size_feed_forward", "dtype", "eos_token_id", "ep_size", "id2label", "initializer_range",
        "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states",
        "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "quantization_config", "return_dict",
        "router_aux_loss_coef", "router_jitter_noise", "tie_encoder_decoder", "torch_dtype", "torchscript",
        "transformers_version", "use_bfloat16", "use_cache", "_attn_implementation_autoset",
    }
)  # fmt: skip
# Of kinds of scaling; left over in a config of kind "default" they change nothing.
SCALING_KEYS = (
    "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "attention_factor", "truncate",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What one layer is: its feed-forward part a mixture or dense, its positions rotated or not, how far it looks."""

    moe: bool = True
    rope: bool = True
    span: Span = FULL


@dataclasses.dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, sec. 2.1): keys and values from one latent vector.

    q_lora_rank None: queries come straight from the hidden state.
    nope_dim, rope_dim: the parts of a head's query and key without and with rotation. value_dim: a head's value.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclasses.dataclass(frozen=True)
class GroupRouting:
    """DeepSeek-V3's choice of experts (arXiv:2412.19437, sec. 2.1.2): the best of the best groups."""

    groups: int
    groups_kept: int
    normalise: bool
    scale: float


@dataclasses.dataclass(frozen=True)
class TemperatureTuning:
    """Llama 4's scaling of queries by log(position) on layers without rotation (arXiv:2501.19399)."""

    floor_scale: int
    scale: float


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a decoder. `model_type`, `architectures` and token ids are as in the checkpoint.

    kinds: one for each of the `layers`. mtp_layers: further layers that predict a token more, after these.
    score_scale: what attention scores are multiplied by.
    latent: None where keys and values are cached as they are. groups: None where experts are chosen from all.
    """

    model_type: str
    architectures: tuple[str, ...]
    vocab_size: int
    width: int
    kinds: tuple[LayerKind, ...]
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_per_token: int
    expert_width: int
    norm_eps: float
    rope: RopeConfig
    activation: str
    tie_embeddings: bool
    max_position: int
    score_scale: float
    shared_width: int = 0
    dense_width: int = 0
    rope_interleaved: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    temperature: TemperatureTuning | None = None
    latent: LatentAttention | None = None
    groups: GroupRouting | None = None
    mtp_layers: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        def require(holds: bool, text: str) -> None:
            if not holds:
                raise CheckpointError(f"config.json: {text}")

        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "experts", "expert_width"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(self.heads % self.kv_heads == 0, f"{self.kv_heads} key-value heads do not divide {self.heads} heads")
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even for rotary embeddings")
        require(
            1 <= self.experts_per_token <= self.experts,
            f"num_experts_per_tok={self.experts_per_token} must be between 1 and {self.experts} experts",
        )
        require(
            self.activation in ACTIVATIONS, f"hidden_act={self.activation!r} is not one of {', '.join(ACTIVATIONS)}"
        )
        for span in self.spans:
            require(span.kind == "full" or span.size >= 1, f"attention over a {span} must be at least 1, or null")

    @property
    def layers(self) -> int:
        """Layers of the main model."""
        return len(self.kinds)

    @functools.cached_property
    def all_kinds(self) -> tuple[LayerKind, ...]:
        """Of the main model's layers and of those that predict a token more."""
        return (*self.kinds, *(LayerKind(),) * self.mtp_layers)

    @functools.cached_property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        """Layer numbers by the name of the stack of parameters that they share."""
        numbered = list(enumerate(self.all_kinds))
        return {
            "all": tuple(layer for layer, _ in numbered),
            "moe": tuple(layer for layer, kind in numbered if kind.moe),
            "dense": tuple(layer for layer, kind in numbered if not kind.moe),
            "mtp": tuple(range(self.layers, len(numbered))),
        }

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        """The distinct spans of attention. Layers of one span share a group of KV pages."""
        return tuple(dict.fromkeys(kind.span for kind in self.all_kinds))

    def layers_of(self, span: Span) -> tuple[int, ...]:
        """Layer numbers whose attention has this span."""
        return tuple(layer for layer, kind in enumerate(self.all_kinds) if kind.span == span)


class Fields:
    """Reads a `config.json` key by key, so that what is left unread at the end is known and named."""

    def __init__(self, config: Mapping[str, Any], where: str = "config.json") -> None:
        self._config = config
        self._where = where
        self._read: set[str] = set()

    def __call__(self, key: str, kind: type | UnionType, default: Any = ...) -> Any:
        """The value of `key` as `kind`; `default` when it is absent or null. Raises CheckpointError."""
        self._read.add(key)
        value = self._config.get(key)
        if value is None:
            if default is ...:
                raise CheckpointError(f"{self._where} lacks {key!r}, which this model needs")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            name = kind.__name__ if isinstance(kind, type) else str(kind)
            raise CheckpointError(f"{self._where}: {key}={value!r} must be of type {name}")
        return value

    def list_of(self, key: str, kind: type, length: int | None = None) -> list[Any] | None:
        """A list of `kind` of at least `length`, None when it is absent or null. Raises CheckpointError."""
        values = self(key, list, None)
        if values is None:
            return None
        if not all(isinstance(value, kind) and not (kind is int and isinstance(value, bool)) for value in values):
            raise CheckpointError(f"{self._where}: {key} must be a list of {kind.__name__}")
        if length is not None and values and len(values) < length:
            raise CheckpointError(f"{self._where}: {key} has {len(values)} entries, fewer than {length} layers")
        return values

    def must_be(self, key: str, *known: Any) -> None:
        """Raises CheckpointError unless the key is absent or has one of the values that are computed here."""
        self._read.add(key)
        value = self._config.get(key)
        if key in self._config and not any(value == one and type(value) is type(one) for one in known):
            listed = " or ".join(map(repr, known))
            raise CheckpointError(f"{self._where}: {key}={value!r} is not supported; only {listed} is")

    def __contains__(self, key: str) -> bool:
        return key in self._config

    def ignore(self, *keys: str) -> None:
        """Counts keys as read whose value changes nothing here."""
        self._read.update(keys)

    def finish(self) -> None:
        """Raises CheckpointError naming every key that nobody read and that is not known to be harmless."""
        unknown = sorted(set(self._config) - self._read - HARMLESS_KEYS)
        if unknown:
            raise CheckpointError(
                f"{self._where} has keys whose effect on the model is not known here: {', '.join(unknown)}; "
                "remove them if they change nothing"
            )


def text_config(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of `config.json` that is about text: of a multimodal model `text_config`, else all of it."""
    text = hf.get("text_config")
    if text is None:
        return hf
    if not isinstance(text, Mapping):
        raise CheckpointError(f"config.json: text_config={text!r} must be an object")
    return text


def token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """`eos_token_id` and its kin: null, one id or a list of ids. Raises CheckpointError."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id_, int) for id_ in ids):
        raise CheckpointError(f"{key}={value!r} must be a token id, a list of them or null")
    return tuple(ids)


def special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig that name tokens. Raises CheckpointError."""
    return {
        "bos_token_id": next(iter(token_ids(config, "bos_token_id")), None),
        "eos_token_ids": token_ids(config, "eos_token_id"),
        "pad_token_id": next(iter(token_ids(config, "pad_token_id")), None),
    }


def rope_from(fields: Fields, default_theta: float, max_position: int) -> RopeConfig:
    """Both dialects: `rope_theta` with `rope_scaling` (transformers 4), or `rope_parameters` (transformers 5)."""
    theta = fields("rope_theta", float, None)
    scaling: Mapping[str, Any] = fields("rope_scaling", dict, None) or {}
    parameters: Mapping[str, Any] = fields("rope_parameters", dict, None) or {}
    inner = Fields(scaling or parameters)
    kind = inner("rope_type", str, None) or inner("type", str, None) or "default"
    inner("type", str, None)
    theta = inner("rope_theta", float, None) or theta or default_theta
    if kind == "default":
        inner.ignore(*SCALING_KEYS)
        inner.finish()
        return RopeConfig(theta)
    if kind not in ("linear", "llama3", "yarn"):
        raise CheckpointError(f"config.json: rope type {kind!r} is not one of default, linear, llama3, yarn")
    factor = inner("factor", float)
    if factor < 1:
        raise CheckpointError(f"config.json: rope factor={factor} must be at least 1")
    original = inner("original_max_position_embeddings", int, max_position)
    # Latent attention sharpens its scores by mscale_all_dim under every kind of scaling.
    mscale, mscale_all_dim = inner("mscale", float, 0.0), inner("mscale_all_dim", float, 0.0)
    rope = RopeConfig(theta, kind, factor, original, mscale=mscale, mscale_all_dim=mscale_all_dim)
    if kind == "llama3":
        rope = dataclasses.replace(
            rope, low_freq_factor=inner("low_freq_factor", float), high_freq_factor=inner("high_freq_factor", float)
        )
    if kind == "yarn":
        rope = dataclasses.replace(
            rope,
            beta_fast=inner("beta_fast", float, 32.0),
            beta_slow=inner("beta_slow", float, 1.0),
            attention_factor=inner("attention_factor", float, None),
            truncate=inner("truncate", bool, True),
        )
    inner.finish()
    return rope


def split_sizes(config: ModelConfig) -> dict[str, int]:
    """The axes that `tp` may split, by what they mean."""
    sizes = {"heads": config.heads, "vocab": config.vocab_size}
    if config.latent is None:
        sizes["kv_heads"] = config.kv_heads
    if config.stacks["moe"]:
        sizes["expert_width"] = config.expert_width
        if config.shared_width:
            sizes["shared_width"] = config.shared_width
    if config.stacks["dense"]:
        sizes["dense_width"] = config.dense_width
    return sizes


def rules_for(config: ModelConfig, spec: MeshSpec) -> Rules:
    """How `tp` splits the model: each axis that it divides; heads together with the key-value heads that they meet.

    With more devices than key-value heads, those are whole on each. Raises MeshError if `tp` divides nothing.
    """
    rules = Rules.fit(spec, **split_sizes(config))
    whole = set()
    if config.latent is None and config.kv_heads % spec.tp and spec.tp % config.kv_heads:
        whole.add("heads")
    if "heads" not in rules.split - whole:
        whole.add("kv_heads")
    return dataclasses.replace(rules, split=rules.split - whole)
