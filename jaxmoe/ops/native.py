"""Kernels in C++ (`kernels/`) for a CPU, compiled at first use where there is a compiler, and called by XLA's FFI.

What they compute, ops beside this one define: `linear`, `grouped_mlp` and `paged_attention`, whose XLA implementations
always work and are what the kernels are tested against. Results are bit-identical whatever else is in a batch.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.errors import ConfigError
from jaxmoe.ops.quantised import Quantised, Stack
from jaxmoe.spans import Span

log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("kernels")  # native.cc, which includes the headers beside it
BUILT = Path.home() / ".cache" / "jaxmoe" / "native"
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-w")
DTYPES = (jnp.dtype("float32"), jnp.dtype("bfloat16"))
HANDLERS = ("Linear", "Heads", "GroupedMlp", "Attend", "AttendLatent", "Write", "Greedy", "Sample")
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "relu": 3}
SPANS = {"full": 0, "window": 1, "chunk": 2}


def check_available() -> None:
    """Raises ConfigError, saying why, if the kernels cannot be had here."""
    if isinstance(built := _registered(), str):
        raise ConfigError(f"native kernels are not to be had: {built}; use kernels='xla'")


def choose(kernels: str, platform: str, dtype: jnp.dtype) -> Literal["xla", "native"]:
    """What "auto" comes to, or the choice itself: "xla" or "native". Raises ConfigError if it cannot be had.

    platform: what the program runs on, by JAX's name. Compiles the kernels if that has not been done yet.
    """
    if kernels not in ("auto", "xla", "native"):
        raise ConfigError(f"kernels={kernels!r} is not one of auto, native, xla")
    fits = platform == "cpu" and dtype in DTYPES
    if kernels == "native":
        if not fits:
            raise ConfigError(
                f"kernels='native' compute in {' or '.join(map(str, DTYPES))} on a CPU, not in {dtype} on {platform}; "
                "use kernels='xla'"
            )
        check_available()
    return "native" if kernels != "xla" and fits and not isinstance(_registered(), str) else "xla"


@functools.cache
def _registered() -> Any:
    """The library, its handlers known to XLA; or why there is none."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return f"no C++ compiler ({', '.join(COMPILERS)}) was found"
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.warning("native kernels could not be compiled, XLA's are used instead: %s", reason.strip()[-2000:])
        return f"compiling them failed: {reason.strip()[-500:]}"
    for name in HANDLERS:
        jax.ffi.register_ffi_target(_target(name), jax.ffi.pycapsule(getattr(library, f"Jaxmoe{name}")), platform="cpu")
    return library


def _build(compiler: str) -> Path:
    """Compiles the sources for this machine unless that was done before; several processes may at once."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256(
        "\0".join(
            [_source_hash(), version, *FLAGS, importlib.metadata.version("jaxlib"), platform.machine(), _cpu()]
        ).encode()
    )
    path = BUILT / f"{key.hexdigest()[:16]}.so"
    if not path.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=BUILT, suffix=".part")
        os.close(handle)
        try:
            command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", "-o", temporary, str(SOURCES / "native.cc")]
            subprocess.run(command, capture_output=True, text=True, check=True)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return path


def _cpu() -> str:
    """What the processor can do, which -march=native compiles for: a home folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@functools.cache
def _source_hash() -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]*")))).hexdigest()


def _target(name: str) -> str:
    """Unlike those of other versions, for which a program in the compile cache may have been compiled."""
    return f"jaxmoe_{name.lower()}_{_source_hash()[:8]}"


def linear(
    x: Float[Array, "*rows K"],
    stacks: Sequence[Float[Array, "_L K *_N"]],
    layer: int | Int[Array, ""],
    in_use: Int[Array, ""] | None = None,
) -> list[Array]:
    """See `ops.linear.linear`: x meets the layer's matrix of each stack."""
    check_available()
    leading = x.shape[:-1]
    flat = x.reshape(-1, x.shape[-1])
    shapes = [jax.ShapeDtypeStruct((flat.shape[0], *stack.shape[2:]), x.dtype) for stack in stacks]
    rows = jnp.int32(flat.shape[0]) if in_use is None else in_use
    outs = jax.ffi.ffi_call(_target("Linear"), shapes)(flat, jnp.asarray(layer, jnp.int32), rows, *stacks)
    return [out.reshape(*leading, *out.shape[1:]) for out in outs]


def linear_by_head(
    x: Float[Array, "*rows H K"],
    stack: Float[Array, "_L R H W"],
    layer: int | Int[Array, ""],
    columns: slice,
    transposed: bool,
) -> Float[Array, "*rows H N"]:
    """See `ops.linear.linear_by_head`."""
    check_available()
    begin, end, _ = columns.indices(stack.shape[3])
    flat = x.reshape(-1, *x.shape[-2:])
    shape = (*flat.shape[:2], stack.shape[1] if transposed else end - begin)
    call = jax.ffi.ffi_call(_target("Heads"), jax.ShapeDtypeStruct(shape, x.dtype))
    out = call(flat, jnp.asarray(layer, jnp.int32), stack, begin=np.int64(begin), transposed=transposed)
    return out.reshape(*x.shape[:-1], shape[2])


