"""Eight virtual devices, checked shapes, compiled programs kept between runs, and checkpoints with known logits."""

import dataclasses
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# XLA:CPU runs out of threads, and hangs, with several launches with collectives in flight on more devices than cores.
os.environ["NPROC"] = "16"
# The programs of tests are small: splitting each into 32 modules for parallel code generation only costs time.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_parallel_codegen_split_count=1"

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
# Before the first import of what it checks. The tower lets an int stand where a float is asked for.
install_import_hook(
    [
        "jaxmoe.ops",
        "jaxmoe.moe",
        "jaxmoe.models",
        *(f"jaxmoe.engine.{name}" for name in ("model", "batch", "executables")),
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

BASE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}


def pytest_configure(config: pytest.Config) -> None:
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A checkpoint on disk and what transformers makes of it: eager attention and experts, float32."""

    folder: Path
    model: Any
    tokens: np.ndarray  # [B, T]
    logits: np.ndarray  # [B, T, V]

    def logits_of(self, tokens: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad():
            return self.model(torch.tensor(np.asarray(tokens)), use_cache=False).logits.numpy()

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The `count` most likely tokens after the prompt, each computed anew from all before it."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits_of(np.array([tokens]))[0, -1].argmax()))
        return tokens[len(prompt) :]


def randomise(model: Any) -> None:
    """Weights large enough that routing and attention are not flat; each tensor seeded by its name."""
    import torch

    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if parameter.ndim == 1:
            values = 1 + 0.2 * values
        elif "embed_tokens" not in name:
            values *= 1.4 / math.sqrt(parameter.shape[-1])
        parameter.data.copy_(values)


@pytest.fixture(scope="session")
def reference_checkpoint(tmp_path_factory):
    """A factory of tiny random Mixtrals: `reference_checkpoint(num_key_value_heads=1, edit={"head_dim": None})`.

    edit, remove: changes to the saved config.json, and keys taken out of it, before either side reads it.
    shard, dtype: `max_shard_size` and element type of its files. The same call gives the same checkpoint.
    """
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(1)
    made: dict[str, Reference] = {}

    def make(*, edit=None, remove=(), shard="1GB", dtype="float32", **overrides):
        key = repr((edit, remove, shard, dtype, sorted(overrides.items())))
        if key in made:
            return made[key]
        folder = tmp_path_factory.mktemp("mixtral")
        model = MixtralForCausalLM(MixtralConfig(**{**BASE, **overrides})).eval()
        randomise(model)
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
        config = {**json.loads((folder / "config.json").read_text()), **(edit or {})}
        config = {name: value for name, value in config.items() if name not in remove}
        (folder / "config.json").write_text(json.dumps(config))
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        tokens = np.random.default_rng(0).integers(0, loaded.config.vocab_size, (2, 24))
        reference = Reference(folder, loaded, tokens, np.empty(0))
        made[key] = dataclasses.replace(reference, logits=reference.logits_of(tokens))
        return made[key]

    return make
