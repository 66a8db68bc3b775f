import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxmoe.ops import native
from jaxmoe.ops.sampling import adjust, keep_likely, report, sample

VOCABULARY = 50


@pytest.fixture(params=["xla", "native"])
def draw(request):
    if request.param == "native" and native.choose("auto", "cpu", jnp.dtype("float32")) == "xla":
        pytest.skip("no C++ compiler")
    return jax.jit(functools.partial(sample, implementation=request.param))


def rows(count, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0):
    """Parameters of `count` rows, each one value for all or a value a row."""
    given = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed, "position": position,
    }  # fmt: skip
    kinds = dict.fromkeys(("temperature", "top_p", "min_p"), np.float32)
    return {
        name: np.broadcast_to(np.asarray(value, kinds.get(name, np.int32)), (count,)) for name, value in given.items()
    }


def random_logits(count, scale=2.0, seed=0):
    return np.random.default_rng(seed).normal(size=(count, VOCABULARY)).astype(np.float32) * scale


def test_temperature_zero_takes_the_most_likely_token(draw):
    logits = random_logits(20)
    tokens, _ = draw(logits, **rows(20, temperature=0, top_k=3, seed=np.arange(20)))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_temperature_zero_takes_the_lowest_of_tied_tokens(draw):
    logits = np.zeros((1, VOCABULARY), np.float32)
    logits[0, [30, 7, 49]] = 1
    assert draw(logits, **rows(1, temperature=0))[0] == 7


@pytest.mark.parametrize("temperature", [1e-40, 1.2e-38, 1e-30, 1e-4])
def test_the_smallest_temperatures_take_the_most_likely_token(temperature, draw):
    logits = random_logits(20)
    tokens, _ = draw(logits, **rows(20, temperature=temperature, top_p=0.9, seed=np.arange(20)))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize(("top_k", "min_p"), [(0, 0), (1, 0), (5, 0.3), (49, 0), (1000, 0.02), (0, 0.1), (0, 1.0)])
def test_the_kept_tokens_are_those_of_transformers_warpers(top_k, top_p, min_p):
    torch = pytest.importorskip("torch")
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for scale in (0.1, 2.0, 8.0):
        logits = random_logits(40, scale)
        expected = torch.tensor(logits)
        if top_k:
            expected = TopKLogitsWarper(top_k)(None, expected)
        expected = TopPLogitsWarper(top_p)(None, expected)
        expected = MinPLogitsWarper(min_p)(None, expected).numpy()
        np.testing.assert_array_equal(kept_of(logits, top_k=top_k, top_p=top_p, min_p=min_p), expected)


KEEP = jax.jit(keep_likely)


def kept_of(logits, **chosen):
    logits = jnp.asarray(logits)
    fields = rows(len(logits), **chosen)
    return KEEP(logits, *(jnp.asarray(fields[name]) for name in ("top_k", "top_p", "min_p")))


def test_tokens_tied_with_the_last_one_kept_are_kept_too():
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.2]]))
    for top_k, top_p in ((2, 1.0), (0, 0.5)):
        kept = kept_of(logits, top_k=top_k, top_p=top_p)
        assert np.isfinite(kept).all()


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 4},
        {"top_p": 0.8},
        {"top_k": 10, "top_p": 0.7},
        {"min_p": 0.2},
    ],
)
@pytest.mark.parametrize("varied", ["seed", "position"])
def test_draws_follow_the_softmax_of_what_is_kept(setting, varied, draw):
    count = 4000
    logits = random_logits(1, 1.5)
    chosen = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **setting}
    tokens, _ = draw(np.repeat(logits, count, 0), **rows(count, **chosen, **{varied: np.arange(count)}))
    scaled = logits / chosen.pop("temperature")
    kept = kept_of(scaled, **chosen)
    expected = count * scipy.special.softmax(np.asarray(kept, np.float64)[0])
    observed = np.bincount(tokens, minlength=VOCABULARY)
    assert not observed[expected == 0].any()
    # Rare tokens are counted together, as the chi-square test asks for five of each.
    rare = expected < 5
    merged = [np.append(counts[~rare], counts[rare].sum()) for counts in (observed, expected)]
    observed, expected = (counts[merged[1] > 0] for counts in merged)
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


def test_a_row_draws_the_same_token_in_any_batch_and_place(draw):
    logits = random_logits(8)
    chosen = rows(
        8,
        temperature=[0.7, 1, 0, 1.3, 1, 1, 0.2, 1],
        top_k=[0, 0, 0, 5, 0, 3, 0, 0],
        top_p=[1, 0.9, 1, 1, 1, 0.5, 1, 1],
        seed=[3, 3, 1, -5, 2**31 - 1, 0, 9, 7],
        position=np.arange(8),
    )
    tokens, logprobs = draw(logits, **chosen)
    order = np.array([5, 2, 7, 0, 1, 6, 4, 3])
    moved = draw(logits[order], **{name: values[order] for name, values in chosen.items()})
    np.testing.assert_array_equal(moved[0], tokens[order])
    np.testing.assert_array_equal(moved[1], logprobs[order])
    for row in range(8):
        alone = draw(logits[row : row + 1], **{name: values[row : row + 1] for name, values in chosen.items()})
        assert alone[0] == tokens[row]
        np.testing.assert_allclose(alone[1], logprobs[row], rtol=1e-6)


