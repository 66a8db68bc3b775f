"""The Python surface: a checkpoint as an object that answers."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from jaxmoe.demo import find_model
from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.model import Model
from jaxmoe.engine.request import SamplingParams
from jaxmoe.errors import CheckpointError, InvalidRequestError
from jaxmoe.serving.tokenization import Tokenizer

# Of the engine behind `generate` and `greedy`: a notebook has few requests at once, and a model's own limit may be
# millions of positions.
NOTEBOOK_BATCH, NOTEBOOK_CONTEXT = 4, 32768


class LoadedModel(Model):
    """A model on its mesh, with its tokenizer. `jaxmoe.Engine(model)` batches over it continuously."""

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError if the checkpoint has no tokenizer.json."""
        if self.folder is None:
            raise CheckpointError("a model of random weights has no tokenizer; use token ids")
        return Tokenizer.load(self.folder)

    @overload
    def generate(self, prompts: str, **params: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str], **params: Any) -> list[str]: ...

    def generate(self, prompts: str | Sequence[str], **params: Any) -> str | list[str]:
        """Continues one text or many together; `params` are fields of SamplingParams.

        Compiles what it needs on the way, so the first call takes seconds. Raises InvalidRequestError for `n`.
        """
        if params.get("n", 1) != 1:
            raise InvalidRequestError(f"n={params['n']}: repeat the prompt, or use jaxmoe.Engine for samples", "n")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        answers: list[list[int]] = [[] for _ in texts]
        tokens = [self.tokenizer.encode(text) for text in texts]
        for output in self._engine.generate(tokens, SamplingParams(**params)):
            answers[int(output.request_id)] += output.token_ids
        decoded = [self.tokenizer.decode(answer) for answer in answers]
        return decoded[0] if isinstance(prompts, str) else decoded

    def greedy(self, token_ids: Sequence[int], count: int) -> list[int]:
        """The `count` most likely tokens after these, one after the other; an end of text does not end them."""
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        outputs = self._engine.generate([[int(token) for token in token_ids]], params)
        return [token for output in outputs for token in output.token_ids]

    @functools.cached_property
    def _engine(self) -> Engine:
        context = min(self.config.max_position, NOTEBOOK_CONTEXT)
        return Engine(self, EngineConfig(max_batch=NOTEBOOK_BATCH, max_context=context, warm_up=False))


def load(
    path: str | Path | None = None,
    mesh: str = "dp=1,ep=1",
    dtype: str = "float32",
    *,
    random_weights: str | None = None,
    **options: Any,
) -> LoadedModel:
    """Loads a checkpoint onto a mesh, computing in `dtype`.

    path: a folder, `demo:mixtral`, `demo:deepseek-v3` or `demo:llama4`; None is the first of these.
    random_weights: instead of a checkpoint a published model with weights drawn at random, scaled down as told:
        "deepseek-v3:scale=16,num_hidden_layers=6" (`jaxmoe.models.presets.read_preset`).
    options: of `jaxmoe.engine.model.Model`: `expert_axes`, `redundant_experts`, `execution`, `progress`.
    Raises CheckpointError, MeshError or ConfigError, each saying what to do.
    """
    folder = find_model(path) if random_weights is None else None
    return LoadedModel(folder, mesh, dtype, random_weights=random_weights, **options)
