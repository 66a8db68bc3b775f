"""From a step's plan to the arrays of one compiled call: which shape, and one packed transfer to the device."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.pages import pages_reached
from jaxmoe.engine.scheduler import Chunk, StepPlan
from jaxmoe.ops.linear import Kernels
from jaxmoe.ops.paged_attention import Pieces
from jaxmoe.spans import Span

Ranks: TypeAlias = Seq[Seq[Chunk]]  # chunks of every attention rank

SHORT_CHUNK, FEW_TOKENS = 32, 64
SHORT_CONTEXT, LONG_CONTEXT = 256, 4096  # tokens of the shortest block tables, gathered and read in place


@dataclasses.dataclass(frozen=True, order=True)
class StepShape:
    """The shape of one compiled step, per attention rank: sequences, tokens of each, pages of context of each.

    A group of pages whose span is shorter than the context has tables of fewer pages: see `Packing.widths`.
    one_row: tokens are those of all sequences together, one sequence after the other.
    """

    batch: int
    tokens: int
    pages: int
    one_row: bool = False

    @property
    def rows(self) -> int:
        """Tokens that go through the model, padding included."""
        return self.tokens if self.one_row else self.batch * self.tokens

    def begins(self, chunks: Seq[Chunk]) -> list[int]:
        """The row of each chunk's first token, and the one after the last that there is."""
        if not self.one_row:
            return [index * self.tokens for index in range(len(chunks) + 1)]
        return [0, *itertools.accumulate(chunk.length for chunk in chunks)]

    def __str__(self) -> str:
        if self.one_row:
            return f"step tokens={self.tokens} batch={self.batch} pages={self.pages}"
        kind = "decode" if self.tokens == 1 else "prefill"
        return f"{kind} batch={self.batch} tokens={self.tokens} pages={self.pages}"


class Sampling(NamedTuple):
    """How each sequence's token is chosen: the arguments of `ops.sampling.sample` after the logits."""

    temperature: Float[Array, "*R B"]
    top_k: Int[Array, "*R B"]
    top_p: Float[Array, "*R B"]
    min_p: Float[Array, "*R B"]
    seed: Int[Array, "*R B"]
    position: Int[Array, "*R B"]

    def pack(self) -> Int[Array, "*R B fields"]:
        """As one array: each of a program's arrays costs a launch some microseconds."""
        words = [jax.lax.bitcast_convert_type(field, jnp.int32) for field in self]
        return jnp.stack(words, axis=-1)

    @classmethod
    def unpack(cls, packed: Int[Array, "*R B fields"]) -> "Sampling":
        fields = dict(zip(cls._fields, jnp.moveaxis(packed, -1, 0), strict=True))
        as_float = {name: jax.lax.bitcast_convert_type(fields[name], jnp.float32) for name in FLOATS}
        return cls(**{**fields, **as_float})


class Batch(NamedTuple):
    """A step's input, unpacked on the device: of one rank, or of all with a leading axis R.

    A sequence of length 0 is padding, and so is a token at position -1. tables, firsts, pieces: see `PagedContext`.
    """

    tokens: Int[Array, "*R rows T"]
    positions: Int[Array, "*R rows T"]
    pieces: Pieces | None
    tables: tuple[Int[Array, "*R B pages"], ...]
    firsts: tuple[Int[Array, "*R B"], ...]
    start: Int[Array, "*R B"]
    length: Int[Array, "*R B"]
    temperature: Float[Array, "*R B"]
    top_k: Int[Array, "*R B"]
    top_p: Float[Array, "*R B"]
    min_p: Float[Array, "*R B"]
    seed: Int[Array, "*R B"]

    @property
    def ends(self) -> Int[Array, "*R B"]:
        """The row of each sequence's last token; any row of padding."""
        if self.pieces is not None:
            return jnp.maximum(self.pieces.begins[..., 1:] - 1, 0)
        rows, tokens = self.tokens.shape[-2:]
        return jnp.arange(rows) * tokens + jnp.maximum(self.length - 1, 0)

    @property
    def sequences_in_use(self) -> Int[Array, "*R"] | None:
        return None if self.pieces is None else jnp.sum(self.length > 0, axis=-1, dtype=jnp.int32)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.seed, self.start + self.length)


PER_SEQUENCE = ("start", "length", "temperature", "top_k", "top_p", "min_p", "seed")
FLOATS = ("temperature", "top_p", "min_p")


