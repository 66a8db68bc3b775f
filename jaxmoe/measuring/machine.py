"""What this machine can do, measured through JAX: bytes read and numbers multiplied a second."""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxmoe.moe.strategy import LINKS, Link
from jaxmoe.planning.hardware import GB, GIB, Device

CACHES, MEMORY = Path("/sys/devices/system/cpu/cpu0/cache"), Path("/proc/meminfo")
TIMES = 5
STREAMED = 2**30  # bytes, unless a cache asks for more or memory for less
ROWS = 512  # of the array that is read: each is one thread's
SIDE = 2048  # of the matrices that are multiplied
SUFFIXES = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Machine:
    """platform: JAX's name. kind: of its devices. bandwidth: bytes/s that a stream reads, all threads together.

    flops: floating-point operations a second in a product of large matrices, by bytes of a number (float32, bfloat16).
    cache: bytes of the largest cache; 0 if it is not known. streamed: bytes that were read.
    All are of one device; virtual devices of a CPU share them.
    """

    platform: str
    kind: str
    bandwidth: float
    flops: dict[int, float]
    cache: int
    streamed: int

    def describe(self) -> str:
        rates = ", ".join(
            f"{self.flops[size] / GB:,.0f} GFLOP/s in {name}" for size, name in ((4, "float32"), (2, "bfloat16"))
        )
        return f"{self.kind}: reads {self.bandwidth / GB:.1f} GB/s ({self.streamed / GIB:.1f} GiB at once), {rates}"

    def device(self, devices: int) -> Device:
        """One of as many devices as a mesh has, in the planner's terms; virtual ones have a part of the machine each.

        What virtual devices send each other is read from memory.
        """
        parts = devices if self.platform == "cpu" else 1
        flops = {size: rate / parts for size, rate in self.flops.items()}
        bandwidth = self.bandwidth / parts
        link = Link(0.0, bandwidth) if self.platform == "cpu" else LINKS[self.platform]
        return Device(self.kind, self.platform, math.inf, bandwidth, flops, devices, link, link)


def measure_machine() -> Machine:
    """Takes some seconds, and a quarter of free memory at most. The best of several tries: others may be at work."""
    device = jax.devices()[0]
    cache = largest_cache(CACHES) if device.platform == "cpu" else 0
    size = min(max(STREAMED, 4 * cache), _free() // 4 if device.platform == "cpu" else STREAMED)
    row = size // ROWS // 4
    array = jax.device_put(jnp.ones((ROWS, row), jnp.float32), device)
    # The maximum of each row: cheap enough for memory to be what it waits for, and nothing to write.
    seconds = _best(jax.jit(lambda array: jnp.max(array, axis=1)), array)
    streamed = array.nbytes
    del array
    flops = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        matrix = jax.device_put(jnp.ones((SIDE, SIDE), dtype), device)
        flops[jnp.dtype(dtype).itemsize] = 2 * SIDE**3 / _best(jax.jit(lambda a: a @ a), matrix)
    return Machine(device.platform, device.device_kind, streamed / seconds, flops, cache, streamed)


def _best(fn: Callable[[jax.Array], jax.Array], array: jax.Array) -> float:
    """Seconds that the fastest of several calls takes, the first not counted."""
    fn(array).block_until_ready()
    times = []
    for _ in range(TIMES):
        began = time.perf_counter()
        fn(array).block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times)


def largest_cache(folder: Path) -> int:
    """Bytes of a processor's largest cache, as Linux tells; 0 where nothing does."""
    sizes = []
    for file in folder.glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * SUFFIXES.get(text[-1:], 1))
    return max(sizes, default=0)


def _free() -> int:
    """Bytes of memory that a program can have; on Linux with what the page cache would give up."""
    for line in MEMORY.read_text().splitlines() if MEMORY.exists() else []:
        name, _, size = line.partition(":")
        if name == "MemAvailable":
            return int(size.split()[0]) * SUFFIXES["K"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
