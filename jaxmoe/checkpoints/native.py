"""The native format: parameters as one Orbax checkpoint, laid out so that any mesh reads just what its shards need.

A folder holds `params/` (Orbax), `jaxmoe.json` (the manifest, written last) and the config and tokenizer files of the
checkpoint it was made of. Parameters lie stacked by layer as in memory, experts in their logical order whatever slots
they had. `orbax.checkpoint.v1.load(folder / "params", abstract)` reads them too.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from flax import nnx
from orbax.checkpoint import v1 as ocp

from jaxmoe.checkpoints.folders import check_finished, unfinished
from jaxmoe.checkpoints.loader import Progress
from jaxmoe.checkpoints.placing import holders
from jaxmoe.checkpoints.reading import Window
from jaxmoe.checkpoints.safetensors import read_json
from jaxmoe.checkpoints.writer import read_slice
from jaxmoe.errors import CheckpointError
from jaxmoe.models.config import ModelConfig
from jaxmoe.models.keys import Key, Keys, flat, nested

MANIFEST, PARAMS = "jaxmoe.json", "params"
FORMAT = 2
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
    progress: called with bytes written and bytes in all. Raises CheckpointError if they cannot be written.
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
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"{folder / PARAMS} cannot be written: {error}") from error
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
    stored = stored_parameters(folder)
    _check(folder, stored, {path: _logical_shape(keys[path], leaf, config.experts) for path, leaf in leaves.items()})
    total, done = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values()), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    params: dict[str, Any] = {}
    try:
        files = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        for path, leaf in leaves.items():
            key, sharding = keys[path], jax.sharding.NamedSharding(mesh, specs[path])
            read = StoredReader(_open(folder, path, files), key, slot_expert, leaf.dtype)
            params[path] = _place(read, leaf.shape, sharding, advance)
    except (ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder / PARAMS} cannot be read, convert again: {error}") from error
    return nested(params)


class StoredReader:
    """Reads windows of one parameter, from the chunks that they touch. slot_expert [L, S]: the expert of every slot."""

    def __init__(self, store: ts.TensorStore, key: Key, slot_expert: np.ndarray, dtype: Any) -> None:
        self.store, self.key, self.slot_expert, self.dtype = store, key, slot_expert, np.dtype(dtype)

    def __call__(self, window: Window, advance: Callable[[int], None] = lambda size: None) -> np.ndarray:
        """The window, cast to the parameter's dtype. advance: called with the bytes of every piece that is there."""
        out = _aligned([stop - start for start, stop in window], self.dtype)
        pieces = list(self._pieces(out, window))
        if self.store.dtype.numpy_dtype == self.dtype:
            writes = [ts.array(target).write(view) for target, view in pieces]
            for (target, _), write in zip(pieces, writes, strict=True):
                write.result()
                advance(target.nbytes)
            return out
        # Each is cast while the next one is read; none is kept.
        coming = pieces[0][1].read()
        for number, (target, _) in enumerate(pieces, 1):
            ready = coming.result()
            if number < len(pieces):
                coming = pieces[number][1].read()
            target[...] = ready
            advance(target.nbytes)
        return out

    def _pieces(self, out: np.ndarray, window: Window) -> Iterator[tuple[np.ndarray, ts.TensorStore]]:
        """Parts of `out`, by layer where there are several, and what is stored of them."""
        inner: Any = tuple(slice(*bounds) for bounds in window[self.key.stacked :])
        if not self.key.per_layer:
            yield out, self.store[inner]
            return
        for row, layer in enumerate(range(*window[0])):
            # An array of experts, not a slice: neighbouring slots may hold any.
            slots = (self.slot_expert[layer, slice(*window[1])],) if self.key.per_expert else ()
            yield out[row], self.store[layer][(*slots, *inner)]


def _place(
    read: StoredReader, shape: tuple[int, ...], sharding: jax.sharding.NamedSharding, advance: Callable[[int], None]
) -> jax.Array:
    """The parameter on its devices. The host holds one shard at a time, which devices with the same share."""
    shards = []
    for window, devices in holders(shape, sharding).items():
        shards += jax.block_until_ready(jax.device_put([read(window, advance)] * len(devices), devices))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _aligned(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """Empty, at an address that lets JAX on a CPU take the memory as it is instead of copying it."""
    size, alignment = math.prod(shape) * dtype.itemsize, 64
    raw = np.empty(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(dtype).reshape(shape)


def _saving(keys: Keys, shard_bytes: int) -> ocp.Context:
    """Uncompressed: weights shrink by a fifth at most, and would be written and read at a third of the speed."""
    context = ocp.Context()
    # Orbax refuses a shard that would take up the limit to the last byte.
    limit = max(BUFFER_BYTES, shard_bytes) + 1
    context.memory.write_concurrent_bytes = context.memory.transfer_concurrent_bytes = limit
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
    out = np.empty((leaf.shape[0], experts, *leaf.shape[2:]), leaf.dtype)
    for row, expert in np.ndindex(out.shape[:2]):
        out[row, expert] = read_slice(leaf, (row, int(np.argmax(slot_expert[row] == expert))))
    return out


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
