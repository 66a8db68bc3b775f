"""Parameters to a Hugging Face checkpoint: the key table read backwards, one tensor at a time."""

import dataclasses
import functools
import itertools
import json
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoints.safetensors import INDEX, SINGLE
from jaxmoe.models.config import ModelConfig
from jaxmoe.models.keys import Key, Keys
from jaxmoe.models.parameters import flat

DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
MAX_FILE_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to be written; `make` fetches it from its devices."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def save_hf(
    out: Path,
    keys: Keys,
    config: ModelConfig,
    params: Mapping[str, Any],
    dtype: jnp.dtype,
    *,
    wide: Collection[str] = (),
    slot_expert: np.ndarray | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes `model.safetensors`, or several files and their index where one would pass `max_file_bytes`.

    wide: parameters that stay float32. slot_expert [mixtures, S]: where slots are not the experts in order.
    The host holds a layer of one parameter at a time. Returns the bytes written.
    The format: https://huggingface.co/docs/safetensors (header length, JSON header, raw tensors).
    """
    tensors = list(tensors_of(keys, config, params, dtype, wide, slot_expert))
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    files: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if files[-1] and sum(other.nbytes for other in files[-1]) + tensor.nbytes > max_file_bytes:
            files.append([])
        files[-1].append(tensor)
    names = [SINGLE] if len(files) == 1 else [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)
    ]  # fmt: skip
    for name, held in zip(names, files, strict=True):
        fresh = out / (name + ".new")
        with fresh.open("wb") as file:
            file.write(_header(held))
            for tensor in held:
                file.write(np.ascontiguousarray(tensor.make()).view(np.uint8).data)
                done += tensor.nbytes
                progress(done, total)
        fresh.rename(out / name)
    if len(files) > 1:
        weight_map = {tensor.name: name for name, held in zip(names, files, strict=True) for tensor in held}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def tensors_of(
    keys: Keys,
    config: ModelConfig,
    params: Mapping[str, Any],
    dtype: jnp.dtype,
    wide: Collection[str] = (),
    slot_expert: np.ndarray | None = None,
) -> Iterator[Tensor]:
    """Every tensor by its name on disk, those of a layer of one parameter next to each other."""
    leaves, layers = dict(flat(params)), _Layers()
    for path, key in keys.items():
        if path not in leaves:
            continue
        leaf, kept = leaves[path], np.dtype(np.float32 if path in wide else dtype)
        sizes = key.sizes(leaf.shape[key.stacked :], config.experts)
        shape = key.stored_shape(sizes)
        for row, layer in enumerate(config.stacks[key.stack]) if key.per_layer else ((None, 0),):
            slots = None
            if key.per_expert:
                assert row is not None
                slots = np.arange(config.experts) if slot_expert is None else first_slots(slot_expert[row], config)
            fetch = functools.partial(layers, path, leaf, row, slots)
            several = range(config.experts) if "{expert}" in key.tensors[0] else (None,)
            for expert, part in itertools.product(several, range(len(key.tensors))):
                name = key.tensors[part].format(layer=layer, expert=expert)
                yield Tensor(name, shape, kept, _maker(fetch, key, expert, part, kept))


def first_slots(slot_expert: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Of every expert the first slot that holds it, in one layer."""
    return np.array([int(np.flatnonzero(slot_expert == expert)[0]) for expert in range(config.experts)])


class _Layers:
    """Layers of parameters on the host, experts in order; the last one is remembered for its next tensor."""

    def __init__(self) -> None:
        self._key: tuple[str, int | None] | None = None
        self._layer = np.empty(0)

    def __call__(self, path: str, leaf: Any, row: int | None, slots: np.ndarray | None) -> np.ndarray:
        if self._key != (path, row):
            self._key, self._layer = None, np.empty(0)  # before the next is fetched
            layer = np.asarray(leaf if row is None else leaf[row])
            self._key, self._layer = (path, row), layer if slots is None else layer[slots]
        return self._layer


def _maker(
    fetch: Callable[[], np.ndarray], key: Key, expert: int | None, part: int, dtype: np.dtype[Any]
) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        memory = fetch() if expert is None else fetch()[expert]
        if len(key.tensors) > 1:
            assert key.part_axis is not None
            memory = np.take(memory, part, axis=key.part_axis)
        return key.to_stored(memory).astype(dtype)

    return make


def _header(tensors: list[Tensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded
