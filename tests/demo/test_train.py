import dataclasses

import chex
import jax
import numpy as np
import pytest

from jaxmoe.demo import train
from jaxmoe.demo.train import Phase, Recipe, Trainer, sample_windows
from jaxmoe.engine.model import Model

TINY = {
    "mixtral": {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "max_position_embeddings": 32,
    },
    "deepseek-v3": {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 12,
        "max_position_embeddings": 32,
    },
    "llama4": {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 16,
        "intermediate_size_mlp": 24,
        "num_local_experts": 4,
        "attention_chunk_size": 8,
        "max_position_embeddings": 32,
    },
}
RECIPE = Recipe(
    tokens=6 * 64,
    tokens_per_step=64,
    warmup_steps=1,
    phases=(Phase(0.5, 16, {"up": 0.5, "down": 0.5}), Phase(0.5, 32, {"up": 1.0})),
)


@pytest.fixture(scope="module")
def texts():
    """Two domains that a tiny model can learn to tell apart."""
    up = np.tile(np.arange(3, 33, dtype=np.uint16), 20)
    with pytest.MonkeyPatch.context() as patch:
        for family, tiny in TINY.items():
            patch.setitem(train.CONFIGS, family, {**train.CONFIGS[family], **tiny})
        yield {"up": up, "down": up[::-1].copy()}


@pytest.fixture(scope="module", params=TINY)
def trained(request, texts):
    """A trainer of each family after its last step, and the losses of all."""
    recipe = Recipe(tokens=60 * 64, tokens_per_step=64, peak_lr=0.02, phases=RECIPE.phases)
    trainer = Trainer(request.param, recipe, 0)
    return trainer, [float(trainer.train_step(texts)) for _ in range(60)]


def test_training_lowers_the_loss(trained):
    _, losses = trained
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_an_interrupted_run_goes_on_as_if_it_had_never_stopped(texts, tmp_path):
    whole = Trainer("mixtral", RECIPE, seed=1)
    for _ in range(3):
        whole.train_step(texts)
    whole.save(tmp_path / "state")
    resumed = Trainer("mixtral", RECIPE, seed=1)
    resumed.restore(tmp_path / "state")
    assert resumed.step == 3
    for _ in range(3):
        whole.train_step(texts)
        resumed.train_step(texts)
    chex.assert_trees_all_equal(resumed.params, whole.params)


def test_a_bias_moves_against_the_load_of_experts_and_no_other_way(texts):
    trainer = Trainer("deepseek-v3", dataclasses.replace(RECIPE, bias_step=0.5), seed=3)
    trainer.train_step(texts)
    # One mixture layer of the main model and one that predicts further; each bias went one step up, down or nowhere.
    bias = np.asarray(trainer.params["router_bias"])
    assert bias.shape == (2, 4)
    assert set(np.unique(bias)) <= {-0.5, 0.0, 0.5}
    assert np.abs(bias).max() == 0.5


def test_the_exported_checkpoint_loads_and_routes_as_it_was_trained(texts, trained, tmp_path):
    trainer, _ = trained
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    trainer.export(tmp_path / "out", tmp_path)
    model = Model(tmp_path / "out")
    window = sample_windows(texts, RECIPE.phases[0], 1, np.random.default_rng(0))
    logits = model.logits(window[:, :-1])[0]
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -np.mean(log_softmax[np.arange(16), window[0, 1:]])
    with jax.set_mesh(trainer.mesh):
        expected, loads = trainer._evaluate(trainer.params, window, trainer.placement)
    np.testing.assert_allclose(loss, expected, atol=0.02)  # the file is bfloat16
    config = trainer.config
    assert np.asarray(loads).sum() == len(config.stacks["moe"]) * 16 * config.experts_per_token
    if config.mtp_layers:
        assert model.mtp_logits(window[0, :-1]).shape == (15, 64)
