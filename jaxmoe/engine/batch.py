"""From a step's plan to the arrays of one compiled call: which shape, and one packed transfer to the device."""

import dataclasses
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.scheduler import Chunk

Ranks: TypeAlias = Seq[Seq[Chunk]]  # chunks of every attention rank

SHORT_CHUNK, FEW_TOKENS = 32, 64
SMALLEST_CONTEXT = 256


@dataclasses.dataclass(frozen=True, order=True)
class StepShape:
    """The shape of one compiled step, per attention rank: sequences, tokens of each, pages of context of each."""

    batch: int
    tokens: int
    pages: int

    def __str__(self) -> str:
        kind = "decode" if self.tokens == 1 else "prefill"
        return f"{kind} batch={self.batch} tokens={self.tokens} pages={self.pages}"

    @property
    def packed_width(self) -> int:
        """int32 words of a packed batch of this shape, per rank."""
        return self.batch * (self.tokens + self.pages + len(_PER_SEQUENCE))


_PER_SEQUENCE = ("start", "length", "temperature", "top_k", "top_p", "seed")


class Sampling(NamedTuple):
    """How each sequence's token is chosen: the arguments of `ops.sampling.sample` after the logits."""

    temperature: Float[Array, "*R B"]
    top_k: Int[Array, "*R B"]
    top_p: Float[Array, "*R B"]
    seed: Int[Array, "*R B"]
    position: Int[Array, "*R B"]


class Batch(NamedTuple):
    """A step's input, unpacked on the device: of one rank, or of all with a leading axis R.

    A row of length 0 is padding.
    """

    tokens: Int[Array, "*R B T"]
    block_table: Int[Array, "*R B pages"]
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


def _powers(smallest: int, largest: int, factor: int) -> list[int]:
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= factor
    return [*sizes, largest]


class Buckets:
    """The fixed set of shapes that every legal step fits; all are compiled before the first request."""

    def __init__(self, config: EngineConfig, max_context: int) -> None:
        self.page_size = config.page_size
        pages = -(-max_context // config.page_size)
        smallest = min(pages, -(-SMALLEST_CONTEXT // config.page_size))
        self.pages = _powers(smallest, pages, 4)
        self.decode = _powers(1, config.max_batch, 2)
        self.prefill_tokens = sorted({min(FEW_TOKENS, config.max_prefill_tokens), config.max_prefill_tokens})
        self.short = min(SHORT_CHUNK, config.max_prefill_tokens)
        self.together = min(config.max_prefill_sequences, config.max_batch)

    def __iter__(self) -> Iterator[StepShape]:
        rows = [(batch, 1) for batch in self.decode] + [(1, tokens) for tokens in self.prefill_tokens]
        if self.together > 1:
            rows.append((self.together, self.short))
        return iter([StepShape(batch, tokens, pages) for pages in self.pages for batch, tokens in rows])

    def decode_shape(self, ranks: Ranks) -> StepShape:
        largest = max(map(len, ranks))
        return StepShape(next(size for size in self.decode if size >= largest), 1, self._pages(ranks))

    def prefills(self, ranks: Ranks) -> list[tuple[StepShape, Ranks]]:
        """Splits the prefill chunks of all ranks into calls: short chunks of a rank share one, long ones go alone."""
        calls: list[tuple[StepShape, Ranks]] = []
        short = [[chunk for chunk in chunks if chunk.length <= self.short] for chunks in ranks]
        single = [[chunk for chunk in chunks if chunk.length > self.short] for chunks in ranks]
        if self.together > 1 and max(map(len, short)) > 1:
            calls.append((StepShape(self.together, self.short, self._pages(short)), short))
        else:
            single = [short[rank] + single[rank] for rank in range(len(ranks))]
        for turn in range(max(map(len, single))):
            alone = [chunks[turn : turn + 1] for chunks in single]
            longest = max(chunk.length for chunks in alone for chunk in chunks)
            tokens = next(size for size in self.prefill_tokens if size >= longest)
            calls.append((StepShape(1, tokens, self._pages(alone)), alone))
        return calls

    def _pages(self, ranks: Ranks) -> int:
        reach = max(chunk.start + chunk.length for chunks in ranks for chunk in chunks)
        return next(pages for pages in self.pages if pages * self.page_size >= reach)


def pack(shape: StepShape, ranks: Ranks) -> Int[np.ndarray, "R words"]:
    """One int32 array of everything a step needs; `unpack` is its inverse on the device."""
    packed = np.zeros((len(ranks), shape.packed_width), np.int32)
    for row, chunks in zip(packed, ranks, strict=True):
        fields = _split(row, shape)
        for index, (sequence, start, length, _) in enumerate(chunks):
            params = sequence.request.params
            fields["tokens"][index, :length] = sequence.tokens[start : start + length]
            pages = sequence.pages[: shape.pages]
            fields["block_table"][index, : len(pages)] = pages
            fields["start"][index] = start
            fields["length"][index] = length
            fields["temperature"].view(np.float32)[index] = params.temperature
            fields["top_k"][index] = params.top_k
            fields["top_p"].view(np.float32)[index] = params.top_p
            fields["seed"].view(np.uint32)[index] = (params.seed or 0) & 0xFFFFFFFF
    return packed


def unpack(packed: Int[Array, "words"], shape: StepShape) -> Batch:
    fields = _split(packed, shape)
    as_float = {name: jax.lax.bitcast_convert_type(fields[name], jnp.float32) for name in ("temperature", "top_p")}
    return Batch(**{**fields, **as_float})


def _split(words, shape: StepShape) -> dict:
    """Views of the fields of one rank's words."""
    batch, tokens, pages = shape.batch, shape.tokens, shape.pages
    fields = {"tokens": words[: batch * tokens].reshape(batch, tokens)}
    words = words[batch * tokens :]
    fields["block_table"] = words[: batch * pages].reshape(batch, pages)
    words = words[batch * pages :]
    for index, name in enumerate(_PER_SEQUENCE):
        fields[name] = words[index * batch : (index + 1) * batch]
    return fields