def test_another_seed_or_position_draws_anew(draw):
    logits = np.zeros((64, VOCABULARY), np.float32)
    by_seed, by_position = (draw(logits, **rows(64, **{name: np.arange(64)}))[0] for name in ("seed", "position"))
    assert len(np.unique(by_seed)) > 20
    assert len(np.unique(by_position)) > 20


@pytest.mark.parametrize("setting", [{"temperature": 0}, {"temperature": 0.5, "top_k": 3, "top_p": 0.5}])
def test_the_logprob_is_that_of_the_unmodified_logits(setting, draw):
    logits = random_logits(20)
    tokens, logprobs = draw(logits, **rows(20, **setting, seed=np.arange(20)))
    expected = scipy.special.log_softmax(logits.astype(np.float64), -1)[np.arange(20), tokens]
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_logits_of_half_precision_are_sampled_in_float32(draw):
    logits = random_logits(4).astype(jnp.bfloat16)
    _, logprobs = draw(logits, **rows(4))
    assert logprobs.dtype == jnp.float32


def entries(*of_rows, batch, room):
    """(row, token, bias, times) of tokens by row, the rest of the room unused."""
    given = [(row, *each) for row, own in enumerate(of_rows) for each in own]
    given += [(batch, 0, 0.0, 0)] * (room - len(given))
    return tuple(np.array(column, kind) for column, kind in zip(zip(*given, strict=True), "iifi", strict=True))


EVERYTHING = np.full((1, 2), -1, np.int32)


def test_the_repetition_penalty_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = random_logits(2)
    said = np.array([[3, 7, 3, 11], [0, 49, 20, 20]])
    expected = [
        RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor(said[row : row + 1]), torch.tensor(logits[row : row + 1])
        )
        for row, penalty in enumerate((1.7, 0.6))
    ]
    arrays = entries(*([(token, 0.0, 0) for token in set(row.tolist())] for row in said), batch=2, room=12)
    none = np.zeros(2, np.float32)
    adjusted = jax.jit(adjust)(logits, EVERYTHING.repeat(2, 0), np.array([1.7, 0.6], np.float32), none, none, *arrays)
    np.testing.assert_allclose(adjusted, np.concatenate(expected), rtol=1e-6)


def test_biases_penalties_and_the_mask_are_those_of_a_numpy_oracle():
    rng = np.random.default_rng(5)
    batch = 3
    logits = random_logits(batch)
    repetition, frequency, presence = (
        rng.uniform(*ends, batch).astype(np.float32) for ends in ((0.5, 2), *[(-2, 2)] * 2)
    )
    allowed = rng.random((batch, VOCABULARY)) < 0.8
    chosen = [
        [(token, rng.normal(), rng.integers(-1, 4)) for token in rng.choice(VOCABULARY, 20, False)]
        for _ in range(batch)
    ]
    expected = logits.astype(np.float64)
    for row, own in enumerate(chosen):
        for token, bias, times in own:
            value = expected[row, token] + bias
            if times >= 0:
                value = value / repetition[row] if value > 0 else value * repetition[row]
            expected[row, token] = value - frequency[row] * max(times, 0) - presence[row] * (times > 0)
    expected[~allowed] = -np.inf
    bits = np.packbits(np.pad(allowed, ((0, 0), (0, 64 - VOCABULARY))), axis=1, bitorder="little").view(np.int32)
    arrays = entries(*chosen, batch=batch, room=64)
    adjusted = jax.jit(adjust)(logits, bits, repetition, frequency, presence, *arrays)
    np.testing.assert_allclose(adjusted, expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_token_that_is_not_allowed_is_never_chosen(temperature, draw):
    logits = random_logits(500, seed=2)
    logits[:, np.arange(VOCABULARY) % 7 != 3] = -np.inf
    tokens, logprobs = draw(logits, **rows(500, temperature=temperature, top_p=0.9, seed=np.arange(500)))
    assert set(tokens.tolist()) <= set(range(3, VOCABULARY, 7))
    assert np.isfinite(logprobs).all()


def test_the_report_equals_the_full_log_softmax():
    logits = random_logits(30)
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, 30).astype(np.int32)
    logprobs, likely, values = jax.jit(report, static_argnums=2)(logits, tokens, 20)
    expected = scipy.special.log_softmax(logits.astype(np.float64), -1)
    order = np.argsort(-expected, axis=-1, kind="stable")[:, :20]
    np.testing.assert_array_equal(likely, order)
    np.testing.assert_allclose(values, np.take_along_axis(expected, order, -1), atol=1e-5)
    np.testing.assert_allclose(logprobs, expected[np.arange(30), tokens], atol=1e-5)