@dataclasses.dataclass(frozen=True)
class Packing:
    """A batch as one int32 array: a single transfer to the device.

    spans: of the groups of KV pages. page_size: tokens of a page.
    """

    spans: tuple[Span, ...]
    page_size: int

    def widths(self, shape: StepShape) -> tuple[int, ...]:
        """Pages in a block table of each group."""
        return tuple(pages_reached(span, shape.tokens, self.page_size, shape.pages) for span in self.spans)

    def words(self, shape: StepShape) -> int:
        """int32 words of a packed batch, per rank."""
        return (
            shape.one_row + shape.rows + shape.batch * (sum(self.widths(shape)) + len(self.spans) + len(PER_SEQUENCE))
        )

    def pack(self, shape: StepShape, ranks: Ranks) -> Int[np.ndarray, "R words"]:
        """Everything a step needs; `unpack` is its inverse on the device."""
        packed = np.zeros((len(ranks), self.words(shape)), np.int32)
        for row, chunks in zip(packed, ranks, strict=True):
            if not chunks:
                continue
            fields, count = self._split(row, shape), len(chunks)
            if shape.one_row:
                fields["decodes"][:] = sum(map(_decodes, chunks))
            tokens: list[int] = []
            for begin, (sequence, start, length, _) in zip(shape.begins(chunks), chunks, strict=False):
                tokens += [0] * (begin - len(tokens))
                tokens += sequence.tokens[start : start + length]
            fields["tokens"][: len(tokens)] = tokens
            held = [chunk.sequence.tables for chunk in chunks]
            params = [chunk.sequence.request.params for chunk in chunks]
            for group, (table, first) in enumerate(zip(fields["tables"], fields["firsts"], strict=True)):
                # An assignment to a row of the array itself takes three times as long.
                cells, width = table.reshape(-1).data, table.shape[1]
                for at, each in zip(range(0, table.size, width), held, strict=False):
                    pages = each.pages[group]
                    cells[at : at + len(pages)] = pages
                first[:count] = [each.passed[group] * self.page_size for each in held]
            fields["start"][:count] = [chunk.start for chunk in chunks]
            fields["length"][:count] = [chunk.length for chunk in chunks]
            fields["temperature"].view(np.float32)[:count] = [each.temperature for each in params]
            fields["top_k"][:count] = [each.top_k for each in params]
            fields["top_p"].view(np.float32)[:count] = [each.top_p for each in params]
            fields["min_p"].view(np.float32)[:count] = [each.min_p for each in params]
            fields["seed"].view(np.uint32)[:count] = [(each.seed or 0) & 0xFFFFFFFF for each in params]
        return packed

    def unpack(self, packed: Int[Array, "words"], shape: StepShape) -> Batch:
        """One rank's batch."""
        fields = self._split(packed, shape)
        as_float = {name: jax.lax.bitcast_convert_type(fields[name], jnp.float32) for name in FLOATS}
        start, length = fields["start"], fields["length"]
        if shape.one_row:
            begins = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(length, dtype=jnp.int32)])
            row = jnp.arange(shape.tokens)
            sequence = jnp.sum(row[:, None] >= begins[1:], axis=1)
            at = start.at[sequence].get(mode="clip") + row - begins[sequence]
            positions, pieces = jnp.where(row < begins[-1], at, -1)[None], Pieces(begins, fields.pop("decodes")[0])
        else:
            pieces, offset = None, jnp.arange(shape.tokens)
            positions = jnp.where(offset < length[:, None], start[:, None] + offset, -1)
        fields["tokens"] = fields["tokens"].reshape(positions.shape)
        return Batch(**{**fields, **as_float, "positions": positions, "pieces": pieces})

    def _split(self, words: Any, shape: StepShape) -> dict[str, Any]:
        """Views of the fields of one rank's words."""
        batch, offset = shape.batch, 0

        def take(*axes: int) -> Any:
            nonlocal offset
            start, offset = offset, offset + math.prod(axes)
            return words[start:offset].reshape(axes)

        fields: dict[str, Any] = {"decodes": take(1)} if shape.one_row else {}
        fields["tokens"] = take(shape.rows)
        fields["tables"] = tuple(take(batch, width) for width in self.widths(shape))
        fields["firsts"] = tuple(take(batch) for _ in self.spans)
        return fields | {name: take(batch) for name in PER_SEQUENCE}


def _powers(smallest: int, largest: int, factor: int) -> list[int]:
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= factor
    return [*sizes, largest]


Calls: TypeAlias = list[tuple[StepShape, Ranks]]


@runtime_checkable
class Buckets(Protocol):
    """The fixed set of shapes that every legal step fits; all are compiled before the first request."""

    def __iter__(self) -> Iterator[StepShape]: ...

    def calls(self, plan: StepPlan) -> Calls:
        """The compiled calls of one step, and the chunks of every rank that each takes."""
        ...


