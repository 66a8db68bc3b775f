"""Virtual devices: one CPU acting as many, with the very code that runs on accelerators; and a CPU's memory."""

import ctypes
import os
from typing import Any

import jax

from jaxmoe.errors import MeshError

# Seconds after which XLA complains of, and aborts over, a collective that some device has not reached. Devices that
# share a few cores may be far apart in a long step: after the 20 and 40 of its defaults nothing need be wrong.
PATIENCE = {
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 300,
    "xla_cpu_collective_call_terminate_timeout_seconds": 1800,
}


def virtual_devices(count: int) -> None:
    """Makes the CPU act as at least `count` devices.

    Has no effect on accelerators; raises MeshError once it is too late.
    """
    settings: Any = jax.config  # whose options some of its releases declare, and some do not
    if settings.jax_num_cpu_devices >= count:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        # JAX fixes the number of devices when it is first used.
        if len(jax.devices()) < count and jax.devices()[0].platform == "cpu":
            raise MeshError(
                f"{count} devices are needed and JAX already runs with {len(jax.devices())}; "
                f"call jaxmoe.virtual_devices({count}) or load the largest mesh before any other JAX computation"
            ) from None
    else:
        # XLA sizes its thread pool by the cores it believes it has. With fewer threads than devices that wait for each
        # other in collectives, it deadlocks (jaxlib up to 0.11); it reads this variable when the backend starts.
        os.environ.setdefault("NPROC", str(2 * count))
        given = os.environ.get("XLA_FLAGS", "")
        patience = [f"--{flag}={seconds}" for flag, seconds in PATIENCE.items() if flag not in given]
        os.environ["XLA_FLAGS"] = " ".join(filter(None, [given, *patience]))


HUGE_PAGE = 2 << 20
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # <linux/mman.h>


def use_huge_pages(tree: Any) -> None:
    """Has Linux move large arrays on a CPU into huge pages, where they lie; no effect anywhere else.

    Weights are read in runs of a few hundred bytes, each from a row of its own and so, in pages of 4 KiB, each by an
    address that must be looked up first: that halves the rate.
    """
    try:
        madvise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for array in jax.tree.leaves(tree):
        if array.nbytes < HUGE_PAGE or next(iter(array.devices())).platform != "cpu":
            continue
        for shard in array.addressable_shards:
            start = shard.data.unsafe_buffer_pointer()
            begin, end = -(-start // HUGE_PAGE) * HUGE_PAGE, (start + shard.data.nbytes) // HUGE_PAGE * HUGE_PAGE
            if begin < end:
                for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
                    madvise(begin, end - begin, advice)
