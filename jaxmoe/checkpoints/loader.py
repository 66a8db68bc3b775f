"""A Hugging Face checkpoint onto a mesh: every device's shard is read from the bytes it needs and no others."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.checkpoints.reading import SCALE, Block, ParameterReader, Window, is_quantised, scale_shape
from jaxmoe.checkpoints.safetensors import DTYPES, SafetensorsCheckpoint, StoredTensor, read_json, tensor_names
from jaxmoe.errors import CheckpointError
from jaxmoe.models.config import ModelConfig
from jaxmoe.models.keys import Key, Keys
from jaxmoe.models.parameters import flat

# Buffers that some exporters leave in files: computed here from the config.
IGNORED = r"(.*\.)?rotary_emb\.inv_freq"
# A shard of a stacked parameter larger than this is brought to its device layer by layer.
WHOLE_BYTES = 32 << 20

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
    for key, known in (("fmt", "e4m3"), ("activation_scheme", "dynamic"), ("scale_fmt", "ue8m0")):
        if quantised.get(key) not in (None, known):
            raise CheckpointError(f"{where}: {key}={quantised[key]!r} is not supported; only {known!r} is")
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
    if prefix and any(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    leaves = dict(flat(nnx.to_pure_dict(nnx.state(abstract))))
    specs = dict(flat(nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(abstract)))))
    chosen = {path: _present(keys[path], tensors, config) for path in leaves}
    problems = _problems(tensors, chosen, leaves, config, f"{IGNORED}|{ignored or '(?!)'}", block_size)
    if problems:
        raise CheckpointError(f"{folder} does not hold what its config.json promises: {'; '.join(problems)}")

    shardings = {path: jax.sharding.NamedSharding(mesh, specs[path]) for path in leaves}
    total = sum(_local_bytes(leaf, shardings[path]) for path, leaf in leaves.items())
    done = 0

    def report(placed: int) -> None:
        nonlocal done
        done += placed
        progress(done, total)

    params: dict[str, Any] = {}
    for path, leaf in leaves.items():
        key = chosen[path]
        layers = config.stacks[key.stack] if key.per_layer else (0,)
        read = ParameterReader(tensors, key, leaf.shape, layers, slot_expert, config.experts, leaf.dtype, block_size)
        *parents, name = path.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = place(read, leaf.shape, leaf.dtype, shardings[path], key.per_layer, report)
    return params


def place(
    read: Callable[[Window], np.ndarray],
    shape: tuple[int, ...],
    dtype: Any,
    sharding: jax.sharding.NamedSharding,
    stacked: bool,
    report: Callable[[int], None] = lambda placed: None,
) -> jax.Array:
    """An array of which every device's shard comes from `read`, once for all devices that hold the same.

    Large shards of stacked parameters come a layer at a time, the next one read while the last is on its way, so that
    the host holds two layers of a shard and no more. report: called with the bytes that were placed.
    """
    holders: dict[Window, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        ranges = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        holders.setdefault(ranges, []).append(device)
    by_device: dict[jax.Device, jax.Array] = {}
    for window, devices in holders.items():
        extent = tuple(stop - start for start, stop in window)
        if not stacked or extent[0] == 1 or int(np.prod(extent)) * np.dtype(dtype).itemsize <= WHOLE_BYTES:
            host = read(window)
            by_device |= {device: jax.device_put(host, device) for device in devices}
            report(host.nbytes * len(devices))
            continue
        by_device |= {device: jnp.zeros(extent, dtype, device=device) for device in devices}
        windows = [((layer, layer + 1), *window[1:]) for layer in range(*window[0])]
        for number, piece in enumerate(_ahead(read, windows)):
            for device in devices:
                at_device = jax.device_put(piece, device)
                by_device[device] = _fill(by_device[device], at_device, number)
            jax.block_until_ready([by_device[device] for device in devices])
            report(piece.nbytes * len(devices))
    arrays = [by_device[device] for device in sharding.addressable_devices_indices_map(shape)]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _ahead(read: Callable[[Window], np.ndarray], windows: Iterable[Window]) -> Iterator[np.ndarray]:
    """Reads all windows in order, each while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for window in windows:
            ready, coming = coming, pool.submit(read, window)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()


@functools.partial(jax.jit, donate_argnums=0)
def _fill(stack: jax.Array, layer: jax.Array, number: int) -> jax.Array:
    """The stack with this layer in its place, in the same memory."""
    return jax.lax.dynamic_update_slice_in_dim(stack, layer, number, 0)


def _local_bytes(leaf: Any, sharding: jax.sharding.NamedSharding) -> int:
    shard = int(np.prod(sharding.shard_shape(leaf.shape)))
    return shard * np.dtype(leaf.dtype).itemsize * len(sharding.addressable_devices)


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
