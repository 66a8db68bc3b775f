import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxmoe.ops.sampling import keep_likely, sample

VOCABULARY = 50
draw = jax.jit(sample)


def rows(count, *, temperature=1.0, top_k=0, top_p=1.0, seed=0, position=0):
    """Parameters of `count` rows, each one value for all or a value a row."""
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "position": position}
    kinds = {"temperature": np.float32, "top_p": np.float32}
    return {
        name: np.broadcast_to(np.asarray(value, kinds.get(name, np.int32)), (count,)) for name, value in given.items()
    }


def random_logits(count, scale=2.0, seed=0):
    return np.random.default_rng(seed).normal(size=(count, VOCABULARY)).astype(np.float32) * scale


def test_temperature_zero_takes_the_most_likely_token():
    logits = random_logits(20)
    tokens, _ = draw(logits, **rows(20, temperature=0, top_k=3, seed=np.arange(20)))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_temperature_zero_takes_the_lowest_of_tied_tokens():
    logits = np.zeros((1, VOCABULARY), np.float32)
    logits[0, [30, 7, 49]] = 1
    assert draw(logits, **rows(1, temperature=0))[0] == 7


@pytest.mark.parametrize("temperature", [1e-40, 1.2e-38, 1e-30, 1e-4])
def test_the_smallest_temperatures_take_the_most_likely_token(temperature):
    logits = random_logits(20)
    tokens, _ = draw(logits, **rows(20, temperature=temperature, top_p=0.9, seed=np.arange(20)))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 49, 1000])
def test_the_kept_tokens_are_those_of_transformers_warpers(top_k, top_p):
    torch = pytest.importorskip("torch")
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    for scale in (0.1, 2.0, 8.0):
        logits = random_logits(40, scale)
        expected = torch.tensor(logits)
        if top_k:
            expected = TopKLogitsWarper(top_k)(None, expected)
        expected = TopPLogitsWarper(top_p)(None, expected).numpy()
        chosen = rows(40, top_k=top_k, top_p=top_p)
        kept = KEEP(jnp.asarray(logits), jnp.asarray(chosen["top_k"]), jnp.asarray(chosen["top_p"]))
        np.testing.assert_array_equal(kept, expected)


KEEP = jax.jit(keep_likely)


def test_tokens_tied_with_the_last_one_kept_are_kept_too():
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.2]]))
    for top_k, top_p in ((2, 1.0), (0, 0.5)):
        kept = keep_likely(logits, jnp.array([top_k]), jnp.array([top_p], jnp.float32))
        assert np.isfinite(kept).all()


@pytest.mark.parametrize(
    "setting",
    [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 4}, {"top_p": 0.8}, {"top_k": 10, "top_p": 0.7}],
)
@pytest.mark.parametrize("varied", ["seed", "position"])
def test_draws_follow_the_softmax_of_what_is_kept(setting, varied):
    count = 4000
    logits = random_logits(1, 1.5)
    chosen = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **setting}
    tokens, _ = draw(np.repeat(logits, count, 0), **rows(count, **chosen, **{varied: np.arange(count)}))
    kept = keep_likely(
        jnp.asarray(logits / chosen["temperature"]),
        jnp.array([chosen["top_k"]]),
        jnp.array([chosen["top_p"]], jnp.float32),
    )
    expected = count * scipy.special.softmax(np.asarray(kept, np.float64)[0])
    observed = np.bincount(tokens, minlength=VOCABULARY)
    assert not observed[expected == 0].any()
    # Rare tokens are counted together, as the chi-square test asks for five of each.
    rare = expected < 5
    merged = [np.append(counts[~rare], counts[rare].sum()) for counts in (observed, expected)]
    observed, expected = (counts[merged[1] > 0] for counts in merged)
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


def test_a_row_draws_the_same_token_in_any_batch_and_place():
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


def test_another_seed_or_position_draws_anew():
    logits = np.zeros((64, VOCABULARY), np.float32)
    by_seed, by_position = (draw(logits, **rows(64, **{name: np.arange(64)}))[0] for name in ("seed", "position"))
    assert len(np.unique(by_seed)) > 20
    assert len(np.unique(by_position)) > 20


@pytest.mark.parametrize("setting", [{"temperature": 0}, {"temperature": 0.5, "top_k": 3, "top_p": 0.5}])
def test_the_logprob_is_that_of_the_unmodified_logits(setting):
    logits = random_logits(20)
    tokens, logprobs = draw(logits, **rows(20, **setting, seed=np.arange(20)))
    expected = scipy.special.log_softmax(logits.astype(np.float64), -1)[np.arange(20), tokens]
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_logits_of_half_precision_are_sampled_in_float32():
    logits = random_logits(4).astype(jnp.bfloat16)
    _, logprobs = draw(logits, **rows(4))
    assert logprobs.dtype == jnp.float32
