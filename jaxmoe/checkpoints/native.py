"""The native format: parameters as one Orbax checkpoint, laid out so that any mesh reads just what its shards need.

A folder holds `params/` (Orbax), `jaxmoe.json` (the manifest, written last) and the config and tokenizer files of the
checkpoint it was made of. Parameters lie stacked by layer as in memory, experts in their logical order whatever slots
they had. `orbax.checkpoint.v1.load(folder / "params", abstract)` reads them too.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from flax import nnx
from orbax.checkpoint import v1 as ocp

from jaxmoe.checkpoints.folders import check_finished, unfinished
from jaxmoe.checkpoints.loader import Progress
from jaxmoe.checkpoints.placing import AHEAD, local_bytes, place
from jaxmoe.checkpoints.reading import Piece, Window
from jaxmoe.checkpoints.safetensors import read_json
from jaxmoe.errors import CheckpointError
from jaxmoe.models.config import ModelConfig
from jaxmoe.models.keys import Key, Keys
from jaxmoe.models.parameters import flat

MANIFEST, PARAMS = "jaxmoe.json", "params"
FORMAT = 1
# A chunk is read whole: never more than one layer of one expert, and no more than this.
CHUNK_BYTES = 32 << 20
# Orbax keeps what it has not yet written in memory, up to the larger of this and one shard.
BUFFER_BYTES = 256 << 20
FILE_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Stored:
    """One parameter as it was saved; the shape has logical experts where memory has slots."""

    shape: tuple[int, ...]
    dtype: str


def is_native(folder: Path) -> bool:
    """Whether `folder` is in this format. Raises CheckpointError for what an interrupted conversion left."""
    check_finished(folder)
    return (folder / MANIFEST).exists() or (folder / PARAMS).is_dir()


def read_manifest(folder: Path) -> dict[str, Any]:
    """`jaxmoe.json`. Raises CheckpointError when there is none, or one of another version."""
    if not (folder / MANIFEST).exists():
        raise unfinished(folder)
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / MANIFEST}: format {manifest.get('format')!r} is not the {FORMAT} that this version reads; "
            "convert the original checkpoint again"
        )
    return manifest


def stored_parameters(folder: Path) -> dict[str, Stored]:
    """Every parameter by its path. Raises CheckpointError."""
    entries = read_manifest(folder).get("parameters")
    try:
        assert isinstance(entries, Mapping)
        return {path: Stored(tuple(entry["shape"]), str(entry["dtype"])) for path, entry in entries.items()}
    except (AssertionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} does not list parameters; convert again") from error


def save_native(
    folder: Path,
    keys: Keys,
    config: ModelConfig,
    params: Mapping[str, Any],
    slot_expert: np.ndarray,
    dtype: str,
    progress: Progress = lambda done, total: None,
) -> int:
    """Writes parameters, then the manifest, into an existing folder; returns the parameters' bytes.

    slot_expert [mixtures, S]: the expert of every slot of `params`, all of which must be addressable from here. Where
    slots repeat experts, the experts' parameters pass through the memory of the host.
    progress: called with bytes written and bytes in all.
    """
    leaves = {path: _in_logical_order(keys[path], leaf, slot_expert, config.experts) for path, leaf in flat(params)}
    total = sum(leaf.nbytes for leaf in leaves.values())
    with _saving(keys, max(_shard_bytes(leaf) for leaf in leaves.values())):
        saving = ocp.save_async(folder.resolve() / PARAMS, nested(leaves))
    while True:
        try:
            saving.result(timeout=0.2)
            break
        except TimeoutError:
            progress(min(_size(folder), total - 1), total)
    manifest = {
        "format": FORMAT,
        "model_type": config.model_type,
        "dtype": dtype,
        "experts": config.experts,
        "stacks": {name: len(layers) for name, layers in config.stacks.items()},
        "parameters": {
            path: {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name} for path, leaf in leaves.items()
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    progress(total, total)
    return total


def load_native(
    folder: Path,
    abstract: nnx.Module,
    keys: Keys,
    config: ModelConfig,
    slot_expert: np.ndarray,
    mesh: jax.sharding.Mesh,
    *,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """The parameters of `abstract` (an `nnx.eval_shape` of the model under the mesh) as a nested dict of arrays.

    slot_expert [mixtures, S]: which logical expert's weights each slot gets. Cast to the dtype of `abstract`.
    progress: called with bytes placed and bytes in all. Raises CheckpointError listing all that does not fit at once.
    """
    leaves = dict(flat(nnx.to_pure_dict(nnx.state(abstract))))
    specs = dict(flat(nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(abstract)))))
    shardings = {path: jax.sharding.NamedSharding(mesh, specs[path]) for path in leaves}
    _check(
        folder,
        stored_parameters(folder),
        {path: _logical_shape(keys[path], leaves[path], config.experts) for path in leaves},
    )
    total = sum(local_bytes(leaf, shardings[path]) for path, leaf in leaves.items())
    done = 0

    def report(placed: int) -> None:
        nonlocal done
        done += placed
        progress(done, total)

    try:
        files = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        params = {}
        with ThreadPoolExecutor(AHEAD) as pool:
            for path, leaf in leaves.items():
                key = keys[path]
                read = StoredReader(_open(folder, path, files), slot_expert if key.per_expert else None, leaf.dtype)
                params[path] = place(read.read, leaf.shape, leaf.dtype, shardings[path], key.stacked, pool, report)
    except (ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder / PARAMS} cannot be read, convert again: {error}") from error
    return nested(params)


class StoredReader:
    """Reads windows of one parameter. slot_expert [L, S]: the expert of every slot, None where there are no slots."""

    def __init__(self, store: ts.TensorStore, slot_expert: np.ndarray | None, dtype: Any) -> None:
        self.store, self.slot_expert, self.dtype = store, slot_expert, np.dtype(dtype)

    def __call__(self, window: Window) -> np.ndarray:
        """The window, cast to the parameter's dtype."""
        out = np.empty([stop - start for start, stop in window], self.store.dtype.numpy_dtype)
        if self.slot_expert is None:
            writes = [ts.array(out).write(self.store[tuple(slice(*bounds) for bounds in window)])]
        else:
            layers, slots = range(*window[0]), slice(*window[1])
            inner: Any = tuple(slice(*bounds) for bounds in window[2:])
            writes = [
                ts.array(out[row]).write(self.store[layer][(self.slot_expert[layer, slots], *inner)])
                for row, layer in enumerate(layers)
            ]
        for write in writes:
            write.result()
        return out.astype(self.dtype, copy=False)

    def read(self, window: Window) -> Piece:
        """For `place`."""
        return Piece(self(window))


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"experts": {"down": x}} of {"experts.down": x}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _saving(keys: Keys, shard_bytes: int) -> ocp.Context:
    """Uncompressed: weights shrink by a fifth at most, and would be written and read at a third of the speed."""
    context = ocp.Context()
    context.memory.write_concurrent_bytes = max(BUFFER_BYTES, shard_bytes)
    context.memory.transfer_concurrent_bytes = max(BUFFER_BYTES, shard_bytes)
    saving = context.array.saving
    saving.use_compression = False
    saving.ocdbt_target_data_file_size = FILE_BYTES
    saving.enable_write_sharding_file = False

    def chunks(path: Any, leaf: Any) -> Any:
        stacked = keys[".".join(str(part.key) for part in path)].stacked
        # Small parameters stay in one piece.
        axes = tuple(range(stacked)) if leaf.nbytes > CHUNK_BYTES else ()
        return saving.StorageOptions(chunk_byte_size=CHUNK_BYTES, shard_axes=axes)

    saving.scoped_storage_options_creator = chunks
    return context


