import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.engine.adjustments import Adjuster, AdjustmentShape
from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.grammars import Grammars
from jaxmoe.engine.pages import PageGroup
from jaxmoe.engine.request import Request, Sampled, SamplingParams
from jaxmoe.engine.scheduler import Scheduler
from jaxmoe.ops.sampling import adjust
from jaxmoe.spans import FULL

VOCABULARY, EOS, BATCH = 5000, 7, 2


@pytest.fixture
def adjuster():
    return Adjuster(VOCABULARY, (EOS,), Grammars(None, VOCABULARY, (EOS,)))


def after(tokens, *requests):
    """The chunks of the decode step after these tokens, which all the requests were given."""
    scheduler = Scheduler(
        EngineConfig(max_batch=BATCH, max_prefill_tokens=8192),
        num_ranks=1,
        groups=[PageGroup(FULL, 1000)],
        max_context=8000,
        eos_token_ids=frozenset({EOS}),
        vocab_size=VOCABULARY,
    )
    for index, (prompt, params) in enumerate(requests):
        scheduler.submit(Request(str(index), tuple(prompt), params))
    for token in tokens:
        plan = scheduler.schedule()
        scheduler.complete(plan, {str(index): Sampled((token,), (0.0,)) for index in range(len(requests))})
    return scheduler.schedule().decodes


def applied(adjuster, ranks, logits):
    shape, calls = AdjustmentShape(BATCH, VOCABULARY), list(adjuster.pack(BATCH, ranks))
    for packed in calls:
        assert packed.shape == (len(ranks), shape.words)
        logits = jax.jit(lambda logits, words: adjust(logits, *shape.unpack(words)))(logits, jnp.asarray(packed[0]))
    return np.asarray(logits), len(calls)


def test_entries_that_are_too_many_for_one_array_go_on_in_the_next(adjuster):
    logits = np.random.default_rng(0).normal(size=(BATCH, VOCABULARY)).astype(np.float32)
    prompt, output = list(range(100, 3100)), [50, 3999, 50, 120]
    params = SamplingParams(
        repetition_penalty=2, frequency_penalty=0.5, presence_penalty=1, logit_bias={60: 5.0, 50: 1}
    )
    ranks = after(output, (prompt, params), ([3], SamplingParams()))
    adjusted, calls = applied(adjuster, ranks, logits)
    assert calls == 3
    expected = logits.astype(np.float64)
    expected[0, 60] += 5
    expected[0, 50] += 1
    said = sorted({*prompt, *output})
    expected[0, said] *= np.where(expected[0, said] > 0, 0.5, 2)
    for token in set(output):
        expected[0, token] -= 1 + 0.5 * output.count(token)
    np.testing.assert_allclose(adjusted, expected, rtol=1e-5)


def test_rows_that_ask_for_nothing_are_given_nothing(adjuster):
    plain = SamplingParams(temperature=1, top_k=3, logprobs=5, min_tokens=2)
    assert list(adjuster.pack(BATCH, after([5, 6], ([3], plain)))) == []
    logits = np.zeros((BATCH, VOCABULARY), np.float32)
    adjusted, calls = applied(adjuster, after([5], ([3], plain)), logits)
    assert calls == 1
    assert np.argwhere(np.isinf(adjusted)).tolist() == [[0, EOS]]


def test_a_sequence_that_has_ended_is_forgotten(adjuster):
    ranks = after([5], ([3, 4], SamplingParams(presence_penalty=1)))
    assert len(list(adjuster.pack(BATCH, ranks))) == len(adjuster._histories) == 1
    del ranks
    gc.collect()
    assert not adjuster._histories
