"""The embedded models: found by name, small, and really trained."""

import numpy as np
import pytest

import jaxmoe
from jaxmoe.demo import DEMO_MODELS, find_model
from jaxmoe.errors import CheckpointError

TEXT = "And it came to pass, when the king heard the words of the man of God, that he "


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_an_embedded_model_is_small_and_whole(name):
    files = {file.name: file.stat().st_size for file in DEMO_MODELS[name].iterdir()}
    assert sum(files.values()) <= 9e6
    assert files.keys() >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_an_embedded_model_has_learned_its_language(name):
    model = jaxmoe.load(f"demo:{name}")
    tokens = model.tokenizer.encode(TEXT)
    logits = model.logits([tokens])[0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    cross_entropy = -np.mean(logprobs[np.arange(len(tokens) - 1), tokens[1:]])
    assert cross_entropy < 4.0  # of 8.3 for one that knows nothing
    answer = model.tokenizer.decode(model.greedy(tokens, 16))
    assert sum(word.isalpha() for word in answer.replace(",", " ").split()) >= 3


def test_prediction_of_the_token_after_next_agrees_with_the_main_model():
    model = jaxmoe.load("demo:deepseek-v3")
    tokens = np.array(model.tokenizer.encode(TEXT * 2))
    further, main = model.mtp_logits(tokens).argmax(-1), model.logits(tokens[None])[0, 1:].argmax(-1)
    assert np.mean(further == main) > 0.4


def test_models_are_found_by_name_or_path(tmp_path):
    assert find_model(None) == find_model("demo:mixtral") == DEMO_MODELS["mixtral"]
    assert find_model(str(tmp_path)) == find_model(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match="demo:gpt is not a demo model; use demo:mixtral or demo:deepseek-v3"):
        find_model("demo:gpt")
