"""The native format: parameters as they lie in memory, written by Orbax, for any mesh to load.

A folder with the checkpoint's own config.json and tokenizer, `params` (an Orbax checkpoint in which experts are in
order, whatever slots they had) and a manifest. The manifest comes last, in a folder that gets its name last of all:
what an interrupted conversion leaves behind never loads.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from jaxmoe.checkpoints.safetensors import read_json
from jaxmoe.checkpoints.writer import first_slots
from jaxmoe.errors import CheckpointError, ConfigError
from jaxmoe.models.config import ModelConfig
from jaxmoe.models.keys import Keys
from jaxmoe.models.parameters import flat

MANIFEST, PARAMS, VERSION = "jaxmoe.json", "params", 1
# What comes along beside config.json, where it is there.
BESIDE = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
    "chat_template.json", "chat_template.jinja",
)  # fmt: skip


def is_native(folder: Path) -> bool:
    """Whether the folder is of this format. Raises CheckpointError on one whose conversion did not finish."""
    if not (folder / MANIFEST).exists():
        if (folder / PARAMS).is_dir():
            raise CheckpointError(
                f"{folder} has no {MANIFEST}: its conversion did not finish; delete it, convert again"
            )
        return False
    version = read_json(folder / MANIFEST).get("version")
    if version != VERSION:
        raise CheckpointError(
            f"{folder / MANIFEST}: version={version!r} is not {VERSION}; convert the checkpoint again"
        )
    return True


@contextlib.contextmanager
def finished_folder(target: Path, force: bool) -> Iterator[Path]:
    """A new folder to write to, which becomes `target` by one rename when all went well, and is gone if not.

    Raises ConfigError where something is in the way that `force` does not allow to replace.
    """
    if target.exists() and not force:
        raise ConfigError(f"{target} exists; choose another name, or replace it with --force")
    unfinished, replaced = (target.with_name(f"{target.name}.{state}") for state in ("unfinished", "replaced"))
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        _sync(unfinished)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        unfinished.rename(target)
        _sync(target.parent, below=False)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def save_native(
    out: Path,
    hf: Mapping[str, Any],
    keys: Keys,
    config: ModelConfig,
    params: Mapping[str, Any],
    slot_expert: np.ndarray,
    mesh: jax.sharding.Mesh,
) -> int:
    """Writes config.json, parameters and manifest into an empty folder; returns the bytes of the parameters."""
    leaves = dict(flat(params))
    if not _in_order(slot_expert, config):
        slots = np.stack([first_slots(row, config) for row in slot_expert])
        for path in [path for path in leaves if keys[path].per_expert]:
            with jax.set_mesh(mesh):
                whole = jax.sharding.reshard(leaves[path], P())
            leaves[path] = _take(whole, slots, mesh, P())
    ocp.save((out / PARAMS).resolve(), leaves)
    (out / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    described = {path: {"shape": list(leaf.shape), "dtype": leaf.dtype.name} for path, leaf in leaves.items()}
    manifest = {"version": VERSION, "model_type": config.model_type, "parameters": described}
    _sync(out)
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return sum(leaf.nbytes for leaf in leaves.values())


def load_native(
    folder: Path,
    abstract: nnx.Module,
    keys: Keys,
    config: ModelConfig,
    slot_expert: np.ndarray,
    mesh: jax.sharding.Mesh,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """The parameters of `abstract` as a plain nested dict of arrays, each device reading its own shard.

    Raises CheckpointError where the folder's parameters are not those of its config.
    """
    manifest = read_json(folder / MANIFEST)["parameters"]
    leaves = dict(flat(nnx.to_pure_dict(nnx.state(abstract))))
    specs = dict(flat(nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(abstract)))))
    in_order, wanted = _in_order(slot_expert, config), {}
    for path, leaf in leaves.items():
        shape, spec = leaf.shape, specs[path]
        if keys[path].per_expert and not in_order:
            shape = (shape[0], config.experts, *shape[2:])
            spec = P(spec[0], None, *spec[2:])  # the mesh may not divide the experts; slots are made of them below
        wanted[path] = jax.ShapeDtypeStruct(shape, _stored_dtype(manifest, path), sharding=NamedSharding(mesh, spec))
    stored = {path: tuple(entry["shape"]) for path, entry in manifest.items()}
    if stored != {path: one.shape for path, one in wanted.items()}:
        differing = sorted(
            path
            for path in stored.keys() | wanted.keys()
            if stored.get(path) != getattr(wanted.get(path), "shape", None)
        )
        raise CheckpointError(f"{folder} does not hold what its config.json promises: {', '.join(differing[:20])}")
    total = sum(int(np.prod(one.shape)) * one.dtype.itemsize for one in wanted.values())
    progress(0, total)
    loaded = ocp.load((folder / PARAMS).resolve(), wanted)
    params: dict[str, Any] = {}
    for path in list(loaded):
        array = loaded.pop(path)
        if keys[path].per_expert and not in_order:
            array = _take(array, slot_expert, mesh, specs[path])
        if array.dtype != leaves[path].dtype:
            array = jax.jit(lambda x, to=leaves[path].dtype: x.astype(to), donate_argnums=0)(array)
        *parents, name = path.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    progress(total, total)
    return params


def _in_order(slot_expert: np.ndarray, config: ModelConfig) -> bool:
    """Whether slots are the experts in order, as they are stored."""
    return all(np.array_equal(row, np.arange(config.experts)) for row in slot_expert)


def _stored_dtype(manifest: Mapping[str, Any], path: str) -> jnp.dtype:
    return jnp.dtype(manifest[path]["dtype"]) if path in manifest else jnp.dtype("float32")


def _take(array: jax.Array, places: np.ndarray, mesh: jax.sharding.Mesh, spec: P) -> jax.Array:
    """array[row, places[row, i]] at [row, i], laid out by `spec`."""
    rows = np.arange(len(places))[:, None]
    with jax.set_mesh(mesh):
        return jax.jit(lambda x: x.at[rows, places].get(out_sharding=spec))(array)


def _sync(folder: Path, below: bool = True) -> None:
    """On disk, whatever happens to the machine next."""
    for path in [folder, *(folder.rglob("*") if below else ())]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
