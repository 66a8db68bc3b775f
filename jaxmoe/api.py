"""The Python surface: a checkpoint as an object that answers."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from jaxmoe.demo import DEMO_MODEL
from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.model import Model
from jaxmoe.engine.request import SamplingParams
from jaxmoe.serving.tokenization import Tokenizer


class LoadedModel(Model):
    """A model on its mesh, with its tokenizer. `jaxmoe.Engine(model)` batches over it continuously."""

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError if the checkpoint has no tokenizer.json."""
        return Tokenizer.load(self.folder)

    @overload
    def generate(self, prompts: str, **params: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str], **params: Any) -> list[str]: ...

    def generate(self, prompts: str | Sequence[str], **params: Any) -> str | list[str]:
        """Continues one text or many together; `params` are fields of SamplingParams.

        Compiles what it needs on the way, so the first call takes seconds.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        answers: list[list[int]] = [[] for _ in texts]
        tokens = [self.tokenizer.encode(text) for text in texts]
        for output in self._engine.generate(tokens, SamplingParams(**params)):
            answers[int(output.request_id)] += output.token_ids
        decoded = [self.tokenizer.decode(answer) for answer in answers]
        return decoded[0] if isinstance(prompts, str) else decoded

    @functools.cached_property
    def _engine(self) -> Engine:
        return Engine(self, EngineConfig(warm_up=False))


def load(
    path: str | Path | None = None, mesh: str = "dp=1,ep=1", dtype: str = "float32", **options: Any
) -> LoadedModel:
    """Loads a checkpoint folder (None: the embedded demo model) onto a mesh, computing in `dtype`.

    options: `execution` and `progress` of `jaxmoe.engine.model.Model`.
    Raises CheckpointError, MeshError or ConfigError, each saying what to do.
    """
    return LoadedModel(DEMO_MODEL if path is None else path, mesh, dtype, **options)
