import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.moe.placement import choose_slots, initial_placement, placement_of

# Expert 0 in slots 1, 3 and 4; expert 1 in slot 2; expert 2 in slots 0 and 5.
PLACEMENT = placement_of(np.array([[2, 0, 1, 0, 0, 2]]), 3)


def choose(experts, placement):
    """The slots that tokens of a rank are sent to in the first layer."""
    arrays = (np.asarray(experts, np.int32), placement.replica_slots[0], placement.replica_count[0])
    return np.asarray(choose_slots(*map(jnp.asarray, arrays)))


def test_replicas_take_turns_by_the_place_of_a_token_in_its_batch():
    experts = [[0, 1], [0, 2], [0, 2], [0, -1], [1, 2], [-1, -1]]
    assert choose(experts, PLACEMENT).tolist() == [[1, 2], [3, 5], [4, 0], [1, -1], [2, 0], [-1, -1]]


def test_the_choice_knows_of_experts_and_placement_and_of_nothing_else():
    # No key, no rank: ranks that route alike send alike.
    assert list(inspect.signature(choose_slots).parameters) == ["experts", "replica_slots", "replica_count"]
    experts = np.random.default_rng(0).integers(-1, 3, (40, 2))
    slots = choose(experts, PLACEMENT)
    np.testing.assert_array_equal(np.append(PLACEMENT.slot_expert[0], -1)[slots], experts)


@pytest.mark.parametrize(("experts", "slots"), [(4, 4), (4, 6), (3, 8), (8, 16)])
def test_slots_beyond_one_for_each_expert_hold_replicas_that_share_evenly(experts, slots):
    placement = initial_placement(2, experts, slots)
    assert placement.replica_count.min() == slots // experts
    assert placement.replica_count.max() == -(-slots // experts)
    replicas = placement.replica_count[0, 0]
    chosen = choose(np.zeros((5 * replicas, 1)), placement)
    assert np.unique(chosen, return_counts=True)[1].tolist() == [5] * replicas
