"""An engine counts what its steps route: every token once a layer and choice, padding never."""

import numpy as np
import pytest

from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.model import Model
from jaxmoe.engine.request import SamplingParams
from jaxmoe.errors import ConfigError
from jaxmoe.models.decoder import Execution
from jaxmoe.moe.simulation import Simulation

PRESET = "mixtral-8x7b:scale=128,num_hidden_layers=2,vocab_size=128,num_attention_heads=4,num_key_value_heads=2"
LIMITS = EngineConfig(
    page_size=8, max_batch=4, max_context=64, max_prefill_tokens=16, max_prefill_sequences=2, warm_up=False
)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPTS = [list(range(start, start + length)) for start, length in ((5, 20), (40, 3), (3, 9))]


def served(mesh, **options):
    model = Model(None, mesh, random_weights=PRESET, **options)
    engine = Engine(model, LIMITS)
    list(engine.generate(PROMPTS, GREEDY))
    return engine


def test_every_token_counts_once_a_layer_and_choice_and_the_same_on_every_mesh():
    alone = served("dp=1,ep=1").statistics
    routed = sum(len(prompt) + GREEDY.max_tokens - 1 for prompt in PROMPTS)
    assert alone.experts().sum(axis=1).tolist() == [routed * 2] * 2
    for mesh, axes, shape in (("dp=2,ep=4", "ep", (2, 2, 4)), ("dp=2,ep=2", "dp,ep", (1, 2, 4))):
        spread = served(mesh, expert_axes=axes, redundant_experts=4).statistics
        np.testing.assert_array_equal(spread.experts(), alone.experts())
        assert spread.devices().shape == shape
        assert spread.devices().sum(axis=(0, 2)).tolist() == [routed * 2] * 2
        assert 0 < spread.report().balancedness < 1


def test_one_device_is_always_in_balance():
    report = served("dp=1,ep=1").statistics.report()
    assert (report.balancedness, report.of_ceiling, report.most_rounds, report.exchanged_bytes) == (1, 1, 1, 0)


def test_before_the_first_step_there_is_nothing_to_report():
    engine = Engine(Model(None, random_weights=PRESET), LIMITS)
    engine.step()
    assert engine.statistics.report() is None
    assert engine.statistics.experts().shape == (0, 8)


def test_simulated_routing_takes_the_real_path_and_says_so():
    engine = served("dp=2,ep=2", simulate_routing="zipf:2", redundant_experts=2)
    assert "outputs are invalid: routing is simulated (zipf:2)" in engine.model.describe()
    tokens = sum(len(prompt) + GREEDY.max_tokens - 1 for prompt in PROMPTS)
    expected = Simulation("zipf:2", 2, 8, 2).expected()
    deviation = np.sqrt(tokens * expected * (1 - expected))
    assert (abs(engine.statistics.experts() - tokens * expected) < 4.5 * deviation + 1).all()
    assert engine.statistics.experts().sum() == 2 * 2 * tokens


def test_recorded_routing_is_that_of_the_tokens_and_can_be_replayed(tmp_path):
    path = tmp_path / "trace.npz"
    engine = served("dp=1,ep=1", execution=Execution(record_routing=True))
    engine.save_routing(path)
    recorded = np.load(path)["experts"]
    for layer in range(2):
        counts = np.bincount(recorded[:, layer].ravel(), minlength=8)
        np.testing.assert_array_equal(counts, engine.statistics.experts()[layer])
    again = served("dp=1,ep=1", simulate_routing=f"trace:{path}")
    assert again.statistics.experts().sum() == engine.statistics.experts().sum()
    with pytest.raises(ConfigError, match="start it with --record-routing"):
        again.save_routing(path)
