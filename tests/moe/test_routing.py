"""Routers against a reading of their papers, one token at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.moe.routing import sigmoid_group_top_k, softmax_top_k, top_k_sigmoid

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(50, 12)).astype(np.float32)
ALL = jnp.ones(50, bool)


def sigmoid(x):
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def grouped_by_hand(scores, bias, k, groups, kept):
    """Experts of one token, best biased score first."""
    biased = scores + bias
    by_group = np.split(np.arange(len(scores)), groups)
    worth = [np.sort(biased[members])[-2:].sum() for members in by_group]
    allowed = np.concatenate([by_group[group] for group in np.argsort(worth)[-kept:]])
    return allowed[np.argsort(-biased[allowed])][:k]


@pytest.mark.parametrize(("k", "groups", "kept"), [(2, 4, 2), (3, 3, 1), (6, 2, 1), (4, 1, 1), (5, 6, 6), (1, 12, 3)])
@pytest.mark.parametrize(("normalise", "scale"), [(True, 2.5), (False, 1.0)])
def test_the_best_of_the_best_groups_are_chosen_by_biased_scores_and_weighed_without(k, groups, kept, normalise, scale):
    bias = RNG.normal(size=12).astype(np.float32)
    routing = sigmoid_group_top_k(jnp.asarray(LOGITS), jnp.asarray(bias), k, groups, kept, normalise, scale, ALL)
    for token, scores in enumerate(sigmoid(LOGITS)):
        experts = grouped_by_hand(scores, bias, k, groups, kept)
        weights = scores[experts] / (scores[experts].sum() if normalise else 1) * scale
        np.testing.assert_array_equal(routing.experts[token], experts)
        np.testing.assert_allclose(routing.weights[token], weights, atol=1e-6)


def test_an_expert_of_another_group_never_beats_one_of_negative_score():
    bias = jnp.full(4, -5.0)
    routing = sigmoid_group_top_k(jnp.array([[1.0, 0.0, 3.0, 2.0]]), bias, 2, 2, 1, True, 1.0, ALL[:1])
    np.testing.assert_array_equal(routing.experts, [[2, 3]])


@pytest.mark.parametrize("k", [1, 2, 12])
def test_the_largest_logits_are_chosen_each_with_its_own_sigmoid(k):
    routing = top_k_sigmoid(jnp.asarray(LOGITS), k, ALL)
    experts = np.argsort(-LOGITS, axis=-1)[:, :k]
    np.testing.assert_array_equal(routing.experts, experts)
    np.testing.assert_allclose(routing.weights, sigmoid(np.take_along_axis(LOGITS, experts, -1)), atol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_softmax_of_the_chosen_adds_up_to_one(k):
    routing = softmax_top_k(jnp.asarray(LOGITS), k, ALL)
    chosen = np.take_along_axis(LOGITS, np.asarray(routing.experts), -1).astype(np.float64)
    np.testing.assert_allclose(routing.weights, np.exp(chosen) / np.exp(chosen).sum(-1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize(
    "route",
    [
        lambda logits, valid: softmax_top_k(logits, 2, valid),
        lambda logits, valid: top_k_sigmoid(logits, 2, valid),
        lambda logits, valid: sigmoid_group_top_k(logits, jnp.zeros(12), 2, 4, 2, True, 2.5, valid),
    ],
)
def test_padding_goes_nowhere(route):
    valid = np.arange(50) % 3 > 0
    experts, weights = route(jnp.asarray(LOGITS), jnp.asarray(valid))
    assert (np.asarray(experts)[~valid] == -1).all()
    assert (np.asarray(weights)[~valid] == 0).all()
    assert (np.asarray(experts)[valid] >= 0).all()
