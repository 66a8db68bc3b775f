"""How the engine serves, apart from what the checkpoint is and where it runs. Imports neither jax nor numpy."""

import dataclasses

from jaxmoe.errors import ConfigError

# Share of the memory that the weights leave, for KV pages: on an accelerator nothing else needs it but the activations;
# on a CPU the rest of the machine does.
ACCELERATOR_SHARE, CPU_SHARE = 0.85, 0.25
SPECULATE = (None, "mtp")


@dataclasses.dataclass(frozen=True)
class Rebalance:
    """When and how experts move while an engine serves. It may always be asked to, by `Engine.rebalance`.

    interval: calls of compiled programs from one look at the loads to the next; 0 never looks.
    threshold: moves experts when balancedness falls below this share of its ceiling; 0 does not.
    bytes_per_step: of experts' weights that move in one step of the engine, at most, but at least one expert.
    deadline: seconds after which what has not moved stays.
    devices_at_least: that hold each expert of a copy; 2 keeps all experts reachable without any one device.
    least_gain: a layer stays as it is unless its balancedness is to rise by more.
    """

    interval: int = 0
    threshold: float = 0.0
    bytes_per_step: int = 64 << 20
    deadline: float = 600.0
    devices_at_least: int = 1
    least_gain: float = 0.02

    def __post_init__(self) -> None:
        for name, least in (("interval", 0), ("bytes_per_step", 1), ("devices_at_least", 1)):
            if not isinstance(value := getattr(self, name), int) or value < least:
                raise ConfigError(f"rebalance {name}={value!r} must be a whole number of at least {least}")
        for name in ("threshold", "least_gain"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ConfigError(f"rebalance {name}={value!r} must be between 0 and 1")
        if not self.deadline > 0:
            raise ConfigError(f"rebalance deadline={self.deadline!r} must be more than 0 seconds")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The limits within which the engine batches requests. Per attention rank, unless said otherwise.

    page_size: tokens per KV page.
    pages_per_rank: KV pages of the layers that see the whole context, or of those that see most of it; None derives
        them from the device's memory and the model. Layers that see only a window or a chunk have pages of their own,
        enough of them for `max_batch` sequences but never more than this.
    max_batch: sequences decoding at once.
    max_context: tokens of prompt and generation together; None is the model's own limit.
    max_batch_tokens: tokens that go through the model in one step: those that decode, one each or with a draft two, and
        then chunks of prompts; None is a full batch that decodes beside `max_prefill_tokens`.
    max_prefill_tokens: prompt tokens prefilled in one step, for which programs are compiled; a longer prompt is split
        over several. Never more than `max_batch_tokens`.
    max_prefill_sequences: sequences whose chunks may share one prefill step.
    max_queue: requests that wait for a place, over all ranks; one more is refused.
    prefix_cache: full pages stay where they are once their sequence has ended, for others that begin with the same
        tokens, until somebody needs the place.
    priority_ageing: steps of waiting that are worth one level of priority.
    warm_up: compile every step program before the first request, as a server must; without it each is compiled when a
        step first needs it, which suits a notebook.
    rebalance: when experts may move while the engine serves; None keeps no room for that.
    speculate: "mtp": the checkpoint's layer for multi-token prediction drafts a token for every sequence that decodes,
        and the next step verifies it; None puts one token a sequence through the model.
    overlap: a step begins before the tokens of the one before are read, so that the device need not wait for the host.
    """

    page_size: int = 16
    pages_per_rank: int | None = None
    max_batch: int = 64
    max_context: int | None = None
    max_batch_tokens: int | None = None
    max_prefill_tokens: int = 256
    max_prefill_sequences: int = 8
    max_queue: int = 1024
    prefix_cache: bool = True
    priority_ageing: int = 100
    warm_up: bool = True
    rebalance: Rebalance | None = None
    speculate: str | None = None
    overlap: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (
                field.name in ("rebalance", "speculate")
                or isinstance(field.default, bool)
                or (value is None and field.default is None)
            ):
                continue
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field.name}={value!r} must be a whole number of at least 1")
        if self.speculate not in SPECULATE:
            raise ConfigError(f"speculate={self.speculate!r} must be 'mtp' or None")
        if self.max_context == 1:
            raise ConfigError("max_context=1 has no room for a prompt token and a generated one; use 2 or more")
        if self.max_batch_tokens is not None:
            if self.max_batch_tokens < (least := self.max_batch * self.decode_tokens):
                each = "one token" if self.decode_tokens == 1 else f"{self.decode_tokens} tokens, one of them a draft,"
                raise ConfigError(
                    f"max_batch_tokens={self.max_batch_tokens} has no room for max_batch={self.max_batch} sequences "
                    f"that decode {each} each; use max_batch_tokens >= {least} or a smaller max_batch"
                )
            longest = min(self.max_prefill_tokens, self.max_batch_tokens)
            object.__setattr__(self, "max_prefill_tokens", longest)

    @property
    def decode_tokens(self) -> int:
        """Tokens that a sequence which decodes may put through the model in one step."""
        return 1 if self.speculate is None else 2

    @property
    def token_budget(self) -> int:
        """Tokens of one step on a rank."""
        return self.max_batch_tokens or self.max_batch * self.decode_tokens + self.max_prefill_tokens
