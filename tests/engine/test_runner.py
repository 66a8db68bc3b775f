import types

import jax.numpy as jnp
import pytest

from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.runner import ACCELERATOR_SHARE, CPU_SHARE, free_memory, page_groups
from jaxmoe.errors import ConfigError
from jaxmoe.models.config import rules_for
from jaxmoe.models.kv_cache import bytes_per_page
from jaxmoe.models.presets import read_preset
from jaxmoe.models.registry import family_of
from jaxmoe.sharding.mesh import MeshSpec
from jaxmoe.spans import FULL, Span

CHUNK = Span("chunk", 8192)


def model_of(preset, gib, tp=1, **edit):
    """As much of a model on an accelerator as sizing its cache looks at. gib: free for pages on each device."""
    hf = {**read_preset(preset), **edit}
    memory = {"bytes_limit": int(gib * 2**30 / ACCELERATOR_SHARE) + 1, "bytes_in_use": 0}
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: memory)
    config = family_of(hf).read_config(hf)
    return types.SimpleNamespace(
        config=config,
        dtype=jnp.dtype(jnp.bfloat16),
        mesh_spec=MeshSpec(tp=tp),
        rules=rules_for(config, MeshSpec(tp=tp)),
        mesh=types.SimpleNamespace(devices=types.SimpleNamespace(flat=[device])),
    )


def pages_of(model, max_context, **limits):
    groups = page_groups(model, EngineConfig(**limits), max_context)
    assert tuple(group.span for group in groups) == model.config.spans
    return {group.span: group.pages_per_rank for group in groups}


def gib_of(model, pages):
    each = (bytes_per_page(model.config, group, 16, model.dtype, model.rules) for group in range(len(pages)))
    return sum(count * size for count, size in zip(pages.values(), each, strict=True)) / 2**30


def test_memory_enough_gives_a_full_batch_at_full_context_but_short_spans_only_what_they_see():
    scout = model_of("llama-4-scout", gib=1000)
    # A chunk begins at a page's first token: 8192 tokens and the 255 others of a prefill step.
    assert pages_of(scout, 65536) == {CHUNK: 64 * 528, FULL: 64 * 4096}
    assert pages_of(scout, 4096) == {CHUNK: 64 * 256, FULL: 64 * 256}


def test_memory_too_small_is_used_to_the_last_page_and_short_spans_still_serve_a_full_batch():
    scout = model_of("llama-4-scout", gib=100)
    pages = pages_of(scout, 65536)
    assert pages[CHUNK] == min(pages[FULL], 64 * 528)
    assert 99.99 < gib_of(scout, pages) <= 100


def test_one_context_fits_if_it_can_although_fewer_sequences_then_do():
    scout = model_of("llama-4-scout", gib=50)
    pages = pages_of(scout, 524288)
    assert pages[FULL] >= 32768
    assert 528 <= pages[CHUNK] < 64 * 528
    assert 49 < gib_of(scout, pages) <= 50
    with pytest.raises(ConfigError, match=r"51200 MiB a device.*less than one context of 2097152; use a smaller"):
        pages_of(scout, 2097152)


def test_windows_alone_need_no_memory_for_the_context():
    mixtral = model_of("mixtral-8x7b", gib=40, sliding_window=4096)
    assert pages_of(mixtral, 32768) == {Span("window", 4096): 64 * 273}


def test_pages_asked_for_are_those_of_the_widest_span_and_the_others_follow():
    scout = model_of("llama-4-scout", gib=1)
    assert pages_of(scout, 65536, pages_per_rank=50000) == {CHUNK: 64 * 528, FULL: 50000}
    assert pages_of(scout, 65536, pages_per_rank=500) == {CHUNK: 500, FULL: 500}
    mixtral = model_of("mixtral-8x7b", gib=1, sliding_window=4096)
    assert pages_of(mixtral, 32768, pages_per_rank=7) == {Span("window", 4096): 7}


def test_tensor_parallelism_splits_keys_and_values_but_no_latent():
    limits = {"max_batch": 1000, "page_size": 16}
    for preset, more in [("mixtral-8x7b", 4), ("deepseek-v3", 1)]:
        (alone,), (split,) = (pages_of(model_of(preset, gib=8, tp=tp), 32768, **limits).values() for tp in (1, 4))
        assert split // alone == more


def test_a_cpu_gives_a_share_of_what_weights_leave_of_the_machine_whatever_else_is_running(monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: None)
    weights = types.SimpleNamespace(
        shape=(4, 2**26),
        dtype=jnp.dtype(jnp.float32),
        sharding=types.SimpleNamespace(shard_shape=lambda shape: (1, 2**26)),
    )
    model = types.SimpleNamespace(
        mesh_spec=MeshSpec(ep=4),
        mesh=types.SimpleNamespace(devices=types.SimpleNamespace(flat=[device])),
        params={"experts": weights},
    )
    # What is free is not asked for, so that the next start finds the programs of this one.
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 17 * 2**30 // 4096}.__getitem__)
    assert free_memory(model) == (17 * 2**30 // 4 - 2**28) * CPU_SHARE
