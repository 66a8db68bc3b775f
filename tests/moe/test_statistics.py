"""Loads are counted on the devices, padding excluded, and summed up to what an operator can act on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.moe.exchange import _destinations
from jaxmoe.moe.placement import initial_placement, placement_of
from jaxmoe.moe.statistics import BLOCK, Exchange, LoadStatistics, balancedness, count_loads, noise_ceiling
from jaxmoe.moe.strategy import Mixture, sent_bytes
from jaxmoe.sharding.mesh import MeshSpec, make_mesh

RANKS, LAYERS, TOKENS, CHOICES, SLOTS, DEVICES, EXPERTS = 8, 3, 10, 2, 12, 4, 8
SHAPE = Mixture(TOKENS, 16, CHOICES, DEVICES, 4, capacity_factor=0.5)


def counted(slots):
    with jax.set_mesh(make_mesh(MeshSpec(dp=2, ep=4))):
        placed = jax.device_put(slots, jax.NamedSharding(jax.sharding.get_mesh(), jax.P(None, ("dp", "ep"))))
        return np.asarray(jax.jit(count_loads, static_argnums=(1, 2))(placed, SLOTS, DEVICES))


@pytest.fixture
def slots():
    """[L, R, N, K], distinct within a token; the last rows of every rank are padding."""
    rng = np.random.default_rng(0)
    chosen = rng.permuted(np.tile(np.arange(SLOTS), (LAYERS, RANKS, TOKENS, 1)), axis=-1)[..., :CHOICES]
    return np.where(np.arange(TOKENS)[:, None] < 7, chosen, -1).astype(np.int32)


def statistics(strategy="all_to_all", **options):
    return LoadStatistics(EXPERTS, 2, DEVICES, lambda tokens: Exchange(strategy, SHAPE), **options)


def test_counts_are_those_of_every_token_that_is_not_padding(slots):
    counts = counted(slots)
    assert counts.shape == (RANKS, LAYERS, SLOTS + DEVICES)
    assert counts[..., :SLOTS].sum() == (slots >= 0).sum()
    for rank in range(RANKS):
        for layer in range(LAYERS):
            of_rank = slots[layer, rank]
            assert counts[rank, layer, :SLOTS].tolist() == np.bincount(of_rank[of_rank >= 0], minlength=SLOTS).tolist()
            # A row for every device that a token goes to, as the exchange queues them.
            lanes = np.asarray(_destinations(jnp.asarray(of_rank), DEVICES, SLOTS // DEVICES))
            waiting = np.bincount(lanes.ravel(), minlength=DEVICES + 1)[:DEVICES]
            assert counts[rank, layer, SLOTS:].tolist() == waiting.tolist()


def test_loads_come_back_by_logical_expert_and_by_device_of_every_copy(slots):
    placement = placement_of(np.array([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 0, 2]] * LAYERS)[:, ::-1], EXPERTS)
    counts, of = counted(slots), statistics()
    for _ in range(3):
        of.record(counts, placement.slot_expert, TOKENS)
    for layer in range(LAYERS):
        experts = placement.slot_expert[layer][slots[layer][slots[layer] >= 0]]
        assert of.experts()[layer].tolist() == (3 * np.bincount(experts, minlength=EXPERTS)).tolist()
        for copy in range(2):
            device = slots[layer, 4 * copy : 4 * copy + 4] // (SLOTS // DEVICES)
            expected = 3 * np.bincount(device[device >= 0], minlength=DEVICES)
            assert of.devices()[copy, layer].tolist() == expected.tolist()
    np.testing.assert_allclose(of.average(), of.experts() / 3)
    report = of.report()
    assert report.assignments == 3 * (slots >= 0).sum()
    assert report.balancedness == pytest.approx(balancedness(of.devices()))
    most = counts[..., SLOTS:].max(axis=(0, 2))
    rounds = np.ceil(most / SHAPE.capacity)
    assert (report.rounds, report.most_rounds) == (pytest.approx(rounds.mean()), rounds.max())
    assert rounds.max() > 1
    fullest, even = of.calls()
    assert fullest.tolist() == 3 * [(of.devices() // 3).max(axis=(0, 2)).tolist()]
    assert even.tolist() == 3 * [(slots[0] >= 0).sum() / (2 * DEVICES)]
    assert report.exchanged_bytes == 3 * RANKS * sum(sum(sent_bytes("all_to_all", SHAPE, int(n))) for n in rounds)


def test_balancedness_is_the_mean_over_layers_of_mean_over_fullest_device():
    assert balancedness(np.array([[100, 0, 0, 0], [100, 0, 0, 0]])) == 0.25
    assert balancedness(np.array([[4, 4], [1, 3], [0, 0]])) == pytest.approx((1 + 2 / 3) / 2)
    assert balancedness(np.zeros((2, 4))) == 1.0


@pytest.mark.parametrize(
    ("each", "devices", "expected"),
    [(8, 4, 0.740), (64, 8, 0.848), (256, 32, 0.884), (1024, 64, 0.930), (4096, 144, 0.960)],
)
def test_the_noise_ceiling_is_what_even_routing_reaches(each, devices, expected):
    # Between powers of two it is interpolated, and where devices are many drawn fewer times.
    assert noise_ceiling(np.array([each * devices]), devices) == pytest.approx(expected, abs=0.006)


def test_the_worst_layer_is_told_and_what_placement_could_still_win():
    of, slot_expert = statistics(), initial_placement(2, EXPERTS, 8).slot_expert
    counts = np.zeros((RANKS, 2, 8 + DEVICES), np.int32)
    counts[:, 0, :8], counts[:, 1, 0] = 512, 4096
    of.record(counts, slot_expert, TOKENS)
    report = of.report()
    assert (report.worst_layer, report.worst_balancedness) == (1, 0.25)
    assert report.balancedness == report.long_run == pytest.approx(0.625)
    assert report.ceiling > 0.97
    assert report.of_ceiling == pytest.approx(0.625 / report.ceiling)


def test_the_window_forgets_and_the_average_fades():
    of, slot_expert = statistics(window=2 * BLOCK, half_life=BLOCK), initial_placement(1, EXPERTS, 8).slot_expert
    assert of.report() is None
    assert of.calls().fullest.size == 0
    early, late = (np.zeros((RANKS, 1, 8 + DEVICES), np.int32) for _ in range(2))
    early[0, 0, 3], late[0, 0, 5] = 1, 1
    for counts, calls in ((early, 3 * BLOCK), (late, 2 * BLOCK)):
        for _ in range(calls):
            of.record(counts, slot_expert, TOKENS)
            of.settle()
    assert of.experts().tolist() == [[0, 0, 0, 0, 0, 2 * BLOCK, 0, 0]]
    assert of.average()[0, 3] / of.average()[0, 5] == pytest.approx((1 / 4 - 1 / 32) / (1 - 1 / 4))
    assert of.average().sum() == pytest.approx(1)
    average = of.average()
    of.restart()
    assert of.report() is None
    np.testing.assert_array_equal(of.average()[: len(average)], average)


def test_loads_counted_under_different_placements_are_told_apart():
    of, first = statistics(), initial_placement(1, EXPERTS, 8).slot_expert
    counts = np.zeros((RANKS, 1, 8 + DEVICES), np.int32)
    counts[0, 0, 0] = 1
    of.record(counts, first, TOKENS)
    of.record(counts, first[:, ::-1].copy(), TOKENS)
    assert of.experts().tolist() == [[1, 0, 0, 0, 0, 0, 0, 1]]
