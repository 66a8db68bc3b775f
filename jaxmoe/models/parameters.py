"""How many parameters a model has, and how many a token meets; from its config alone."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.models.config import ModelConfig
from jaxmoe.models.decoder import Decoder
from jaxmoe.models.keys import flat
from jaxmoe.sharding.mesh import MeshSpec, make_mesh


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


def count_parameters(family: type[Decoder], config: ModelConfig) -> ParameterCount:
    """Counts without making a single array."""
    total = mtp = idle = 0
    for path, shape in _shapes(family, config).items():
        key, size = family.keys[path], 1
        for length in shape:
            size *= length
        if key.per_layer:
            stack = config.stacks[key.stack]
            further = sum(layer >= config.layers for layer in stack)
            mtp += size // len(stack) * further
            size = size // len(stack) * (len(stack) - further)
        total += size
        if key.per_expert:
            idle += size // config.experts * (config.experts - config.experts_per_token)
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.width
    return ParameterCount(total, total - idle, embedding, mtp)


def _shapes(family: type[Decoder], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with jax.set_mesh(make_mesh(MeshSpec())):
        abstract = nnx.eval_shape(lambda: family(config, config.experts, jnp.dtype("bfloat16"), nnx.Rngs(0)))
    return {path: leaf.shape for path, leaf in flat(nnx.to_pure_dict(nnx.state(abstract)))}
