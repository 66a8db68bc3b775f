"""Parameters to a Hugging Face checkpoint: the key table read backwards, a tensor at a time.

The format: https://huggingface.co/docs/safetensors
"""

import dataclasses
import json
import math
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoints.loader import Progress
from jaxmoe.checkpoints.safetensors import INDEX, SINGLE
from jaxmoe.models.config import ModelConfig
from jaxmoe.models.keys import Key, Keys, flat

DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
MAX_FILE_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor to be written, of a parameter that may still lie on devices.

    row: among the layers of the key's stack. slots: of its experts, one or all. part: of two that lie side by side.
    shape, dtype: on disk.
    """

    name: str
    key: Key
    leaf: Any
    row: int
    slots: tuple[int, ...]
    part: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Its bits as they lie on disk. No more of the parameter than this comes to the host."""
        if self.key.experts_together:
            memory = np.empty((len(self.slots), *self.leaf.shape[2:]), self.leaf.dtype)
            for expert, slot in enumerate(self.slots):
                memory[expert] = read_slice(self.leaf, (self.row, slot))
        else:
            memory = read_slice(self.leaf, (self.row, *self.slots) if self.key.per_layer else ())
        if len(self.key.tensors) > 1:
            memory = np.moveaxis(memory, self.key.part_axis or 0, 0)[self.part]
        # As whole numbers, since numpy transposes half-precision types element by element.
        return self.key.to_stored(memory.astype(self.dtype, copy=False).view(f"u{self.dtype.itemsize}"))


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
    progress: Progress = lambda done, total: None,
) -> int:
    """Writes the weights into an existing folder; returns their bytes. The host holds one tensor at a time.

    wide: parameters that are float32 whatever the others are (`Decoder.wide`).
    slot_expert [mixtures, S]: the expert of every slot of `params`; None where slots are the experts in order.
    max_file_bytes: weights that fit into one file are `model.safetensors`, else files are numbered and an index that is
        written last names them.
    progress: called with bytes written and bytes in all.
    """
    files = _split(list(stored_tensors(keys, config, params, dtype, wide, slot_expert)), max_file_bytes)
    total = sum(tensor.nbytes for tensors in files for tensor in tensors)
    done = 0
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        name = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        weight_map |= {tensor.name: name for tensor in tensors}
        fresh = out / f"{name}.new"
        with fresh.open("wb") as file:
            file.write(_header(tensors))
            for tensor in tensors:
                file.write(tensor.read().data)
                done += tensor.nbytes
                progress(done, total)
        fresh.rename(out / name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def stored_tensors(
    keys: Keys,
    config: ModelConfig,
    params: Mapping[str, Any],
    dtype: jnp.dtype,
    wide: Collection[str] = (),
    slot_expert: np.ndarray | None = None,
) -> Iterator[Tensor]:
    """Every tensor by its first name, layer after layer."""
    found: list[tuple[int, Tensor]] = []
    for path, leaf in flat(params):
        key = keys[path]
        stored = np.dtype(np.float32 if path in wide else dtype)
        shape = key.stored_shape(key.sizes(leaf.shape[key.stacked :], config.experts))
        for row, layer in enumerate(config.stacks[key.stack] if key.per_layer else (-1,)):
            slots = _first_slots(config.experts, slot_expert, row) if key.per_expert else []
            apart = key.per_expert and not key.experts_together
            for expert in range(config.experts) if apart else (0,):
                held = (slots[expert],) if apart else tuple(slots)
                for part, name in enumerate(key.tensors):
                    named = name.format(layer=layer, expert=expert)
                    found.append((layer, Tensor(named, key, leaf, row, held, part, shape, stored)))
    # What belongs to no layer comes first.
    return (tensor for _, tensor in sorted(found, key=lambda entry: entry[0]))


def read_slice(leaf: Any, place: Sequence[int]) -> np.ndarray:
    """`leaf[place]` on the host, put together from the shards that it touches."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)[tuple(place)]
    out: np.ndarray | None = None
    seen = set()
    for shard in leaf.addressable_shards:
        window = tuple(part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape, strict=True))
        outer, inner = window[: len(place)], window[len(place) :]
        if inner in seen or not all(start <= at < stop for at, (start, stop) in zip(place, outer, strict=True)):
            continue
        seen.add(inner)
        # What is on the host already is looked at; elsewhere the device cuts it out.
        held = np.asarray(shard.data) if shard.device.platform == "cpu" else shard.data
        piece = np.asarray(held[tuple(at - start for at, (start, _) in zip(place, outer, strict=True))])
        if piece.shape == leaf.shape[len(place) :]:
            return piece
        if out is None:
            out = np.empty(leaf.shape[len(place) :], leaf.dtype)
        out[tuple(slice(*bounds) for bounds in inner)] = piece
    assert out is not None
    return out


def _first_slots(experts: int, slot_expert: np.ndarray | None, row: int) -> list[int]:
    if slot_expert is None:
        return list(range(experts))
    return [int(np.argmax(slot_expert[row] == expert)) for expert in range(experts)]


def _split(tensors: list[Tensor], max_file_bytes: int) -> list[list[Tensor]]:
    """In order, each file as full as it gets; one that is larger than a file has a file of its own."""
    files: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.nbytes > max_file_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.nbytes
    return files


def _header(tensors: list[Tensor]) -> bytes:
    """Length, and JSON padded so that the data are aligned."""
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
