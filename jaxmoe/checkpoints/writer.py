"""Parameters to a Hugging Face checkpoint: the key table read backwards."""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmoe.models.config import ModelConfig
from jaxmoe.models.keys import Key

DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def leaf_at(params: Mapping[str, Any], path: str) -> Any:
    """`params["attention"]["query"]` for "attention.query"; None when absent."""
    node: Any = params
    for part in path.split("."):
        if part not in node:
            return None
        node = node[part]
    return node


def stored_tensors(
    keys: Mapping[str, Key], config: ModelConfig, params: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its name on disk, from parameters with one slot per logical expert."""
    for path, key in keys.items():
        leaf = leaf_at(params, path)
        if leaf is None:
            continue
        stacked = np.asarray(leaf)
        for layer in range(config.layers) if key.per_layer else (0,):
            at_layer = stacked[layer] if key.per_layer else stacked
            for expert in range(config.experts) if key.per_expert else (0,):
                one = at_layer[expert] if key.per_expert else at_layer
                for part, name in enumerate(key.tensors):
                    piece = one if key.part_axis is None else np.take(one, part, axis=key.part_axis)
                    yield name.format(layer=layer, expert=expert), key.to_stored(piece)


def save_hf(
    out: Path, keys: Mapping[str, Key], config: ModelConfig, params: Mapping[str, Any], dtype: jnp.dtype
) -> None:
    """Writes `model.safetensors` (https://huggingface.co/docs/safetensors: header length, JSON header, raw tensors)."""
    np_dtype = np.dtype(dtype)
    tensors = [(name, array.astype(np_dtype)) for name, array in stored_tensors(keys, config, params)]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors:
        header[name] = {
            "dtype": DTYPE_NAMES[np_dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    fresh = out / "model.safetensors.new"
    with fresh.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, array in tensors:
            file.write(array.tobytes())
    fresh.rename(out / "model.safetensors")
