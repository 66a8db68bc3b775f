"""Rows times one layer's matrix of a stack. `implementation`: "xla", or "native" on a CPU (`ops/native.py`)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from jaxmoe.ops import native

# Of every op that has kernels of its own: "native" is `ops/native.py`, "xla" works anywhere.
Kernels = Literal["xla", "native"]
TPU_LANES = 128  # numbers side by side in a tile of a TPU's memory: a shorter last axis is padded, or not the last


@functools.partial(jax.tree_util.register_dataclass, data_fields=["in_use"], meta_fields=["kernels"])
@dataclasses.dataclass(frozen=True)
class Compute:
    """How linear layers are computed: by which kernels, and of how many rows.

    in_use: how many of all rows, on each rank or on the one whose part this is, are not padding, which comes last; None
        if that is not known. "native" spends nothing on the others, which are 0; "xla" computes all.
    """

    kernels: Kernels = "xla"
    in_use: Int[Array, "*R"] | None = None

    @property
    def of_rank(self) -> "Compute":
        """On the one rank whose part this is, inside of a shard_map over ranks."""
        return self if self.in_use is None else dataclasses.replace(self, in_use=self.in_use[0])


def linear(
    x: Float[Array, "*rows K"],
    stacks: Sequence[Float[Array, "_L K *_N"]],
    layer: int | Int[Array, ""] = 0,
    compute: Compute = Compute(),
) -> list[Array]:
    """x meets the layer's matrix of each stack: [*rows, *N] for each, in x's dtype, summed in float32.

    Stacks are indexed within, so that "native" copies no layer; and all of them in one call.
    """
    if compute.kernels == "native":
        return native.linear(x, stacks, layer, compute.in_use)
    return [jnp.tensordot(x, of_layer(stack, layer), 1) for stack in stacks]


def linear_transposed(
    x: Float[Array, "*rows K"], table: Float[Array, "N K"], implementation: Kernels = "xla"
) -> Float[Array, "*rows N"]:
    """x times a matrix that lies the other way round, in x's dtype."""
    if implementation == "native":
        return native.linear_transposed(x, table)
    return jnp.einsum("...k,nk->...n", x, table)


def linear_by_head(
    x: Float[Array, "*rows H K"],
    stack: Float[Array, "_L R H W"],
    layer: int | Int[Array, ""] = 0,
    columns: slice = slice(None),
    transposed: bool = False,
    implementation: Kernels = "xla",
) -> Float[Array, "*rows H N"]:
    """Each head of x meets a matrix of its own: some `columns` of W, and all of R.

    The sum goes over R (K = R) and N are the columns; transposed, it goes over the columns (K) and N = R.
    """
    if implementation == "native":
        return native.linear_by_head(x, stack, layer, columns, transposed)
    matrices = of_layer(stack, layer)[..., columns]
    return jnp.einsum("...hw,rhw->...hr" if transposed else "...hr,rhw->...hw", x, matrices)


def of_layer(stack: Float[Array, "_L *axes"], layer: int | Int[Array, ""]) -> Float[Array, "*axes"]:
    """The layer's matrix.

    A matmul on a TPU may want its axes in another order than they lie in. XLA asks for that of the whole stack, and if
    several loops read it, copies it all before the first. Held to its order, a layer is turned when its turn comes.
    """

    def hold(matrix: Array) -> Array:
        return with_layout_constraint(matrix, Layout(tuple(range(matrix.ndim))))

    matrix = stack[layer]
    if matrix.shape[-1] % TPU_LANES:
        # Lies on a TPU in an order that is for XLA to choose.
        return matrix
    return jax.lax.platform_dependent(matrix, tpu=hold, default=lambda matrix: matrix)
