"""A Hugging Face checkpoint onto a mesh: every device's shard is read from the bytes it needs and no others."""

import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxmoe.checkpoints.placing import AHEAD, local_bytes, place
from jaxmoe.checkpoints.reading import SCALE, Block, ParameterReader, is_quantised, scale_shape
from jaxmoe.checkpoints.safetensors import DTYPES, SafetensorsCheckpoint, StoredTensor, read_json, tensor_names
from jaxmoe.errors import CheckpointError
from jaxmoe.models.config import ModelConfig
from jaxmoe.models.keys import Key, Keys, flat, nested

# Buffers that some exporters leave in files: computed here from the config.
IGNORED = r"(.*\.)?rotary_emb\.inv_freq"

Progress = Callable[[int, int], None]


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint. Raises CheckpointError when the folder or the file is missing or malformed."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; give the path of a checkpoint with config.json and *.safetensors"
        )
    return read_json(folder / "config.json")


def read_generation_config(folder: Path) -> dict[str, Any]:
    """`generation_config.json`, or {} where a checkpoint has none."""
    file = folder / "generation_config.json"
    return read_json(file) if file.exists() else {}


def read_quantization(hf: Mapping[str, Any]) -> Block | None:
    """Rows and columns that share a scale in fp8 files, from `quantization_config`; None where there is none.

    Raises CheckpointError naming what is not supported.
    """
    quantised = hf.get("quantization_config")
    if quantised is None:
        return None
    where = "config.json: quantization_config"
    if not isinstance(quantised, Mapping):
        raise CheckpointError(f"{where}={quantised!r} must be an object")
    method, block = quantised.get("quant_method"), quantised.get("weight_block_size")
    if method != "fp8":
        raise CheckpointError(
            f"{where}: quant_method={method!r} is not supported; only 'fp8' with a weight_block_size is. "
            "Use the bf16 checkpoint"
        )
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)):
        raise CheckpointError(f"{where}: weight_block_size={block!r} is not supported; it must be two whole numbers")
    # Scales that are powers of two ("ue8m0") are stored as float32 like any others.
    choices = {"fmt": ("e4m3",), "activation_scheme": ("dynamic",), "scale_fmt": ("ue8m0", "float")}
    for key, known in choices.items():
        if quantised.get(key) not in (None, *known):
            listed = " or ".join(map(repr, known))
            raise CheckpointError(f"{where}: {key}={quantised[key]!r} is not supported; only {listed} is")
    return block[0], block[1]


def has_tensors(folder: Path, start: str) -> bool:
    """Whether the name of any tensor begins so; reads no more than the index or a header. Raises CheckpointError."""
    return any(name.startswith(start) for name in tensor_names(folder))


def load_params(
    folder: Path,
    abstract: nnx.Module,
    keys: Keys,
    config: ModelConfig,
    slot_expert: np.ndarray,
    mesh: jax.sharding.Mesh,
    *,
    ignored: str = "",
    prefix: str = "",
    block_size: Block | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """The parameters of `abstract` (an `nnx.eval_shape` of the model under the mesh) as a plain nested dict of arrays.

    slot_expert [mixtures, S]: which logical expert's weights each physical slot gets.
    ignored: pattern of names of tensors that are skipped. prefix: stripped from names where a checkpoint has it.
    block_size: of fp8 files (`read_quantization`). progress: called with bytes placed and bytes in all.
    Raises CheckpointError listing all missing, left-over and misshapen tensors at once.
    """
    tensors = SafetensorsCheckpoint(folder).tensors
    if prefix:
        # A name that is there both ways keeps its prefix, and is then told as not expected.
        short = {name: name.removeprefix(prefix) for name in tensors}
        tensors = {name if short[name] in tensors else short[name]: tensor for name, tensor in tensors.items()}
    leaves = dict(flat(nnx.to_pure_dict(nnx.state(abstract))))
    specs = dict(flat(nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(abstract)))))
    chosen = {path: _present(keys[path], tensors, config) for path in leaves}
    problems = _problems(tensors, chosen, leaves, config, f"{IGNORED}|{ignored or '(?!)'}", block_size)
    if problems:
        raise CheckpointError(f"{folder} does not hold what its config.json promises: {'; '.join(problems)}")

    shardings = {path: jax.sharding.NamedSharding(mesh, specs[path]) for path in leaves}
    total = sum(local_bytes(leaf, shardings[path]) for path, leaf in leaves.items())
    done = 0

    def report(placed: int) -> None:
        nonlocal done
        done += placed
        progress(done, total)

    params: dict[str, Any] = {}
    with ThreadPoolExecutor(AHEAD) as pool:
        for path, leaf in leaves.items():
            key = chosen[path]
            layers = config.stacks[key.stack] if key.per_layer else (0,)
            reader = ParameterReader(
                tensors, key, leaf.shape, layers, slot_expert, config.experts, leaf.dtype, block_size
            )
            params[path] = place(reader.read, leaf.shape, leaf.dtype, shardings[path], key.stacked, pool, report)
    return nested(params)


def _present(key: Key, tensors: Mapping[str, StoredTensor], config: ModelConfig) -> Key:
    """The alternative that the checkpoint has; the first if it has none."""
    for one in key.alternatives:
        if next(one.tensor_names(config.stacks, config.experts), None) in tensors:
            return one
    return key


def _problems(
    tensors: Mapping[str, StoredTensor],
    keys: Keys,
    leaves: Mapping[str, Any],
    config: ModelConfig,
    ignored: str,
    block: Block | None,
) -> list[str]:
    """What keeps the checkpoint from being read, in words: every tensor is expected once, or ignored by name."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, key in keys.items():
        shape = key.stored_shape(key.sizes(leaves[path].shape[key.stacked :], config.experts))
        expected.update(dict.fromkeys(key.tensor_names(config.stacks, config.experts), shape))
    scaled = {name for name in expected if name in tensors and is_quantised(tensors[name])}
    unscaled = sorted(name for name in scaled if block is None or len(expected[name]) != 2)
    if block is not None:
        expected |= {name + SCALE: scale_shape(expected[name], block) for name in scaled if len(expected[name]) == 2}
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    unexpected = sorted(
        name
        for name in tensors.keys() - expected.keys() - tied
        if not re.fullmatch(ignored, name) and 0 not in tensors[name].shape
    )
    found = {name: tensors[name] for name in expected if name in tensors}
    wrong = [f"{name} is {list(one.shape)}, not {list(expected[name])}" for name, one in found.items()
             if one.shape != expected[name]]  # fmt: skip
    unread = [f"{name} of {one.dtype}" for name, one in found.items() if one.dtype not in DTYPES]
    kinds = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "not expected": unexpected,
        "of another shape": wrong,
        f"of a dtype that is not one of {', '.join(DTYPES)}": unread,
        "in fp8 without a quantization_config that says how they are scaled": unscaled,
    }
    return [f"{len(names)} tensors {what}: {_listed(names)}" for what, names in kinds.items() if names]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
