"""Checkpoint folders that come to be whole or not at all, and the small files that go from one to the next."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmoe.errors import CheckpointError
from jaxmoe.models.config import text_config
from jaxmoe.models.registry import family_of

UNFINISHED, REPLACED = ".jaxmoe-unfinished", ".jaxmoe-replaced"
# Beside weights and config.json: how text becomes tokens, what to sample with, on what terms the model is given away.
COMPANIONS = (
    "generation_config.json", "tokenizer*", "tokenization_*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.tiktoken", "tiktoken.model", "chat_template*", "*.jinja",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


def check_finished(folder: Path) -> None:
    """Raises CheckpointError for what an interrupted conversion left."""
    if folder.resolve().name.endswith(UNFINISHED):
        raise unfinished(folder)


def unfinished(folder: Path) -> CheckpointError:
    return CheckpointError(f"{folder}: its conversion did not finish; delete it and run convert again")


@contextlib.contextmanager
def new_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """An empty folder beside `target`, which becomes `target` by one rename once the block has filled it.

    After an error nothing is left of it; after a kill its name tells that it is not finished, and the next call empties
    it. replace: an existing checkpoint makes way at the very end.
    Raises CheckpointError if `target` exists and is not to be replaced, if another process fills it, or if it cannot be
    written.
    """
    target = Path(os.path.abspath(target))
    fresh, old = (target.with_name(target.name + suffix) for suffix in (UNFINISHED, REPLACED))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(fresh, target):
            if old.exists() and not target.exists():
                # A replacement was killed between its two renames.
                old.rename(target)
            _check_replaceable(target, replace)
            yield fresh
            _sync(fresh)
            if os.path.lexists(target):
                _check_replaceable(target, replace)
                shutil.rmtree(old, ignore_errors=True)
                target.rename(old)
            fresh.rename(target)
            _sync_one(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error


@contextlib.contextmanager
def _claimed(fresh: Path, target: Path) -> Iterator[None]:
    """Makes an empty folder that no other process fills, and removes it in the end if it is still there."""
    fresh.mkdir(exist_ok=True)
    handle = os.open(fresh, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{target} is being written by another process") from None
        except OSError:
            pass  # Some network file systems have no locks.
        try:
            for left in fresh.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    finally:
        os.close(handle)


def _check_replaceable(target: Path, replace: bool) -> None:
    if not os.path.lexists(target):
        return
    if not replace:
        raise CheckpointError(f"{target} exists; choose another name, or replace it with --force")
    if not (target / "config.json").exists():
        raise CheckpointError(f"{target} exists and is no checkpoint, so it is not replaced; choose another name")


def _sync(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync_one(Path(root, name))
        _sync_one(Path(root))


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_companions(source: Path, target: Path) -> None:
    """The files named in COMPANIONS, and what links among them point to."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def write_config(target: Path, hf: Mapping[str, Any], dtype: str, mtp_layers: int) -> None:
    """`config.json` of weights that were read under the config `hf` and are written in `dtype`, unquantised.

    Of a multimodal Llama 4 the text model, as a checkpoint of its own. mtp_layers: how many there really were.
    """
    config = dict(text_config(hf))
    if "text_config" in hf:
        config |= {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
        config["tie_word_embeddings"] = hf.get("tie_word_embeddings", False)
        if not any(key in config for key in ("eos_token_id", "bos_token_id")):
            config |= {key: hf[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id") if key in hf}
    config.pop("quantization_config", None)
    if family_of(config).read_config(config).mtp_layers != mtp_layers:
        # Some exporters keep the promise of further layers and leave their tensors out.
        config["num_nextn_predict_layers"] = mtp_layers
    # transformers 4 wrote torch_dtype, 5 writes dtype, and both are read by either.
    spelled = [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]
    config |= dict.fromkeys(spelled, dtype)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
