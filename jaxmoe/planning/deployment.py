"""What is planned: a model on a mesh, served within limits. Everything else here is a function of it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxmoe.engine.batch import Grid, Packing, StepShape
from jaxmoe.engine.config import EngineConfig, Rebalance
from jaxmoe.engine.model import EXPERT_WEIGHTS
from jaxmoe.errors import ConfigError
from jaxmoe.models.config import LayerKind, ModelConfig, rules_for, split_sizes
from jaxmoe.models.decoder import Decoder, Execution
from jaxmoe.models.parameters import Parameter, ParameterCount, count_parameters, list_parameters
from jaxmoe.models.registry import family_of
from jaxmoe.moe.balancing import check_room
from jaxmoe.moe.strategy import Mixture, Strategy, choose
from jaxmoe.sharding.mesh import MeshSpec, slots_for
from jaxmoe.sharding.rules import Rules


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model by name, before it lies anywhere.

    dtype: what it computes in, and what its weights and KV are kept in. expert_dtype: what the experts' are, if not in
        that.
    """

    name: str
    family: type[Decoder]
    config: ModelConfig
    dtype: jnp.dtype
    expert_dtype: jnp.dtype | None = None

    @classmethod
    def read(cls, name: str, hf: Mapping[str, Any], dtype: str, expert_weights: str = "same") -> "Subject":
        """hf: `config.json`. expert_weights: as `Model` takes it. Raises CheckpointError."""
        family, kept = family_of(hf), EXPERT_WEIGHTS[expert_weights]
        config = family.read_config(hf)
        return cls(name, family, config, jnp.dtype(dtype), jnp.dtype(kept) if kept and config.stacks["moe"] else None)

    @functools.cached_property
    def parameters(self) -> dict[str, Parameter]:
        return list_parameters(self.family, self.config, self.dtype, self.expert_dtype)

    @functools.cached_property
    def count(self) -> ParameterCount:
        return count_parameters(self.family, self.config)


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A model on a mesh. limits: per attention rank; `max_context` is what every sequence is taken to have.

    Raises MeshError if `tp` divides nothing, ConfigError for what a server would refuse too: a context beyond the
    model, drafts without a layer for them, experts to be moved that there are not, or not slots enough for.
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
        if self.limits.speculate and not self.config.mtp_layers:
            raise ConfigError(
                f"speculate={self.limits.speculate!r} needs a layer for multi-token prediction, which "
                f"{self.subject.name} does not have; leave it out"
            )
        if self.limits.rebalance:
            self._check_rebalance(self.limits.rebalance)
        assert self.rules.spec == self.spec

    def _check_rebalance(self, rebalance: Rebalance) -> None:
        if not self.config.stacks["moe"]:
            raise ConfigError(f"{self.subject.name} has no experts to move")
        check_room(self.config.experts, self.slots, self.spec.expert_devices, rebalance.devices_at_least)

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
        """A full batch, all at full context, with a draft each where steps draft."""
        return max(shape for shape in self.shapes if shape.decodes)

    @property
    def prefill(self) -> StepShape:
        """As much of one prompt as a step takes, at its end."""
        return max((shape for shape in self.shapes if not shape.decodes), key=lambda shape: (shape.tokens, shape.pages))

    def kinds(self, drafts: bool) -> tuple[LayerKind, ...]:
        """Of the layers that a forward pass goes through, or drafting after it."""
        return self.config.all_kinds[self.config.layers :][:1] if drafts else self.config.kinds

    def mixture(self, shape: StepShape) -> Mixture:
        """Of each mixture layer in the program of this shape."""
        return Mixture(
            shape.rows,
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
