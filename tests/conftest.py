"""Eight virtual devices, checked shapes, compiled programs kept between runs, and checkpoints with known logits."""

import gc
import importlib.metadata
import os

os.environ["HF_HUB_OFFLINE"] = "1"
# XLA:CPU runs out of threads, and hangs, with several launches with collectives in flight on more devices than cores.
os.environ["NPROC"] = "16"
# Most of the tests' time is compiling programs that run once: less careful code comes up to four times as fast.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_backend_optimization_level=0",
        # Later releases abort on this one.
        *["--xla_cpu_use_fusion_emitters=false"] * importlib.metadata.version("jaxlib").startswith("0.10."),
    ]
)

import jax
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=320, help="how many requests of any kind a server is sent")


def pytest_collection_finish() -> None:
    # Looking for garbage among what stays, and among what tracing makes by the million, takes a tenth of the time.
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def pytest_configure(config: pytest.Config) -> None:
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="session")
def reference_checkpoint(tmp_path_factory):
    """A factory of tiny random checkpoints: `reference_checkpoint("llama4", head_dim=4, edit={"moe_layers": []})`.

    family: "mixtral", "deepseek_v3" or "llama4"; further keywords change the tiny config of that family.
    edit, remove: changes to the saved config.json (to its text_config, where it has one), and keys taken out of it,
        before either side reads it.
    unread: changes to it that transformers does not get to see, since it would refuse what others take.
    add: shapes by name of tensors that the files hold besides.
    shard, dtype: `max_shard_size` and element type of its files.
    fused: experts of a layer in one tensor. multimodal: Llama 4's text inside its wrapper, beside a vision tower.
    fp8: linear weights as DeepSeek-V3 publishes them, a scale for every block of this shape.
    correction: what is added to all biases by which DeepSeek-V3 chooses experts.
    The same call gives the same checkpoint.
    """
    import torch
    from references import Reference, write_reference
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(1)
    made: dict[str, Reference] = {}

    def make(
        family="mixtral",
        *,
        edit=None,
        remove=(),
        unread=None,
        add=None,
        shard="1GB",
        dtype="float32",
        fused=False,
        multimodal=False,
        fp8=None,
        correction=0.0,
        **overrides,
    ):
        options = {
            "edit": edit or {}, "remove": remove, "unread": unread or {}, "add": add or {}, "shard": shard,
            "dtype": dtype, "fused": fused, "multimodal": multimodal, "fp8": fp8, "correction": correction,
            "overrides": overrides,
        }  # fmt: skip
        key = repr((family, options))
        if key not in made:
            made[key] = write_reference(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def further_layer(reference_checkpoint, tmp_path_factory):
    """A factory of DeepSeek-V3 checkpoints with a layer that predicts a token more; new files with every call."""
    from references import write_further_layer

    def make(*, copies=False, **overrides):
        reference = reference_checkpoint("deepseek_v3", num_nextn_predict_layers=1, **overrides)
        like = reference_checkpoint("deepseek_v3", **{**overrides, "num_hidden_layers": 1, "first_k_dense_replace": 0})
        return write_further_layer(tmp_path_factory.mktemp("further_layer"), reference, like, copies)

    return make
