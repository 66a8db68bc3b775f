"""Published models: what they weigh, and how they are scaled down."""

import jax
import numpy as np
import pytest

from jaxmoe.engine.model import Model
from jaxmoe.errors import ConfigError
from jaxmoe.models.parameters import count_parameters
from jaxmoe.models.presets import PRESETS, read_preset
from jaxmoe.models.registry import family_of

# Billions of parameters: all, those a token meets, of these without the input embedding, of further prediction.
PUBLISHED = {
    "mixtral-8x7b": (46.70, 12.88, 12.75, 0),
    "mixtral-8x22b": (140.62, 39.15, 38.96, 0),
    "deepseek-v3": (671.03, 37.55, 36.63, 11.61),
    "kimi-k2": (1026.41, 32.86, 31.69, 0),
    "llama-4-scout": (107.77, 17.17, 16.14, 0),
    "llama-4-maverick": (400.71, 17.18, 16.15, 0),
}


@pytest.mark.parametrize("name", PRESETS)
def test_published_models_have_as_many_parameters_as_published(name):
    family = family_of(PRESETS[name])
    count = count_parameters(family, family.read_config(PRESETS[name]))
    billions = [count.total, count.active, count.active - count.embedding, count.mtp]
    assert [round(number / 1e9, 2) for number in billions] == list(PUBLISHED[name])


def test_scaling_divides_widths_and_keeps_how_experts_are_chosen():
    whole, scaled = PRESETS["deepseek-v3"], read_preset("deepseek-v3:scale=16,num_hidden_layers=6")
    for key in ("hidden_size", "moe_intermediate_size", "q_lora_rank", "vocab_size", "num_attention_heads"):
        assert scaled[key] == whole[key] // 16
    for key in ("n_routed_experts", "num_experts_per_tok", "n_group", "qk_rope_head_dim", "first_k_dense_replace"):
        assert scaled[key] == whole[key]
    assert scaled["num_hidden_layers"] == 6


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("scale", [1, 8, 64, 1000])
def test_every_scale_is_a_model(name, scale):
    hf = read_preset(f"{name}:scale={scale}")
    family_of(hf).read_config(hf)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gpt-4", "'gpt-4' is not a known model; use one of mixtral-8x7b"),
        ("mixtral-8x7b:16", "'16' is not of the form scale=N or key=N"),
        ("mixtral-8x7b:scale=0", "'scale=0' is not of the form scale=N or key=N"),
        ("mixtral-8x7b:layers=2", "'layers' is not scale or one of"),
    ],
)
def test_a_preset_that_cannot_be_read_is_told(text, told):
    with pytest.raises(ConfigError) as error:
        read_preset(text)
    assert told in str(error.value)


TINY = {
    "mixtral": "mixtral-8x7b:scale=128,num_hidden_layers=2,vocab_size=128",
    "deepseek-v3": "deepseek-v3:scale=128,num_hidden_layers=5,vocab_size=128,n_routed_experts=32,qk_nope_head_dim=16,"
    "v_head_dim=16",
    "llama4": "llama-4-maverick:scale=128,num_hidden_layers=4,vocab_size=128,num_local_experts=4,head_dim=16",
}


@pytest.mark.parametrize("preset", TINY.values(), ids=TINY.keys())
def test_random_weights_make_the_same_model_on_every_mesh(preset):
    tokens = np.arange(12).reshape(2, 6)
    alone = Model(None, random_weights=preset)
    spread = Model(None, "ep=6" if "mixtral" in preset else "dp=2,ep=3", random_weights=preset)
    expected = alone.logits(tokens)
    np.testing.assert_allclose(spread.logits(tokens), expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 0.5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(alone.params))


def test_a_model_has_one_source():
    with pytest.raises(ConfigError, match="either the folder of a checkpoint or a preset"):
        Model("folder", random_weights="mixtral-8x7b")
