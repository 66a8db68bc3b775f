"""What is planned: a model on a mesh, served within limits. Everything else here is a function of it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxmoe.engine.batch import Grid, Packing, StepShape
from jaxmoe.engine.config import EngineConfig
from jaxmoe.errors import ConfigError
from jaxmoe.models.config import ModelConfig, rules_for, split_sizes
from jaxmoe.models.decoder import Decoder, Execution
from jaxmoe.models.parameters import Parameter, ParameterCount, count_parameters, list_parameters
from jaxmoe.models.registry import family_of
from jaxmoe.moe.strategy import Mixture, Strategy, choose
from jaxmoe.sharding.mesh import MeshSpec, slots_for
from jaxmoe.sharding.rules import Rules


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model by name, before it lies anywhere. dtype: what it computes in, and what its weights and KV are kept in."""

    name: str
    family: type[Decoder]
    config: ModelConfig
    dtype: jnp.dtype

    @classmethod
    def read(cls, name: str, hf: Mapping[str, Any], dtype: str) -> "Subject":
        """hf: `config.json`. Raises CheckpointError."""
        family = family_of(hf)
        return cls(name, family, family.read_config(hf), jnp.dtype(dtype))

    @functools.cached_property
    def parameters(self) -> dict[str, Parameter]:
        return list_parameters(self.family, self.config, self.dtype)

    @functools.cached_property
    def count(self) -> ParameterCount:
        return count_parameters(self.family, self.config)


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A model on a mesh. limits: per attention rank; `max_context` is what every sequence is taken to have.

    Raises MeshError if `tp` divides nothing, ConfigError if the context is beyond the model.
    """

    subject: Subject
    spec: MeshSpec
    limits: EngineConfig
    execution: Execution = Execution()  # noqa: RUF009 - frozen
    redundant_experts: int = 0

    def __post_init__(self) -> None:
        most = self.config.max_position
        if self.context > most:
            raise ConfigError(f"context={self.context} is beyond the model's {most} positions; use at most {most}")
        if self.redundant_experts < 0:
            raise ConfigError(f"redundant_experts={self.redundant_experts} must not be negative")
        assert self.rules.spec == self.spec

    @property
    def config(self) -> ModelConfig:
        return self.subject.config

    @property
    def itemsize(self) -> int:
        return self.subject.dtype.itemsize

    @property
    def context(self) -> int:
        return self.limits.max_context or self.config.max_position

    @property
    def sequences(self) -> int:
        """That decode at once, over all ranks."""
        return self.limits.max_batch * self.spec.num_ranks

    @functools.cached_property
    def rules(self) -> Rules:
        return rules_for(self.config, self.spec)

    @property
    def whole(self) -> set[str]:
        """Axes that `tp` might split and leaves whole."""
        return set(split_sizes(self.config)) - self.rules.split if self.spec.tp > 1 else set()

    @functools.cached_property
    def slots(self) -> int:
        return slots_for(self.config.experts, self.spec, self.redundant_experts)

    @functools.cached_property
    def packing(self) -> Packing:
        return Packing(self.config.spans, self.limits.page_size, self.limits.max_batch)

    @functools.cached_property
    def shapes(self) -> tuple[StepShape, ...]:
        """Of every program that a server compiles."""
        return tuple(Grid(self.limits, self.context, self.packing))

    @property
    def decode(self) -> StepShape:
        """A full batch, all at full context."""
        return max(shape for shape in self.shapes if shape.tokens == 1)

    @property
    def prefill(self) -> StepShape:
        """As much of one prompt as a step takes, at its end."""
        return max((shape for shape in self.shapes), key=lambda shape: (shape.tokens, shape.pages))

    def mixture(self, shape: StepShape) -> Mixture:
        """Of each mixture layer in the program of this shape."""
        return Mixture(
            shape.batch * shape.tokens,
            self.config.width,
            self.config.experts_per_token,
            self.spec.expert_devices,
            self.itemsize,
            self.execution.capacity_factor,
        )

    def strategy(self, shape: StepShape) -> Strategy:
        return choose(self.execution.strategy, self.mixture(shape), self.execution.platform)

    def on(self, spec: MeshSpec) -> "Deployment":
        """As many sequences in all on another mesh."""
        batch = -(-self.sequences // spec.num_ranks)
        return dataclasses.replace(self, spec=spec, limits=dataclasses.replace(self.limits, max_batch=batch))
