"""A checkpoint on a mesh: configuration, parameters and placement, and the uncached forward pass."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxmoe.axes import Logits
from jaxmoe.checkpoints.loader import load_params, read_config, read_generation_config
from jaxmoe.errors import ConfigError, InvalidRequestError
from jaxmoe.models.config import token_ids
from jaxmoe.models.decoder import RANK_ROWS, Decoder, Execution, merge
from jaxmoe.models.registry import family_of
from jaxmoe.moe.placement import initial_placement
from jaxmoe.sharding.devices import virtual_devices
from jaxmoe.sharding.mesh import MeshSpec, make_mesh, slots_for
from jaxmoe.sharding.rules import check_divisible

Progress = Callable[[str, int, int], None]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def no_progress(stage: str, done: int, total: int) -> None:
    """Reports nothing."""


class Model:
    """Loads `folder` onto the mesh. Raises CheckpointError, MeshError or ConfigError.

    mesh: a MeshSpec or its text, "dp=2,ep=4". On a CPU the devices it needs are made if JAX has not started yet.
    dtype: what to compute in: float32, bfloat16 or float16.
    progress: called with a stage's name, what is done and what there is in all.
    """

    def __init__(
        self,
        folder: str | Path,
        mesh: str | MeshSpec = MeshSpec(),  # noqa: B008 - frozen
        dtype: str = "float32",
        execution: Execution = Execution(),  # noqa: B008 - frozen
        progress: Progress = no_progress,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
        self.folder = Path(folder)
        self.dtype = jnp.dtype(DTYPES[dtype])
        self.execution = execution
        self.mesh_spec = MeshSpec.parse(mesh) if isinstance(mesh, str) else mesh
        hf = read_config(self.folder)
        generation = read_generation_config(self.folder)
        family = family_of(hf)
        self.config = family.read_config(hf)
        # generation_config.json, where there is one, has the last word on what ends a generation.
        self.eos_token_ids = token_ids(generation, "eos_token_id") or self.config.eos_token_ids
        self.recommended_sampling = {
            name: generation[name]
            for name in ("temperature", "top_p", "top_k")
            if isinstance(generation.get(name), int | float) and generation.get("do_sample", True)
        }
        config, spec = self.config, self.mesh_spec
        check_divisible(spec, heads=config.heads, kv_heads=config.kv_heads, expert_width=config.expert_width)
        virtual_devices(spec.num_devices)
        self.mesh = make_mesh(spec)
        slots = slots_for(config.experts, spec)
        placement = initial_placement(config.layers, config.experts, slots)
        with jax.set_mesh(self.mesh):
            # The vocabulary is split where tp divides it and whole on every device where it does not.
            self.abstract: Decoder = nnx.eval_shape(
                lambda: family(config, slots, self.dtype, nnx.Rngs(0), vocab_split=config.vocab_size % spec.tp == 0)
            )
            self.params: dict[str, Any] = load_params(
                self.folder,
                self.abstract,
                family.keys,
                config,
                np.asarray(placement.slot_expert),
                self.mesh,
                self.dtype,
                functools.partial(progress, "loading weights"),
            )
        self.placement = jax.device_put(placement, NamedSharding(self.mesh, P()))

    @property
    def num_ranks(self) -> int:
        return self.mesh_spec.num_ranks

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def describe(self) -> str:
        """One line for a log: what was loaded, where."""
        config = self.config
        return (
            f"{config.model_type} of {self.num_parameters / 1e6:,.1f} M parameters "
            f"({config.experts} experts, {config.experts_per_token} a token) in {self.dtype} on {self.mesh_spec}, "
            f"{self.mesh.devices.flat[0].device_kind}"
        )

    def logits(self, token_ids: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T V"]:
        """Logits at every position of every row, float32, without a cache.

        Raises InvalidRequestError on a bad id or shape.

        Compiles once for each shape.
        """
        tokens = np.asarray(token_ids)
        if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
            raise InvalidRequestError(f"token_ids must be integers [B, T], not {tokens.dtype}{list(tokens.shape)}")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise InvalidRequestError(
                f"token ids span {tokens.min()}..{tokens.max()}, outside the vocabulary of {self.config.vocab_size}"
            )
        batch, length = tokens.shape
        per_rank = -(-batch // self.num_ranks)
        padded = np.zeros((self.num_ranks * per_rank, length), np.int32)
        padded[:batch] = tokens
        positions = np.where(np.arange(len(padded))[:, None] < batch, np.arange(length), -1).astype(np.int32)
        by_rank = [array.reshape(self.num_ranks, per_rank, length) for array in (padded, positions)]
        with jax.set_mesh(self.mesh):
            placed = jax.device_put(by_rank, NamedSharding(self.mesh, RANK_ROWS))
            out = self._forward(self.params, self.placement, *placed)
        return np.asarray(out).reshape(len(padded), length, -1)[:batch]

    @functools.cached_property
    def _forward(self) -> Any:
        def forward(params: Any, placement: Any, tokens: Array, positions: Array) -> Logits:
            model = merge(self.abstract, params)
            hidden, _, _ = model(tokens, positions, placement, None, self.execution)
            return model.logits(hidden).astype(jnp.float32)

        return jax.jit(forward)