def _in_logical_order(key: Key, leaf: Any, slot_expert: np.ndarray, experts: int) -> Any:
    """The leaf, of an expert's slots the first."""
    if not key.per_expert or np.array_equal(slot_expert, np.tile(np.arange(experts), (len(slot_expert), 1))):
        return leaf
    host = np.asarray(leaf)
    slots = np.argmax(slot_expert[:, None, :] == np.arange(experts)[:, None], axis=-1)
    return np.take_along_axis(host, slots.reshape(*slots.shape, *(1,) * (host.ndim - 2)), axis=1)


def _logical_shape(key: Key, leaf: Any, experts: int) -> tuple[int, ...]:
    return (leaf.shape[0], experts, *leaf.shape[2:]) if key.per_expert else tuple(leaf.shape)


def _check(folder: Path, stored: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]]) -> None:
    kinds = {
        "missing": sorted(wanted.keys() - stored.keys()),
        "not expected": sorted(stored.keys() - wanted.keys()),
        "of another shape": [
            f"{path} is {list(stored[path].shape)}, not {list(shape)}"
            for path, shape in wanted.items()
            if path in stored and stored[path].shape != shape
        ],
    }
    problems = [f"{len(names)} parameters {what}: {', '.join(names)}" for what, names in kinds.items() if names]
    if problems:
        raise CheckpointError(f"{folder} does not hold what its config.json promises: {'; '.join(problems)}")


def _open(folder: Path, path: str, files: ts.Context) -> ts.TensorStore:
    """One array of the Orbax checkpoint: zarr in an OCDBT database."""
    databases = list((folder / PARAMS).glob("*/manifest.ocdbt"))
    if len(databases) != 1:
        raise ValueError(f"it has {len(databases)} databases, not one")
    base = {"driver": "file", "path": str(databases[0].parent.resolve())}
    spec = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{path}/"}}
    return ts.open(spec, open=True, read=True, context=files).result()


def _shard_bytes(leaf: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else leaf.shape
    return math.prod(shape) * leaf.dtype.itemsize


def _size(folder: Path) -> int:
    """Bytes of the files below, while others write and rename them."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total