def linear_transposed(x: Float[Array, "*rows K"], table: Float[Array, "N K"]) -> Float[Array, "*rows N"]:
    """See `ops.linear.linear_transposed`."""
    check_available()
    flat = x.reshape(-1, 1, x.shape[-1])
    shape = jax.ShapeDtypeStruct((flat.shape[0], 1, table.shape[0]), x.dtype)
    call = jax.ffi.ffi_call(_target("Heads"), shape)
    return call(flat, jnp.int32(0), table, begin=np.int64(0), transposed=True).reshape(*x.shape[:-1], -1)


def grouped_mlp(
    x: Float[Array, "N D"],
    slots: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    gate_up: Stack,
    down: Stack,
    layer: int | Int[Array, ""],
    activation: str,
    weigh_input: bool,
) -> Float[Array, "N D"]:
    """See `ops.grouped_mlp.grouped_mlp`. Stacks of one MLP a layer have no axis S."""
    check_available()
    call = jax.ffi.ffi_call(_target("GroupedMlp"), jax.ShapeDtypeStruct(x.shape, x.dtype))
    stacks = [stack if isinstance(stack, Quantised) else Quantised(stack, jnp.ones(0)) for stack in (gate_up, down)]
    (gate_up, of_gate_up), (down, of_down) = stacks
    return call(
        x, slots, weights, jnp.asarray(layer, jnp.int32), gate_up, down, of_gate_up, of_down,
        activation=np.int32(ACTIVATIONS[activation]), weigh_input=weigh_input,
    )  # fmt: skip


def attend(
    query: Float[Array, "B T H d"],
    positions: Int[Array, "B T"],
    keys: Float[Array, "L P page *_keys"],
    values: Float[Array, "L P page *_values"],
    layer: int | Int[Array, ""],
    table: Int[Array, "S pages"],
    first: Int[Array, "S"],
    begins: Int[Array, "S_and_one"] | None,
    scale: float,
    span: Span,
    value_dim: int,
) -> Float[Array, "B T H dv"]:
    """See `ops.paged_attention.attend`."""
    begins = _begins(positions, begins)
    arrays = (positions, begins, table, first, jnp.asarray(layer, jnp.int32), keys, values)
    return _attention("Attend", query, arrays, scale, span, value_dim)


def attend_latent(
    query: Float[Array, "B T H d"],
    positions: Int[Array, "B T"],
    entries: Float[Array, "L P page w"],
    cached: int | Int[Array, ""],
    table: Int[Array, "S pages"],
    first: Int[Array, "S"],
    begins: Int[Array, "S_and_one"] | None,
    key_value: Float[Array, "_L r H m"],
    layer: int | Int[Array, ""],
    scale: float,
    span: Span,
    value_dim: int,
) -> Float[Array, "B T H dv"]:
    """See `ops.paged_attention.attend_latent`."""
    cached, layer = (jnp.asarray(index, jnp.int32) for index in (cached, layer))
    arrays = (positions, _begins(positions, begins), table, first, cached, entries, layer, key_value)
    return _attention("AttendLatent", query, arrays, scale, span, value_dim)


def _attention(
    name: str, query: Float[Array, "B T H d"], arrays: tuple[Array, ...], scale: float, span: Span, value_dim: int
) -> Float[Array, "B T H dv"]:
    check_available()
    shape = jax.ShapeDtypeStruct((*query.shape[:3], value_dim), query.dtype)
    how = {"scale": np.float32(scale), "span": np.int32(SPANS[span.kind]), "span_size": np.int64(span.size)}
    return jax.ffi.ffi_call(_target(name), shape)(query, *arrays, **how)


def write(
    pages: tuple[Array, ...],
    new: tuple[Array, ...],
    positions: Int[Array, "B T"],
    layer: int | Int[Array, ""],
    table: Int[Array, "S pages"],
    first: Int[Array, "S"],
    begins: Int[Array, "S_and_one"] | None,
) -> tuple[Array, ...]:
    """See `ops.paged_attention.write`: of several arrays at once, in place."""
    check_available()
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in pages]
    aliases = {5 + index: index for index in range(len(shapes))}
    call = jax.ffi.ffi_call(_target("Write"), shapes, input_output_aliases=aliases)
    cast = [array.astype(old.dtype) for array, old in zip(new, pages, strict=True)]
    begins = _begins(positions, begins)
    return tuple(call(positions, begins, table, first, jnp.asarray(layer, jnp.int32), *pages, *cast))


def _begins(positions: Int[Array, "B T"], begins: Int[Array, "S_and_one"] | None) -> Int[Array, "S_and_one"]:
    """Where each sequence's tokens begin among all, and the last one's end; without that, a row is a sequence."""
    if begins is not None:
        return begins
    batch, tokens = positions.shape
    return jnp.arange(batch + 1, dtype=jnp.int32) * tokens


def greedy(logits: Float[Array, "B V"]) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """See `ops.sampling.greedy`. Of float32."""
    check_available()
    shapes = [jax.ShapeDtypeStruct(logits.shape[:1], dtype) for dtype in (jnp.int32, jnp.float32)]
    best, log_sum = jax.ffi.ffi_call(_target("Greedy"), shapes)(logits)
    return best, log_sum


def sample(logits: Float[Array, "B V"], *how: Array) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """See `ops.sampling.sample`, whose further arguments `how` are. Of float32."""
    check_available()
    shapes = [jax.ShapeDtypeStruct(logits.shape[:1], dtype) for dtype in (jnp.int32, jnp.float32)]
    tokens, logprobs = jax.ffi.ffi_call(_target("Sample"), shapes)(logits, *how)
    return tokens, logprobs
