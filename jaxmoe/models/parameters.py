"""What parameters a model has, from its config alone: how many, how many a token meets, and which axes are split."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jaxmoe.models.config import ModelConfig
from jaxmoe.models.decoder import Decoder
from jaxmoe.models.keys import flat
from jaxmoe.sharding.rules import SPLIT_BY_TP, Rules


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    total: of the main model. active: those that one token meets, experts that are not chosen left out; the input
    embedding counts whole. embedding: of that, what is looked up and not multiplied; 0 where it is the output's too.
    mtp: of layers that predict a token more, beyond what they share with the main model.
    """

    total: int
    active: int
    embedding: int
    mtp: int


class Parameter(NamedTuple):
    """One parameter of a model, before there is a mesh.

    shape: with one slot for each expert. meaning: of every axis, as `Rules` knows it; None for one that is never split.
    layers: of its first axis, those of the main model and those that predict a token more; None if it has no such axis.
    """

    shape: tuple[int, ...]
    meaning: tuple[str | None, ...]
    dtype: jnp.dtype
    layers: tuple[int, int] | None

    def shard_shape(self, rules: Rules, slots: int) -> tuple[int, ...]:
        """What one device holds. slots: in all."""
        held = []
        for length, meaning in zip(self.shape, self.meaning, strict=True):
            if meaning == "slots":
                held.append(slots // rules.spec.expert_devices)
            else:
                held.append(length // rules.parts(meaning) if meaning else length)
        return tuple(held)


def count_parameters(family: type[Decoder], config: ModelConfig) -> ParameterCount:
    """Counts without making a single array."""
    total = mtp = idle = 0
    for parameter in list_parameters(family, config, jnp.dtype("bfloat16")).values():
        size = math.prod(parameter.shape)
        if parameter.layers is not None:
            own, further = parameter.layers
            mtp += size // (own + further) * further
            size = size // (own + further) * own
        total += size
        if "slots" in parameter.meaning:
            idle += size // config.experts * (config.experts - config.experts_per_token)
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.width
    return ParameterCount(total, total - idle, embedding, mtp)


def list_parameters(
    family: type[Decoder], config: ModelConfig, dtype: jnp.dtype, expert_dtype: jnp.dtype | None = None
) -> dict[str, Parameter]:
    """Every parameter by its dotted path, as the module itself makes them: no array, no device, any size.

    expert_dtype: what experts' weights are kept in, if not in `dtype`.
    """
    axes = ("ranks", "slots", *SPLIT_BY_TP)
    mesh = AbstractMesh((1,) * len(axes), axes, axis_types=(AxisType.Explicit,) * len(axes))
    with jax.sharding.use_abstract_mesh(mesh):
        abstract = nnx.eval_shape(lambda: family(config, config.experts, dtype, nnx.Rngs(0), _Meanings(), expert_dtype))
    found = {}
    for path, leaf in flat(nnx.to_pure_dict(nnx.state(abstract))):
        # Scales of experts in 8 bits are in no checkpoint, and lie beside their stack.
        key, layers = family.keys[path.removesuffix("_scale")], None
        if key.per_layer:
            stack = config.stacks[key.stack]
            further = sum(layer >= config.layers for layer in stack)
            layers = (len(stack) - further, further)
        found[path] = Parameter(leaf.shape, tuple(leaf.sharding.spec), leaf.dtype, layers)
    return found


class _Meanings(Rules):
    """Leaves axes named by what they mean: on a mesh whose axes are these meanings, a sharding spells them."""

    def partition(self, *meaning: str | None) -> P:
        return P(*meaning)
