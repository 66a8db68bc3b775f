"""What a client asks for, and what the engine answers step by step. Plain data: imports neither jax nor grpc."""

import dataclasses
import math

from jaxmoe.errors import InvalidRequestError

MOST_PRIORITY = 100


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    temperature: 0 is greedy; otherwise logits are divided by it before top-k and top-p.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all.
    seed: the same seed gives the same tokens whatever else is in the batch; None draws one.
    max_tokens: None means up to the context limit.
    stop_token_ids: end the generation as the end-of-sequence token does.
    ignore_eos: the model's end-of-sequence tokens do not end the generation.
    n: so many samples of one prompt, whose pages they share; each with a seed of its own.
    prompt_logprobs: not None has every prompt token computed, cached or not.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    prompt_logprobs: int | None = None

    def validate(self, vocab_size: int) -> None:
        """Raises InvalidRequestError naming the first field whose value cannot work."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidRequestError(
                f"temperature={self.temperature} must be finite and >= 0 (0 is greedy)", "temperature"
            )
        if self.top_k < 0:
            raise InvalidRequestError(f"top_k={self.top_k} must be >= 0 (0 keeps all tokens)", "top_k")
        if not 0 < self.top_p <= 1:
            raise InvalidRequestError(f"top_p={self.top_p} must be in (0, 1]", "top_p")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidRequestError(f"max_tokens={self.max_tokens} must be >= 1", "max_tokens")
        if self.n < 1:
            raise InvalidRequestError(f"n={self.n} must be >= 1", "n")
        for token in self.stop_token_ids:
            if not 0 <= token < vocab_size:
                raise InvalidRequestError(
                    f"stop_token_ids holds {token}, outside the vocabulary of {vocab_size}", "stop_token_ids"
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


@dataclasses.dataclass(frozen=True)
class Output:
    """What one step brought for one request, or for one of its samples.

    finish_reason: None while the request goes on, else "stop" (an end-of-sequence or stop token, which is the last of
    `token_ids` and named by `stop_token`), "length" (max_tokens or the context limit), "abort", or "error": the step
    failed, as `error` says.
    index: which of the request's n samples; each ends for itself.
    cached_tokens: so many of the prompt's were found in the prefix cache when it first ran.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str | None = None
    stop_token: int | None = None
    index: int = 0
    error: str = ""
    cached_tokens: int = 0
