"""A Hugging Face checkpoint onto a mesh: every device's shard is read from the bytes it needs and no others."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.checkpoints.safetensors import SafetensorsCheckpoint, StoredTensor, read_json
from jaxmoe.errors import CheckpointError
from jaxmoe.models.config import ModelConfig
from jaxmoe.models.keys import Key

# Buffers that some exporters leave in files: computed here from the config.
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq|rotary_emb\.inv_freq")

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


def load_params(
    folder: Path,
    abstract: nnx.Module,
    keys: Mapping[str, Key],
    config: ModelConfig,
    slot_expert: np.ndarray,
    mesh: jax.sharding.Mesh,
    dtype: jnp.dtype,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """The parameters of `abstract` (an `nnx.eval_shape` of the model under the mesh) as a plain nested dict of arrays.

    slot_expert [L, S]: which logical expert's weights each physical slot gets.
    progress: called with bytes placed and bytes in all.
    Raises CheckpointError listing all missing, left-over and misshapen tensors at once.
    """
    checkpoint = SafetensorsCheckpoint(folder)
    leaves = dict(_leaves(nnx.to_pure_dict(nnx.state(abstract))))
    specs = dict(_leaves(nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(abstract)))))
    wanted = {path: key for path, key in keys.items() if path in leaves}
    _check(checkpoint, wanted, leaves, config)
    total = sum(leaf.size * jnp.dtype(dtype).itemsize for leaf in leaves.values())
    done = 0
    params: dict[str, Any] = {}
    for path, leaf in leaves.items():
        reader = _Reader(checkpoint.tensors, wanted[path], leaf.shape, slot_expert, np.dtype(dtype))
        sharding = jax.sharding.NamedSharding(mesh, specs[path])
        array = jax.make_array_from_callback(leaf.shape, sharding, reader)
        *parents, name = path.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
        done += array.nbytes
        progress(done, total)
    return params


class _Reader:
    """Answers for any slice of one parameter, remembering what replicated shards ask for again."""

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        key: Key,
        shape: tuple[int, ...],
        slot_expert: np.ndarray,
        dtype: np.dtype[Any],
    ) -> None:
        self.tensors, self.key, self.shape, self.slot_expert, self.dtype = tensors, key, shape, slot_expert, dtype
        self.seen: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def __call__(self, index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or (slice(None),) * len(self.shape)
        ranges = tuple(part.indices(size) for part, size in zip(index, self.shape, strict=True))
        if ranges not in self.seen:
            self.seen[ranges] = self._read([range(*part) for part in ranges])
        return self.seen[ranges]

    def _read(self, ranges: list[range]) -> np.ndarray:
        key = self.key
        stacked = int(key.per_layer) + int(key.per_expert)
        leading, inner = ranges[:stacked], ranges[stacked:]
        memory = list(self.shape[stacked:])
        parts = range(1)
        if key.part_axis is not None:
            parts = inner.pop(key.part_axis)
            memory.pop(key.part_axis)
        window = tuple(slice(part.start, part.stop) for part in inner)
        out = np.empty([len(part) for part in ranges], self.dtype)
        for place in np.ndindex(*(len(part) for part in leading)):
            numbers = [part[i] for part, i in zip(leading, place, strict=True)]
            layer = numbers[0] if key.per_layer else 0
            expert = int(self.slot_expert[layer, numbers[-1]]) if key.per_expert else 0
            for at, part in enumerate(parts):
                name = key.tensors[part].format(layer=layer, expert=expert)
                view = key.to_memory(self.tensors[name].view(), tuple(memory))[window]
                target = out[place]
                if key.part_axis is not None:
                    target = np.moveaxis(target, key.part_axis, 0)[at]
                target[...] = view.astype(self.dtype)
        return out


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Any:
    for name, node in tree.items():
        if isinstance(node, Mapping):
            yield from _leaves(node, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", node


def _check(
    checkpoint: SafetensorsCheckpoint, keys: Mapping[str, Key], leaves: Mapping[str, Any], config: ModelConfig
) -> None:
    """Every expected tensor is there in its shape, and every tensor is expected or ignored by name."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, key in keys.items():
        memory = list(leaves[path].shape[int(key.per_layer) + int(key.per_expert) :])
        if key.part_axis is not None:
            memory.pop(key.part_axis)
        shape = key.stored_shape(tuple(memory))
        for layer in range(config.layers) if key.per_layer else (0,):
            for expert in range(config.experts) if key.per_expert else (0,):
                expected.update((name.format(layer=layer, expert=expert), shape) for name in key.tensors)
    problems = []
    missing = sorted(set(expected) - set(checkpoint.tensors))
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    left = sorted(name for name in set(checkpoint.tensors) - set(expected) - tied if not IGNORED.fullmatch(name))
    wrong = [
        f"{name} is {list(checkpoint.tensors[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in checkpoint.tensors and checkpoint.tensors[name].shape != shape
    ]
    for what, names in (("missing", missing), ("not expected", left), ("of another shape", wrong)):
        if names:
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            problems.append(f"{len(names)} tensors {what}: {', '.join(names[:20])}{more}")
    if problems:
        raise CheckpointError(f"{checkpoint.folder} does not hold what its config.json promises: {'; '.join(problems)}")
