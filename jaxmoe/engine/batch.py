"""From a step's plan to the arrays of one compiled call: which shape, and one packed transfer to the device."""

import dataclasses
import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.pages import pages_reached
from jaxmoe.engine.scheduler import Chunk
from jaxmoe.spans import Span

Ranks: TypeAlias = Seq[Seq[Chunk]]  # chunks of every attention rank

SHORT_CHUNK, FEW_TOKENS = 32, 64


class Economy(NamedTuple):
    """Which programs are worth having, by what a program pays for.

    shortest, factor: tokens of the shortest block tables, and how much longer the next are.
    halves: prefills of half as long chunks, and twice as many, down to SHORT_CHUNK, and of one a quarter as long; else
        only of the longest and the shortest.
    """

    shortest: int
    factor: int
    halves: bool


# Attention that gathers what a table names pays for its length. Where it reads the pages in use, fewer programs serve
# long contexts, and chunks of several prompts, padded to one length, share the weights that they are multiplied by.
GATHERED, READ_IN_USE = Economy(256, 4, False), Economy(4096, 16, True)


@dataclasses.dataclass(frozen=True, order=True)
class StepShape:
    """The shape of one compiled step, per attention rank: sequences, tokens of each, pages of context of each.

    A group of pages whose span is shorter than the context has tables of fewer pages: see `Packing.widths`.
    """

    batch: int
    tokens: int
    pages: int

    def __str__(self) -> str:
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

    A row of length 0 is padding. tables, firsts: see `PagedContext`.
    """

    tokens: Int[Array, "*R B T"]
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
    def positions(self) -> Int[Array, "*R B T"]:
        """Position of every token in its sequence; -1 for padding."""
        offset = jnp.arange(self.tokens.shape[-1])
        return jnp.where(offset < self.length[..., None], self.start[..., None] + offset, -1)

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
        return shape.batch * (shape.tokens + sum(self.widths(shape)) + len(self.spans) + len(PER_SEQUENCE))

    def pack(self, shape: StepShape, ranks: Ranks) -> Int[np.ndarray, "R words"]:
        """Everything a step needs; `unpack` is its inverse on the device."""
        packed = np.zeros((len(ranks), self.words(shape)), np.int32)
        for row, chunks in zip(packed, ranks, strict=True):
            if not chunks:
                continue
            fields = self._split(row, shape)
            for index, (sequence, start, length, _) in enumerate(chunks):
                fields["tokens"][index, :length] = sequence.tokens[start : start + length]
                for table, pages in zip(fields["tables"], sequence.tables.pages, strict=True):
                    table[index, : len(pages)] = pages
            count = len(chunks)
            params = [chunk.sequence.request.params for chunk in chunks]
            for group, first in enumerate(fields["firsts"]):
                first[:count] = [chunk.sequence.tables.passed[group] * self.page_size for chunk in chunks]
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
        return Batch(**{**fields, **as_float})

    def _split(self, words: Any, shape: StepShape) -> dict[str, Any]:
        """Views of the fields of one rank's words."""
        batch, offset = shape.batch, 0

        def take(*axes: int) -> Any:
            nonlocal offset
            start, offset = offset, offset + batch * math.prod(axes)
            return words[start:offset].reshape(batch, *axes)

        fields: dict[str, Any] = {"tokens": take(shape.tokens)}
        fields["tables"] = tuple(take(width) for width in self.widths(shape))
        fields["firsts"] = tuple(take() for _ in self.spans)
        return fields | {name: take() for name in PER_SEQUENCE}


def _powers(smallest: int, largest: int, factor: int) -> list[int]:
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= factor
    return [*sizes, largest]


class Buckets:
    """The fixed set of shapes that every legal step fits; all are compiled before the first request."""

    def __init__(self, config: EngineConfig, max_context: int, packing: Packing, economy: Economy = GATHERED) -> None:
        """economy: GATHERED or READ_IN_USE."""
        self.packing = packing
        pages = -(-max_context // packing.page_size)
        self.pages = _powers(min(pages, -(-economy.shortest // packing.page_size)), pages, economy.factor)
        self.decode = _powers(1, config.max_batch, 2)
        longest, together = config.max_prefill_tokens, min(config.max_prefill_sequences, config.max_batch)
        short = min(SHORT_CHUNK, longest)
        # Sequences and tokens of each, by tokens: whatever there is fits the last.
        prefills = {(1, min(FEW_TOKENS, longest)), (1, longest), (together, short)}
        if economy.halves:
            halves = [longest >> turn for turn in range(longest.bit_length()) if longest >> turn > short]
            prefills |= {(min(together, longest // tokens), tokens) for tokens in halves}
            prefills |= {(1, tokens) for tokens in halves[::2] if tokens > FEW_TOKENS}
        self.prefill = sorted(prefills, key=lambda shape: (shape[1], shape[0]))

    def __iter__(self) -> Iterator[StepShape]:
        rows = [*((batch, 1) for batch in self.decode), *self.prefill]
        shapes = [self._shape(batch, tokens, pages) for pages in self.pages for batch, tokens in rows]
        return iter(dict.fromkeys(shapes))

    def decode_shape(self, ranks: Ranks) -> StepShape:
        largest = max(map(len, ranks))
        return self._shape(next(size for size in self.decode if size >= largest), 1, self._pages(ranks))

    def prefills(self, ranks: Ranks) -> list[tuple[StepShape, Ranks]]:
        """Splits the prefill chunks of all ranks into calls, the longest chunks first.

        A call takes the smallest shape that holds all that is left, or else most of what is as long.
        """
        calls: list[tuple[StepShape, Ranks]] = []
        left = [sorted(chunks, key=lambda chunk: -chunk.length) for chunks in ranks]
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
            calls.append((self._shape(batch, tokens, self._pages(taken)), taken))
        return calls

    def _pages(self, ranks: Ranks) -> int:
        context = max(chunk.start + chunk.length for chunks in ranks for chunk in chunks)
        return next(pages for pages in self.pages if pages * self.packing.page_size >= context)

    def _shape(self, batch: int, tokens: int, pages: int) -> StepShape:
        """Without a group that spans it all, contexts beyond the widest group's reach are all alike."""
        return StepShape(batch, tokens, max(self.packing.widths(StepShape(batch, tokens, pages))))
