"""Attention over a paged cache: writing what is new, reading what some query sees.

A block table names, for each sequence, the pages that hold its context in order, beginning at position `first`, a
multiple of the page size: token p of a sequence lies in page table[(p - first) // page_size], place p % page_size. A
table's unused tail may hold any page: what lies there is at positions that no query has reached.

A batch is a row for each sequence, or all tokens of all sequences in one row (`Pieces`), so that many short and few
long pieces of sequences go together without padding.

`implementation`: "xla" gathers the whole context that a table has room for; "native" (`ops/native.py`, on a CPU) reads
the pages in use, where they lie. With all tokens in one row "xla" gathers the context of each token, which only serves
as a reference.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.ops import native
from jaxmoe.ops.attention import attention, causal_mask
from jaxmoe.ops.linear import Kernels, linear
from jaxmoe.spans import Span


class Pieces(NamedTuple):
    """Of a batch whose tokens lie in one row: where those of each sequence begin in it, and where the last one's end.

    decoding: which rows, of the first ones, are of sequences that decode. They come first; more than `most` rows they
        never have.
    """

    begins: Int[Array, "*R S_and_one"]
    decoding: Bool[Array, "*R most"]


class Where(NamedTuple):
    """The layer of the cache, and where each of a batch's S sequences lies in it."""

    layer: int | Int[Array, ""]
    table: Int[Array, "S pages"]
    first: Int[Array, "S"]
    pieces: Pieces | None = None

    @property
    def begins(self) -> Int[Array, "S_and_one"] | None:
        return None if self.pieces is None else self.pieces.begins


def side_by_side(first: Int[Array, "B"]) -> Where:
    """Where sequences lie in an array [1, B, T, ...] of their own vectors: each is one page, from position `first`."""
    return Where(0, jnp.arange(first.shape[0], dtype=jnp.int32)[:, None], first)


def write(
    pages: tuple[Float[Array, "_L _P page *_vector"], ...],
    new: tuple[Float[Array, "B T *_vector"], ...],
    positions: Int[Array, "B T"],
    where: Where,
    implementation: Kernels = "xla",
) -> tuple[Array, ...]:
    """Puts every token's vector in its place of a layer, in each of the arrays. Padding (-1) is written nowhere.

    Where an array has room for longer vectors than these, zeros fill it.
    """
    new = tuple(_filled(vectors, array.shape[-1]) for vectors, array in zip(new, pages, strict=True))
    if implementation == "native":
        return native.write(pages, new, positions, *where[:3], where.begins)
    if where.pieces is not None:
        by_token, rows = _by_token(where, positions.shape[1]), (vectors.swapaxes(0, 1) for vectors in new)
        return write(pages, tuple(rows), positions.swapaxes(0, 1), by_token)
    layer, table, first, _ = where
    page_size = pages[0].shape[2]
    page = jnp.take_along_axis(table, jnp.maximum(positions - first[:, None], 0) // page_size, axis=1)

    def written(old: Array, vectors: Array) -> Array:
        # Padding goes to a page that does not exist.
        where = jnp.where(positions < 0, old.shape[1], page)
        return old.at[layer, where, positions % page_size].set(vectors.astype(old.dtype), mode="drop")

    return tuple(map(written, pages, new))


def _by_token(where: Where, tokens: int) -> Where:
    """As if every token of the one row were a sequence."""
    assert where.pieces is not None
    of_token = jnp.sum(jnp.arange(tokens)[:, None] >= where.pieces.begins[1:], axis=1)
    table, first = (each.at[of_token].get(mode="clip") for each in (where.table, where.first))
    return Where(where.layer, table, first)


def read(pages: Float[Array, "L P page *vector"], where: Where) -> Float[Array, "S Tk *vector"]:
    """The whole context that the table names, in order of position."""
    gathered = pages[where.layer, where.table]
    batch, count, page_size, *vector = gathered.shape
    return gathered.reshape(batch, count * page_size, *vector)


def positions_of(where: Where, page_size: int) -> Int[Array, "S Tk"]:
    """The position of every token that `read` returns."""
    return where.first[:, None] + jnp.arange(where.table.shape[1] * page_size)


def attend(
    query: Float[Array, "B T H d"],
    positions: Int[Array, "B T"],
    pages: tuple[Float[Array, "_L _P page *_vector"], ...],
    where: Where,
    scale: float,
    span: Span,
    value_dim: int,
    implementation: Kernels = "xla",
) -> Float[Array, "B T H dv"]:
    """Attention of queries at `positions` (-1: padding, whose rows mean nothing) over what the cache holds.

    pages: of keys and of values, or one array for both; vectors [Kv, w], or [w] of one head. A value is the first dv
    numbers of what there is for a token and head; a query may be shorter than what it meets, which then ends in zeros.
    Scores and softmax in float32.
    """
    query = _filled(query, pages[0].shape[-1])
    if implementation == "native":
        return native.attend(query, positions, pages[0], pages[-1], *where[:3], where.begins, scale, span, value_dim)
    if where.pieces is not None:
        by_token = _by_token(where, positions.shape[1])
        out = attend(query.swapaxes(0, 1), positions.swapaxes(0, 1), pages, by_token, scale, span, value_dim)
        return out.swapaxes(0, 1)
    held = [read(array, where).astype(query.dtype) for array in pages]
    held = [array if array.ndim == 4 else array[:, :, None] for array in held]
    mask = causal_mask(positions, positions_of(where, pages[0].shape[2]), span)
    return attention(query, held[0], held[-1][..., :value_dim], mask, scale)


def attend_latent(
    query: Float[Array, "B T H d"],
    positions: Int[Array, "B T"],
    entries: Float[Array, "L P page w"],
    where: Where,
    key_value: Float[Array, "_L r H m"],
    layer: int | Int[Array, ""],
    scale: float,
    span: Span,
    value_dim: int,
    implementation: Kernels = "xla",
) -> Float[Array, "B T H dv"]:
    """`attend` with every head's keys and values made, by the layer's `key_value`, of the latents that the cache holds.

    An entry of the cache is a token's latent [r] and its rotated key [dr], which all heads share, and maybe room, of
    which "native" knows nothing; a query is its part that meets made keys [m - dv], then its rotated part.
    """
    if implementation == "native":
        return native.attend_latent(
            query, positions, entries, *where[:3], where.begins, key_value, layer, scale, span, value_dim
        )
    if where.pieces is not None:
        by_token, turned = _by_token(where, positions.shape[1]), (query.swapaxes(0, 1), positions.swapaxes(0, 1))
        return attend_latent(*turned, entries, by_token, key_value, layer, scale, span, value_dim).swapaxes(0, 1)
    held = read(entries, where).astype(query.dtype)
    rank, made_dim = key_value.shape[1], key_value.shape[3] - value_dim
    rope_dim = query.shape[-1] - made_dim
    (made,) = linear(held[..., :rank], [key_value], layer)
    rotated = jnp.broadcast_to(held[:, :, None, rank : rank + rope_dim], (*made.shape[:3], rope_dim))
    key = jnp.concatenate([made[..., :made_dim], rotated], axis=-1)
    mask = causal_mask(positions, positions_of(where, entries.shape[2]), span)
    return attention(query, key, made[..., made_dim:], mask, scale)


def _filled(vectors: Float[Array, "*axes w"], width: int) -> Float[Array, "*axes {width}"]:
    """With zeros behind them up to this width."""
    if vectors.shape[-1] == width:
        return vectors
    return jnp.pad(vectors, [(0, 0)] * (vectors.ndim - 1) + [(0, width - vectors.shape[-1])])
