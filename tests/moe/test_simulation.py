"""Simulated routing sends tokens where its distribution says, and its effect is measured, not its shape."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.errors import ConfigError
from jaxmoe.moe.simulation import Recorder, Simulation, inclusion, simulated_routing

LAYERS, EXPERTS, K, ROWS, RANKS, CALLS = 2, 8, 2, 64, 2, 12


def routed(simulation, calls=CALLS, valid=None):
    """Experts [calls, L, R, N, K] of as many calls."""
    valid = jnp.ones(ROWS, bool) if valid is None else valid
    run = jax.jit(lambda *args: simulated_routing(*args, K, valid).experts)
    return np.array(
        [
            [[run(drawn, jnp.int32(layer), jnp.int32(rank)) for rank in range(RANKS)] for layer in range(LAYERS)]
            for drawn in (simulation.next(ROWS * RANKS) for _ in range(calls))
        ]
    )


def test_inclusion_is_that_of_drawing_one_after_the_other():
    shares = np.array([0.5, 0.2, 0.2, 0.07, 0.03])
    for k in (1, 2, 3):
        expected = np.zeros(5)
        for order in itertools.permutations(range(5), k):
            left, chance = 1.0, 1.0
            for item in order:
                chance *= shares[item] / left
                left -= shares[item]
            expected[list(order)] += chance
        np.testing.assert_allclose(inclusion(shares, k), expected, atol=1e-4)


@pytest.mark.parametrize("text", ["uniform", "normal", "zipf:1.2", "hot:2,0.8", "drift:1.5,1000000"])
def test_loads_are_those_that_are_expected(text):
    simulation = Simulation(text, LAYERS, EXPERTS, K)
    expected = simulation.expected()
    np.testing.assert_allclose(expected.sum(axis=1), K)
    experts = routed(simulation)
    assert (experts[..., 0] != experts[..., 1]).all()
    tokens = CALLS * RANKS * ROWS
    for layer in range(LAYERS):
        found = np.bincount(experts[:, layer].ravel(), minlength=EXPERTS)
        deviation = np.sqrt(tokens * expected[layer] * (1 - expected[layer]))
        assert (abs(found - tokens * expected[layer]) < 4.5 * deviation + 1).all()


def test_distributions_are_as_described():
    normal = Simulation("normal", 1, 8, 2).probabilities()[0]
    np.testing.assert_allclose(normal, [0.0258, 0.1101, 0.1688, 0.1953, 0.1953, 0.1688, 0.1101, 0.0258], atol=1e-4)
    zipf = Simulation("zipf:1", LAYERS, 4, 1).probabilities()
    for row in zipf:
        np.testing.assert_allclose(sorted(row), np.array([1 / 4, 1 / 3, 1 / 2, 1]) / (25 / 12))
    hot = Simulation("hot:2,0.8", LAYERS, EXPERTS, K).probabilities()
    assert np.sort(hot, axis=1)[:, -2:] == pytest.approx(0.4)
    assert Simulation("uniform", 1, 8, 2).expected() == pytest.approx(0.25)


def test_a_drift_goes_from_one_ranking_to_the_next():
    simulation = Simulation("drift:1.5,160", LAYERS, EXPERTS, K)
    early, middle, late = (simulation.probabilities(call) for call in (0, 80, 160))
    assert not np.allclose(early, late)
    np.testing.assert_allclose(middle, (early + late) / 2)
    first = simulation.next(1)
    assert simulation.next(1).scores is first.scores
    for _ in range(200):
        last = simulation.next(1)
    assert not np.allclose(last.scores, first.scores)


def test_the_same_call_draws_the_same_and_no_two_draw_alike():
    experts = routed(Simulation("uniform", LAYERS, EXPERTS, K), 2)
    np.testing.assert_array_equal(experts, routed(Simulation("uniform", LAYERS, EXPERTS, K), 2))
    parts = experts.reshape(2 * LAYERS * RANKS, -1)
    assert len(np.unique(parts, axis=0)) == len(parts)


def test_padding_is_routed_nowhere():
    experts = routed(Simulation("uniform", LAYERS, EXPERTS, K), 1, jnp.arange(ROWS) < 3)
    assert (experts[..., :3, :] >= 0).all()
    assert (experts[..., 3:, :] == -1).all()


def test_what_was_recorded_is_replayed(tmp_path):
    rng = np.random.default_rng(0)
    recorder = Recorder(most=200)
    given = []
    for _ in range(5):
        experts = rng.permuted(np.tile(np.arange(EXPERTS), (LAYERS, RANKS, 30, 1)), axis=-1)[..., :K]
        experts[:, :, 25:] = -1
        recorder.record(experts)
        given += [experts[:, rank, row] for rank in range(RANKS) for row in range(25)]
    recorder.save(tmp_path / "trace.npz")
    assert recorder.num_tokens == 200
    simulation = Simulation(f"trace:{tmp_path / 'trace.npz'}", LAYERS, EXPERTS, K)
    replayed = np.moveaxis(routed(simulation, 2), 1, 3).reshape(-1, LAYERS, K)
    np.testing.assert_array_equal(replayed, [given[row % 200] for row in range(2 * RANKS * ROWS)])
    counts = np.bincount(np.array(given[:200])[:, 1].ravel(), minlength=EXPERTS)
    np.testing.assert_allclose(simulation.expected()[1], counts / 200)
    for shape in ((1, EXPERTS, K), (LAYERS, 4, K), (LAYERS, EXPERTS, 1)):
        with pytest.raises(ConfigError, match="the model has"):
            Simulation(simulation.text, *shape)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("zipf", "is not one of uniform, normal, zipf:S"),
        ("zipf:a", "is not one of"),
        ("skewed:1", "is not one of"),
        ("uniform:1", "is not one of"),
        ("hot:9,0.5", "N must be between 1 and the 8 experts"),
        ("hot:1,1", "tokens have 2 experts each"),
        ("drift:1,0", "CALLS must be at least 1"),
        ("trace:nowhere.npz", "nowhere.npz cannot be read"),
    ],
)
def test_what_cannot_be_simulated_is_told(text, told):
    with pytest.raises(ConfigError, match=told):
        Simulation(text, LAYERS, EXPERTS, K)
