"""Reading safetensors files by byte range: tensors are views of mapped files.

The format: https://huggingface.co/docs/safetensors
"""

import dataclasses
import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxmoe.errors import CheckpointError

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEADER_LIMIT = 100_000_000  # bytes; as in the format's own reader


_PICKLED = (
    "pickled weights are never read, since unpickling runs code that comes with them; "
    "convert them to safetensors, or download the checkpoint's safetensors files"
)
# What may lie in a folder in place of weights that can be read; the first that matches is told.
INSTEAD = {
    "adapter_*": "an adapter is not a whole model; merge it into its base model first",
    "consolidated*": "the publisher's own layout is not read; download the files of the Hugging Face layout",
    "*.gguf": "GGUF is not read; download the model's safetensors files",
    **dict.fromkeys(("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt"), _PICKLED),
    "*.safetensors": f"without {INDEX} nothing tells which files belong together; download it too",
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    def view(self) -> np.ndarray:
        """The tensor's bytes, mapped; only what is indexed is read from disk. Its dtype must be one of DTYPES."""
        dtype = DTYPES[self.dtype]
        if not math.prod(self.shape):
            return np.zeros(self.shape, dtype)
        return np.memmap(self.file, dtype, "r", self.offset, self.shape).view(np.ndarray)


class SafetensorsCheckpoint:
    """All tensors of a folder by name, over one file or the many of an index.

    Raises CheckpointError when one is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        wanted = _read_index(folder)
        if wanted is None:
            self.tensors = read_header(folder / SINGLE)
            return
        for name in sorted(set(wanted.values())):
            stored = read_header(folder / name)
            self.tensors.update({key: stored[key] for key in stored if wanted.get(key) == name})
        absent = sorted(set(wanted) - set(self.tensors))
        if absent:
            raise CheckpointError(f"{folder / INDEX} names tensors that its files do not hold: {', '.join(absent[:8])}")


def tensor_names(folder: Path) -> Iterable[str]:
    """Names of all tensors, of many files from the index alone. Raises CheckpointError."""
    wanted = _read_index(folder)
    return read_header(folder / SINGLE) if wanted is None else wanted


def _read_index(folder: Path) -> dict[str, str] | None:
    """The file of every tensor; None where all lie in one file. Raises CheckpointError."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}{_held_instead(folder)}")
        return None
    wanted = read_json(index).get("weight_map")
    if not isinstance(wanted, dict) or not all(isinstance(name, str) for name in wanted.values()):
        raise CheckpointError(f"{index} must map names of tensors to names of files under weight_map")
    for name in sorted(set(wanted.values())):
        if "/" in name or "\\" in name:
            raise CheckpointError(f"{index}: file name {name!r} points outside the checkpoint folder")
    return wanted


def _held_instead(folder: Path) -> str:
    """What a folder without weights that can be read has in their place, and what to do."""
    for pattern, advice in INSTEAD.items():
        held = sorted(file.name for file in folder.glob(pattern))
        if held:
            return f"; it holds {held[0]}: {advice}"
    return "; download the whole checkpoint"


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises CheckpointError when the file is absent, cut short or not safetensors."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= min(size - 8, HEADER_LIMIT):
                raise CheckpointError(
                    f"{file} is cut short or not a safetensors file ({size} bytes); download it again"
                )
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"its header is a {type(header).__name__}, not an object")
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if size < 8 + length + end:
            raise CheckpointError(
                f"{file} is cut short: {size} bytes of the {8 + length + end} that its header promises; "
                "download it again"
            )
        tensors = {}
        for name, entry in entries.items():
            begin, stop = entry["data_offsets"]
            if begin < 0:
                raise ValueError(f"{name} begins {-begin} bytes before the data")
            if not all(isinstance(size, int) and size >= 0 for size in entry["shape"]):
                raise ValueError(f"{name} has the shape {entry['shape']}")
            stored = StoredTensor(file, 8 + length + begin, tuple(entry["shape"]), entry["dtype"])
            item = DTYPES[stored.dtype].itemsize if stored.dtype in DTYPES else None
            if item is not None and math.prod(stored.shape) * item != stop - begin:
                raise CheckpointError(f"{file}: {name} has {stop - begin} bytes, not those of shape {stored.shape}")
            tensors[name] = stored
        return tensors
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; download the whole checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is missing; a checkpoint is a folder with config.json and *.safetensors"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value
