import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops import paged_attention
from jaxmoe.ops.attention import attention, causal_mask
from jaxmoe.spans import FULL, Span


def one_query_at_a_time(query, key, value, mask, scale):
    batch, length, heads, _ = query.shape
    out = np.zeros((batch, length, heads, value.shape[-1]))
    for b, t, h in np.ndindex(batch, length, heads):
        shared = h // (heads // key.shape[2])
        seen = np.flatnonzero(mask[b, t])
        scores = np.exp(scale * key[b, seen, shared].astype(np.float64) @ query[b, t, h])
        out[b, t, h] = scores / scores.sum() @ value[b, seen, shared]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_equals_one_query_at_a_time(kv_heads):
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.normal(size=shape).astype(np.float32) for shape in [(2, 5, 6, 8), (2, 7, kv_heads, 8), (2, 7, kv_heads, 4)]
    )
    mask = rng.random((2, 5, 7)) < 0.6
    mask[:, :, 3] = True
    out = attention(*map(jnp.asarray, (query, key, value, mask)), 0.3)
    np.testing.assert_allclose(out, one_query_at_a_time(query, key, value, mask, 0.3), atol=1e-5)


def test_a_query_that_sees_nothing_gives_finite_numbers():
    out = attention(
        jnp.ones((1, 1, 2, 4)), jnp.ones((1, 3, 1, 4)), jnp.ones((1, 3, 1, 4)), jnp.zeros((1, 1, 3), bool), 1.0
    )
    assert np.isfinite(out).all()


def test_a_masked_value_however_large_never_counts():
    value = jnp.array([1.0, 3e38]).reshape(1, 2, 1, 1)
    mask = jnp.array([[[True, False]]])
    out = attention(jnp.ones((1, 1, 1, 1)), jnp.ones((1, 2, 1, 1)), value, mask, 1.0)
    assert out.item() == 1


def test_a_query_sees_its_own_and_earlier_positions():
    mask = causal_mask(jnp.array([[0, 2]]), jnp.array([[0, 1, 2, 3]]))
    np.testing.assert_array_equal(mask, [[[1, 0, 0, 0], [1, 1, 1, 0]]])


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_a_window_of_w_sees_w_keys_with_the_query_s_own(window):
    positions = jnp.arange(10)[None]
    seen = np.asarray(causal_mask(positions, positions, Span("window", window)))[0]
    np.testing.assert_array_equal(seen.sum(-1), np.minimum(np.arange(10) + 1, window))
    assert seen.diagonal().all()


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_a_chunk_is_a_block_whose_first_position_sees_only_itself(size):
    positions = jnp.arange(10)[None]
    seen = np.asarray(causal_mask(positions, positions, Span("chunk", size)))[0]
    np.testing.assert_array_equal(seen.sum(-1), np.arange(10) % size + 1)
    assert seen.diagonal().all()


@pytest.mark.parametrize("span", [FULL, Span("window", 4), Span("chunk", 4)], ids=str)
def test_a_span_says_on_the_host_what_the_mask_says_on_the_device(span):
    positions = jnp.arange(13)[None]
    seen = np.asarray(causal_mask(positions, positions, span))[0]
    assert [span.first(position) for position in range(13)] == seen.argmax(-1).tolist()
    for tokens in (1, 3):
        most = max(start + tokens - span.first(start) for start in range(13 - tokens))
        assert span.reach(tokens) is None or most <= span.reach(tokens)


def test_padding_is_seen_by_nobody_and_sees_nothing():
    mask = np.asarray(causal_mask(jnp.array([[0, 1, -1]]), jnp.array([[0, 1, -1]])))[0]
    assert not mask[:, 2].any()
    assert not mask[2].any()


def test_room_behind_what_a_cache_holds_changes_nothing():
    rng = np.random.default_rng(0)
    entries, key_value, absorbed, expanded = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in [(2, 5, 12), (1, 8, 3, 13), (2, 5, 3, 12), (2, 5, 3, 11)]
    )
    positions = jnp.arange(5)[None] + jnp.zeros((2, 1), jnp.int32)
    where = paged_attention.Where(1, jnp.asarray([[3, 0], [1, 2]]), jnp.zeros(2, jnp.int32))

    def attended(width):
        pages = paged_attention.write((jnp.full((2, 4, 4, width), 3.0),), (entries,), positions, where)
        return (
            paged_attention.attend(absorbed, positions, pages, where, 0.3, FULL, 8),
            paged_attention.attend_latent(expanded, positions, *pages, where, key_value, 0, 0.3, FULL, 6),
        )

    for exact, with_room in zip(attended(12), attended(16), strict=True):
        np.testing.assert_allclose(exact, with_room, atol=1e-6)
