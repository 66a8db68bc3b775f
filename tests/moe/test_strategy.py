import numpy as np
import pytest

from jaxmoe.errors import ConfigError
from jaxmoe.moe.strategy import LINKS, Mixture, check_strategy, choose, num_collectives, seconds, sent_bytes

DEEPSEEK = Mixture(tokens=128, width=7168, choices=8, devices=32, itemsize=2)


def mixture(**changes):
    return DEEPSEEK._replace(**changes)


@pytest.mark.parametrize("platform", LINKS)
def test_auto_takes_what_the_rule_says_is_the_fastest(platform):
    for tokens in (1, 4, 16, 64, 256, 4096):
        for devices in (2, 8, 32, 128):
            shape = mixture(tokens=tokens, devices=devices)
            taken = choose("auto", shape, platform)
            names = ["replicate", "all_to_all"] + ["ragged_all_to_all"] * (platform != "cpu")
            assert taken in names
            assert all(
                seconds(taken, shape, LINKS[platform]) <= seconds(each, shape, LINKS[platform]) for each in names
            )


def test_few_tokens_are_gathered_and_many_travel():
    assert choose("auto", mixture(tokens=1), "cpu") == "replicate"
    assert choose("auto", mixture(tokens=4096), "cpu") == "all_to_all"


def test_what_goes_everywhere_anyway_is_gathered():
    # Eight choices of two devices: nearly every token goes to both.
    assert choose("auto", mixture(tokens=4096, devices=2), "cpu") == "replicate"


def test_a_strategy_that_is_asked_for_is_taken():
    assert choose("dense", DEEPSEEK, "cpu") == "dense"
    assert choose("all_to_all", mixture(tokens=1), "tpu") == "all_to_all"


def test_one_device_exchanges_nothing():
    alone = mixture(devices=1)
    assert choose("auto", alone, "gpu") == "replicate"
    assert num_collectives("replicate", alone) == 0
    assert sent_bytes("replicate", alone) == (0, 0)


def test_the_mean_queue_is_that_of_independent_choices():
    rng = np.random.default_rng(0)
    devices = rng.integers(0, 32, (100_000, 8))
    reached = (devices[:, :, None] == np.arange(32)).any(axis=1).mean()
    assert abs(DEEPSEEK.mean_queue / DEEPSEEK.tokens - reached) < 1e-3


@pytest.mark.parametrize(("tokens", "factor", "capacity", "rounds"), [
    (128, 2.0, 58, 3), (128, 1e-9, 4, 32), (128, 100.0, 128, 1), (3, 2.0, 3, 1), (1, 0.1, 1, 1)
])  # fmt: skip
def test_capacity_lies_between_a_few_rows_and_the_batch(tokens, factor, capacity, rounds):
    shape = mixture(tokens=tokens, capacity_factor=factor)
    assert (shape.capacity, shape.most_rounds) == (capacity, rounds)


def test_a_capacity_of_the_batch_needs_no_agreement_on_rounds():
    assert num_collectives("all_to_all", mixture(capacity_factor=100.0)) == 2
    assert num_collectives("all_to_all", DEEPSEEK) == 3
    assert num_collectives("all_to_all", DEEPSEEK, rounds=3) == 7


def test_bytes_are_those_of_rows_with_their_slots_and_weights():
    to, back = DEEPSEEK.row_bytes
    assert (to, back) == (7168 * 2 + 8 * 8, 7168 * 2)
    assert sent_bytes("replicate", DEEPSEEK) == (31 * 128 * to, 31 * 128 * back)
    assert sent_bytes("all_to_all", DEEPSEEK, rounds=2) == (31 * 58 * 2 * to, 31 * 58 * 2 * back)
    assert sent_bytes("ragged_all_to_all", DEEPSEEK) == (31 * 29 * to, 31 * 29 * back)
    with pytest.raises(ValueError, match="strategy='dense' sends no rows"):
        sent_bytes("dense", DEEPSEEK)


def test_strategies_that_cannot_run_are_told():
    check_strategy("ragged_all_to_all", "tpu")
    with pytest.raises(ConfigError, match="'ragged_all_to_all' is not implemented on cpu; use all_to_all"):
        check_strategy("ragged_all_to_all", "cpu")
    with pytest.raises(ConfigError, match="dispatch='none' is not one of auto, dense"):
        check_strategy("none", "tpu")
