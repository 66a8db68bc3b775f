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
# Tokens of the shortest block tables, and how much longer the next are. Attention that gathers what a table names pays
# for its length; attention that reads the pages in use does not, so that fewer programs serve.
GATHERED, READ_IN_USE = (256, 4), (4096, 16)


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
    seed: Int[Array, "*R B"]
    position: Int[Array, "*R B"]


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
    seed: Int[Array, "*R B"]

    @property
    def positions(self) -> Int[Array, "*R B T"]:
        """Position of every token in its sequence; -1 for padding."""
        offset = jnp.arange(self.tokens.shape[-1])
        return jnp.where(offset < self.length[..., None], self.start[..., None] + offset, -1)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed, self.start + self.length)


PER_SEQUENCE = ("start", "length", "temperature", "top_k", "top_p", "seed")
FLOATS = ("temperature", "top_p")


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

    def __init__(
        self, config: EngineConfig, max_context: int, packing: Packing, contexts: tuple[int, int] = GATHERED
    ) -> None:
        """contexts: GATHERED or READ_IN_USE."""
        self.packing = packing
        pages = -(-max_context // packing.page_size)
        shortest, factor = contexts
        self.pages = _powers(min(pages, -(-shortest // packing.page_size)), pages, factor)
        self.decode = _powers(1, config.max_batch, 2)
        self.prefill_tokens = sorted({min(FEW_TOKENS, config.max_prefill_tokens), config.max_prefill_tokens})
        self.short = min(SHORT_CHUNK, config.max_prefill_tokens)
        self.together = min(config.max_prefill_sequences, config.max_batch)

    def __iter__(self) -> Iterator[StepShape]:
        rows = [(batch, 1) for batch in self.decode] + [(1, tokens) for tokens in self.prefill_tokens]
        if self.together > 1:
            rows.append((self.together, self.short))
        shapes = [self._shape(batch, tokens, pages) for pages in self.pages for batch, tokens in rows]
        return iter(dict.fromkeys(shapes))

    def decode_shape(self, ranks: Ranks) -> StepShape:
        largest = max(map(len, ranks))
        return self._shape(next(size for size in self.decode if size >= largest), 1, self._pages(ranks))

    def prefills(self, ranks: Ranks) -> list[tuple[StepShape, Ranks]]:
        """Splits the prefill chunks of all ranks into calls: short chunks of a rank share one, long ones go alone."""
        calls: list[tuple[StepShape, Ranks]] = []
        short = [[chunk for chunk in chunks if chunk.length <= self.short] for chunks in ranks]
        single = [[chunk for chunk in chunks if chunk.length > self.short] for chunks in ranks]
        if self.together > 1 and max(map(len, short)) > 1:
            calls.append((self._shape(self.together, self.short, self._pages(short)), short))
        else:
            single = [short[rank] + single[rank] for rank in range(len(ranks))]
        for turn in range(max(map(len, single))):
            alone = [chunks[turn : turn + 1] for chunks in single]
            longest = max(chunk.length for chunks in alone for chunk in chunks)
            tokens = next(size for size in self.prefill_tokens if size >= longest)
            calls.append((self._shape(1, tokens, self._pages(alone)), alone))
        return calls

    def _pages(self, ranks: Ranks) -> int:
        context = max(chunk.start + chunk.length for chunks in ranks for chunk in chunks)
        return next(pages for pages in self.pages if pages * self.packing.page_size >= context)

    def _shape(self, batch: int, tokens: int, pages: int) -> StepShape:
        """Without a group that spans it all, contexts beyond the widest group's reach are all alike."""
        return StepShape(batch, tokens, max(self.packing.widths(StepShape(batch, tokens, pages))))
