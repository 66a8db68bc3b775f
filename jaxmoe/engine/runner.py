"""Runs a step's plan on the device: packs, launches, and reads the sampled tokens back."""

import os

import jax
import numpy as np

from jaxmoe.engine.batch import Buckets, Ranks, pack
from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.executables import Executables
from jaxmoe.engine.model import Model, Progress, no_progress
from jaxmoe.engine.scheduler import StepPlan
from jaxmoe.errors import ConfigError
from jaxmoe.models.kv_cache import bytes_per_page, make_cache

# Share of the memory that is free after the weights are loaded, for KV pages: on an accelerator nothing else needs it
# but the activations; on a CPU the rest of the machine does.
ACCELERATOR_SHARE, CPU_SHARE = 0.85, 0.25


class Runner:
    """Owns the KV cache and the compiled steps of one model."""

    def __init__(self, model: Model, config: EngineConfig, progress: Progress = no_progress) -> None:
        self.model = model
        limit = model.config.max_position
        self.max_context = config.max_context or limit
        if self.max_context > limit:
            raise ConfigError(
                f"max_context={self.max_context} is beyond the model's {limit} positions; use at most {limit}"
            )
        self.pages_per_rank = config.pages_per_rank or default_pages(model, config, self.max_context)
        self._cache = make_cache(model.config, model.mesh, self.pages_per_rank, config.page_size, model.dtype)
        self._buckets = Buckets(config, self.max_context)
        self.executables = Executables(model, self._cache)
        if config.warm_up:
            self.executables.warm_up(self._buckets, progress)

    @property
    def cache_bytes(self) -> int:
        """Bytes of KV cache on one attention rank, over its `tp` devices."""
        return sum(array.nbytes for array in self._cache) // self.model.num_ranks

    def run(self, plan: StepPlan) -> dict[str, tuple[int, float]]:
        """Token and log-probability, by request id, of every chunk of the plan that samples."""
        calls = self._buckets.prefills(plan.prefills) if any(plan.prefills) else []
        if any(plan.decodes):
            calls.append((self._buckets.decode_shape(plan.decodes), plan.decodes))
        launched: list[tuple[Ranks, jax.Array]] = []
        for shape, ranks in calls:
            self._cache, out = self.executables(shape, self._cache, pack(shape, ranks))
            launched.append((ranks, out))
        sampled: dict[str, tuple[int, float]] = {}
        for ranks, out in launched:
            words = np.asarray(out)
            logprobs = words[..., 1].view(np.float32)
            for rank, chunks in enumerate(ranks):
                for row, chunk in enumerate(chunks):
                    if chunk.samples:
                        sampled[chunk.sequence.request.id] = (int(words[rank, row, 0]), float(logprobs[rank, row]))
        return sampled


def default_pages(model: Model, config: EngineConfig, max_context: int) -> int:
    """Pages for a full batch at full context, or as many as the memory left over holds.

    Raises ConfigError if under one context.
    """
    device = model.mesh.devices.flat[0]
    per_context = -(-max_context // config.page_size)
    page = bytes_per_page(model.config, config.page_size, model.dtype) // model.mesh_spec.tp
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        memory = int((stats["bytes_limit"] - stats["bytes_in_use"]) * ACCELERATOR_SHARE)
    else:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        memory = int(machine * CPU_SHARE) // model.mesh_spec.num_devices
    pages = min(config.max_batch * per_context, memory // page)
    if pages < per_context:
        raise ConfigError(
            f"the memory left for KV pages ({memory / 2**20:.0f} MiB a device) holds {pages * config.page_size} "
            f"tokens, less than one context of {max_context}; use a smaller --max-context or more devices"
        )
    return pages
