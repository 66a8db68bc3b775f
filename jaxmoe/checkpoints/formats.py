"""A checkpoint in either format, native or Hugging Face's: told apart, looked into, read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmoe.checkpoints.loader import Progress, has_tensors, load_params, read_config, read_quantization
from jaxmoe.checkpoints.orbax_store import is_native, load_native, read_manifest, stored_parameters
from jaxmoe.checkpoints.safetensors import DTYPES, SafetensorsCheckpoint
from jaxmoe.models.config import ModelConfig
from jaxmoe.models.decoder import Decoder
from jaxmoe.models.llama4 import text_config
from jaxmoe.models.registry import family_of


def read_params(
    folder: Path,
    hf: Mapping[str, Any],
    abstract: Decoder,
    config: ModelConfig,
    slot_expert: np.ndarray,
    mesh: jax.sharding.Mesh,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """The parameters of `abstract` as a nested dict of arrays on the mesh; see `load_params` and `load_native`."""
    if is_native(folder):
        return load_native(folder, abstract, abstract.keys, slot_expert, mesh, config.experts, progress)
    return load_params(
        folder,
        abstract,
        abstract.keys,
        config,
        slot_expert,
        mesh,
        ignored=abstract.ignored,
        prefix=abstract.prefix,
        block_size=read_quantization(hf if "quantization_config" in hf else text_config(hf)),
        progress=progress,
    )


def has_mtp(folder: Path, config: ModelConfig) -> bool:
    """Whether the layers that predict a token more are there. Raises CheckpointError."""
    if is_native(folder):
        return any(path.startswith("mtp.") for path in stored_parameters(folder))
    return has_tensors(folder, f"model.layers.{config.layers}.")


def stored_dtype(folder: Path) -> str:
    """The compute dtype that loses nothing of what is stored: float32, bfloat16 or float16. Raises CheckpointError.

    Of Hugging Face's format that of the embedding, which nobody quantises or keeps wider than the rest.
    """
    if is_native(folder):
        return str(read_manifest(folder)["dtype"])
    family = family_of(read_config(folder))
    tensors = SafetensorsCheckpoint(folder).tensors
    name = family.keys["embed"].tensors[0]
    found = tensors.get(name) or tensors.get(family.prefix + name)
    stored = DTYPES.get(found.dtype) if found else None
    return stored.name if stored is not None and stored.name in ("bfloat16", "float16") else "float32"
