"""What a client asks for, and what the engine answers step by step. Plain data: imports neither jax nor grpc."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

from jaxmoe.errors import InvalidRequestError

MOST_LOGPROBS = 20  # alternatives told for a position
MOST_SAMPLES = 128
MOST_PRIORITY = 100

ConstraintKind: TypeAlias = Literal["json_schema", "json_object", "regex", "grammar", "choice", "structural_tag"]
TopLogprobs: TypeAlias = tuple[tuple[int, float], ...]
PromptLogprobs: TypeAlias = tuple[tuple[float, TopLogprobs], ...]


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What a generation must be as a whole; it may end only where it is complete.

    kind: "json_schema"; "json_object", which needs no text; "regex", of the whole text; "grammar", in Lark's or in
        GBNF's notation; "structural_tag", JSON of `structures` (begin, schema, end) and `triggers`, between which text
        is free; "choice", one of `choices`.
    """

    kind: ConstraintKind
    text: str = ""
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    Logits go through, in this order: constraint and min_tokens, logit_bias, the penalties (repetition, then frequency
    and presence), temperature, top_k, top_p, min_p. Reported log-probabilities are those of the logits as they were.

    temperature: 0 is greedy; otherwise logits are divided by it before top-k and top-p.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all.
    min_p: keep the tokens at least min_p times as likely as the most likely one; 0 keeps all.
    repetition_penalty: divides the logits above 0, and multiplies those below, of tokens in the prompt or the output.
    frequency_penalty: taken from a token's logit as often as it is in the output.
    presence_penalty: taken from the logit of each token in the output.
    logit_bias: added to logits, by token.
    seed: the same seed gives the same tokens whatever else is in the batch; None draws one.
    n: so many samples of one prompt, each with a seed of its own.
    min_tokens: until there are so many, neither end-of-sequence nor stop tokens are chosen, unless nothing else may be.
    max_tokens: None means up to the context limit.
    stop_token_ids: end the generation as the end-of-sequence token does.
    ignore_eos: the model's end-of-sequence tokens do not end the generation.
    logprobs: beside the chosen token's, report those of so many most likely tokens.
    prompt_logprobs: report them for the prompt's tokens too, with so many most likely ones; None reports none.
    routed_experts: report which experts each token went to; the model must record that.
    constraint: structured output.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    min_tokens: int = 0
    logprobs: int = 0
    prompt_logprobs: int | None = None
    routed_experts: bool = False
    constraint: Constraint | None = None

    @functools.cached_property
    def penalises(self) -> bool:
        """Logits depend on which tokens there are already."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @functools.cached_property
    def needs_last_token(self) -> bool:
        """The host must know a token before the next can be chosen; all other parameters work without."""
        return self.penalises or self.constraint is not None

    def validate(self, vocab_size: int) -> None:
        """Raises InvalidRequestError naming the first field whose value cannot work."""

        def check(field: str, holds: bool, demand: str) -> None:
            if not holds:
                raise InvalidRequestError(f"{field}={getattr(self, field)} must be {demand}", field)

        check("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "finite and >= 0 (0 is greedy)")
        check("top_k", self.top_k >= 0, ">= 0 (0 keeps all tokens)")
        check("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        check("min_p", 0 <= self.min_p <= 1, "in [0, 1] (0 keeps all tokens)")
        penalty = self.repetition_penalty
        check("repetition_penalty", math.isfinite(penalty) and penalty > 0, "finite and > 0 (1 is none)")
        check("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2] (0 is none)")
        check("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2] (0 is none)")
        check("n", 1 <= self.n <= MOST_SAMPLES, f"in 1..{MOST_SAMPLES}")
        check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, ">= 1")
        most = "" if self.max_tokens is None else f" and at most max_tokens={self.max_tokens}"
        within = self.max_tokens is None or self.min_tokens <= self.max_tokens
        check("min_tokens", self.min_tokens >= 0 and within, f">= 0{most}")
        check("logprobs", 0 <= self.logprobs <= MOST_LOGPROBS, f"in 0..{MOST_LOGPROBS}")
        wanted = self.prompt_logprobs
        check("prompt_logprobs", wanted is None or 0 <= wanted <= MOST_LOGPROBS, f"in 0..{MOST_LOGPROBS}")
        for field in ("stop_token_ids", "logit_bias"):
            for token in getattr(self, field):
                if not 0 <= token < vocab_size:
                    raise InvalidRequestError(f"{field} holds {token}, outside the vocabulary of {vocab_size}", field)
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise InvalidRequestError(f"logit_bias of token {token} is {bias}; send -100 to 100", "logit_bias")
        if self.constraint is not None and self.ignore_eos:
            raise InvalidRequestError(
                f"ignore_eos leaves {self.constraint.kind} no way to end; leave one of them out", "ignore_eos"
            )


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to continue.

    rank: pins it to an attention rank; None lets the scheduler choose.
    priority: the lower, the sooner, from -MOST_PRIORITY to MOST_PRIORITY.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    rank: int | None = None
    priority: int = 0


class RoutedExperts(NamedTuple):
    """Which experts tokens went to, from position `start` of prompt and output together.

    experts: [tokens, layers, k] of the mixture layers, logical ids, each in two bytes, the lower one first.
    """

    start: int
    layers: int
    k: int
    experts: bytes


@dataclasses.dataclass(frozen=True)
class Output:
    """What one step brought for one request, or for one of its samples.

    finish_reason: None while the request goes on, else "stop" (an end-of-sequence or stop token, which is the last of
    `token_ids` and named by `stop_token`), "length" (max_tokens or the context limit), "abort", or "error": the step
    failed, as `error` says.
    index: which of the request's n samples; each ends for itself.
    cached_tokens: so many of the prompt's were found in the prefix cache when it first ran.
    top_logprobs: for every token, the most likely ones and their log-probabilities, the likeliest first; empty unless
        `SamplingParams.logprobs` asks for some.
    prompt_logprobs: with the first token, if asked for: log-probability and most likely tokens of each token of the
        prompt but the first, of which there is none; else None.
    routed_experts: of the tokens that went through the model since the last Output, if asked for: the prompt's with the
        first token, then one's with each, which is the token before. A further sample begins where it computes for
        itself.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str | None = None
    stop_token: int | None = None
    index: int = 0
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None
    error: str = ""
    cached_tokens: int = 0
    routed_experts: RoutedExperts | None = None


class Sampled(NamedTuple):
    """What a step brought for one chunk that samples; see `Output`.

    tokens: one, and one more if the chunk's draft was right. draft: what may come after them; None if nobody drafts.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None
    draft: int | None = None