class OneRow:
    """Of programs that take all tokens of a step in one row: one call does a step, which reads all weights once.

    For attention that reads the pages in use, of which each sequence has as many as it needs: few programs serve long
    contexts. Padding costs next to nothing, since kernels leave it out.
    """

    def __init__(self, config: EngineConfig, max_context: int, packing: Packing) -> None:
        self._packing, self._max_batch = packing, config.max_batch
        pages = -(-max_context // packing.page_size)
        self._pages = _powers(min(pages, -(-LONG_CONTEXT // packing.page_size)), pages, 16)
        # Sampling pays for its rows, so that there are as many sizes of batches as tokens up to a full one.
        self._tokens = [
            *_powers(1, config.max_batch, 2),
            *_powers(config.max_batch, config.token_budget, 4)[1:],
        ]

    def __iter__(self) -> Iterator[StepShape]:
        return iter(dict.fromkeys(self._shape(tokens, pages) for pages in self._pages for tokens in self._tokens))

    def calls(self, plan: StepPlan) -> Calls:
        """One, unless there is nothing to do."""
        together = [(*decodes, *prefills) for decodes, prefills in zip(plan.decodes, plan.prefills, strict=True)]
        ranks = [tuple(sorted(chunks, key=_decodes, reverse=True)) for chunks in together]
        largest = max(sum(chunk.length for chunk in chunks) for chunks in ranks)
        if not largest:
            return []
        tokens = next(size for size in self._tokens if size >= largest)
        return [(self._shape(tokens, _pages(self._pages, self._packing.page_size, ranks)), ranks)]

    def _shape(self, tokens: int, pages: int) -> StepShape:
        shape = StepShape(min(tokens, self._max_batch), tokens, pages, one_row=True)
        return dataclasses.replace(shape, pages=_needed(self._packing, shape))


class Grid:
    """Of programs that have a row for each sequence: decodes together, and prefills of chunks of about one length.

    For attention that gathers what a table names, and pays for its length.
    """

    def __init__(self, config: EngineConfig, max_context: int, packing: Packing) -> None:
        self.packing = packing
        pages = -(-max_context // packing.page_size)
        self.pages = _powers(min(pages, -(-SHORT_CONTEXT // packing.page_size)), pages, 4)
        self.decode = _powers(1, config.max_batch, 2)
        longest, together = config.max_prefill_tokens, min(config.max_prefill_sequences, config.max_batch)
        short = min(SHORT_CHUNK, longest)
        # Sequences and tokens of each, by tokens: whatever there is fits the last.
        prefills = {(1, min(FEW_TOKENS, longest)), (1, longest), (together, short)}
        self.prefill = sorted(prefills, key=lambda shape: (shape[1], shape[0]))

    def __iter__(self) -> Iterator[StepShape]:
        rows = [*((batch, 1) for batch in self.decode), *self.prefill]
        shapes = [self._shape(batch, tokens, pages) for pages in self.pages for batch, tokens in rows]
        return iter(dict.fromkeys(shapes))

    def calls(self, plan: StepPlan) -> Calls:
        """The prefill chunks of all ranks, the longest first, then one call of decodes.

        A call takes the smallest shape that holds all that is left, or else most of what is as long.
        """
        calls: Calls = []
        left = [sorted(chunks, key=lambda chunk: -chunk.length) for chunks in plan.prefills]
        while count := max(map(len, left)):
            longest = max(chunks[0].length for chunks in left if chunks)
            fits = [shape for shape in self.prefill if shape[1] >= longest]
            holds_all = [shape for shape in fits if shape[0] >= count]
            if holds_all:
                batch, tokens = min(holds_all, key=math.prod)
            else:
                batch, tokens = max(fits, key=lambda shape: (-shape[1], shape[0]))
            taken = [chunks[:batch] for chunks in left]
            left = [chunks[batch:] for chunks in left]
            calls.append((self._shape(batch, tokens, _pages(self.pages, self.packing.page_size, taken)), taken))
        if any(plan.decodes):
            batch = next(size for size in self.decode if size >= max(map(len, plan.decodes)))
            pages = _pages(self.pages, self.packing.page_size, plan.decodes)
            calls.append((self._shape(batch, 1, pages), plan.decodes))
        return calls

    def _shape(self, batch: int, tokens: int, pages: int) -> StepShape:
        return StepShape(batch, tokens, _needed(self.packing, StepShape(batch, tokens, pages)))


def buckets(config: EngineConfig, max_context: int, packing: Packing, kernels: Kernels = "xla") -> Buckets:
    """Those that suit the kernels that a program is made of."""
    return (OneRow if kernels == "native" else Grid)(config, max_context, packing)


def _decodes(chunk: Chunk) -> bool:
    """Whether it is an answer's token, alone: what a prompt leaves for its end is a piece of it, however short."""
    return chunk.length == 1 and chunk.start >= len(chunk.sequence.request.prompt)


def _needed(packing: Packing, shape: StepShape) -> int:
    """Pages of the longest table: without a group that spans it all, contexts beyond the widest reach are all alike."""
    return max(packing.widths(shape))


def _pages(sizes: Seq[int], page_size: int, ranks: Ranks) -> int:
    context = max(chunk.start + chunk.length for chunks in ranks for chunk in chunks)
    return next(pages for pages in sizes if pages * page_size >= context)
