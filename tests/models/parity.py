"""What equal to transformers means, for the tests of every family."""

import numpy as np
import scipy.special

from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.model import Model
from jaxmoe.engine.request import SamplingParams

TOLERANCE = 5e-4  # absolute, of logits of order 10


def assert_same_logits(logits, expected):
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


def assert_same_logits_decoded(model, reference, prefill, **options):
    """After a prefill through the paged cache and after every token decoded since."""
    for tokens, logits in zip(reference.tokens, reference.logits, strict=True):
        assert_same_logits(model.logits_decode(tokens, prefill=prefill, **options), logits[prefill - 1 :])


def assert_same_tokens_served(model, reference):
    """By an engine whose pages, chunks of prompts and spans of attention all end in the midst of one another."""
    limits = EngineConfig(page_size=4, max_batch=1, max_context=32, max_prefill_tokens=7, max_prefill_sequences=1)
    prompts = [reference.tokens[0, :17].tolist(), reference.tokens[1, :3].tolist()]
    tokens = [[], []]
    logprobs = [[], []]
    for output in Engine(model, limits).generate(prompts, SamplingParams(temperature=0, max_tokens=10)):
        tokens[int(output.request_id)] += output.token_ids
        logprobs[int(output.request_id)] += output.logprobs
    for prompt, continuation, reported in zip(prompts, tokens, logprobs, strict=True):
        assert continuation == reference.greedy(prompt, 10)
        uncached = scipy.special.log_softmax(reference.logits_of([prompt + continuation])[0, len(prompt) - 1 : -1], -1)
        np.testing.assert_allclose(reported, uncached[np.arange(10), continuation], atol=TOLERANCE, rtol=0)


def divergence_in_bfloat16(reference):
    """Mean Kullback-Leibler divergence of a model that computes in bfloat16 from transformers in float32."""
    computed = scipy.special.log_softmax(Model(reference.folder, dtype="bfloat16").logits(reference.tokens), -1)
    exact = scipy.special.log_softmax(reference.logits, -1)
    return float(np.mean(np.sum(np.exp(exact) * (exact - computed), -1)))
