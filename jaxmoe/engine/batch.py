"""From a step's plan to the arrays of one compiled call: which shape, and one packed transfer to the device."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.pages import pages_reached
from jaxmoe.engine.sequence import Chunk, StepPlan
from jaxmoe.ops.linear import Kernels
from jaxmoe.ops.paged_attention import Pieces
from jaxmoe.spans import Span

Ranks: TypeAlias = Seq[Seq[Chunk]]  # chunks of every attention rank

# What the device keeps of every slot, [slots, kept], for a step that is launched before the host has read the one
# before: the token drawn last, the draft of what comes after it, and whether the draft before was right. Slot 0 is
# nobody's.
KEPT = ("token", "draft", "right")
SHORT_CHUNK, FEW_TOKENS = 32, 64
SHORT_CONTEXT, LONG_CONTEXT = 256, 4096  # tokens of the shortest block tables, gathered and read in place


@dataclasses.dataclass(frozen=True, order=True)
class StepShape:
    """The shape of one compiled step, per attention rank: sequences, tokens of each, pages of context of each.

    A group of pages whose span is shorter than the context has tables of fewer pages: see `Packing.widths`.
    one_row: tokens are those of all sequences together, one sequence after the other.
    drafts: tokens of a sequence that decodes which may be guesses.
    """

    batch: int
    tokens: int
    pages: int
    one_row: bool = False
    drafts: int = 0

    @property
    def rows(self) -> int:
        """Tokens that go through the model, padding included."""
        return self.tokens if self.one_row else self.batch * self.tokens

    @property
    def decodes(self) -> bool:
        """Whether it takes no prompts."""
        return not self.one_row and self.tokens == 1 + self.drafts

    @property
    def draws(self) -> int:
        """Rows of logits from which tokens are drawn: one a sequence, and one more for each of its drafts."""
        return min(self.rows, self.batch * (1 + self.drafts))

    def begins(self, chunks: Seq[Chunk]) -> list[int]:
        """The row of each chunk's first token, and the one after the last that there is."""
        if not self.one_row:
            return [index * self.tokens for index in range(len(chunks) + 1)]
        return [0, *itertools.accumulate(chunk.length for chunk in chunks)]

    def __str__(self) -> str:
        if self.one_row:
            return f"step tokens={self.tokens} batch={self.batch} pages={self.pages}"
        return f"{'decode' if self.decodes else 'prefill'} batch={self.batch} tokens={self.tokens} pages={self.pages}"


class Sampling(NamedTuple):
    """How each token is chosen: the arguments of `ops.sampling.sample` after the logits.

    slot: where the token is kept for the next step; 0: nobody asks for it.
    """

    temperature: Float[Array, "*R B"]
    top_k: Int[Array, "*R B"]
    top_p: Float[Array, "*R B"]
    min_p: Float[Array, "*R B"]
    seed: Int[Array, "*R B"]
    position: Int[Array, "*R B"]
    slot: Int[Array, "*R B"]

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
    begins: the row of each sequence's first token.
    draws: the rows after which tokens are drawn, sequence by sequence: the last of each, before it one for each draft;
        then any rows of padding. drawers: the sequences that these are of.
    following: the token after a sequence's last; -1 where that is yet to be drawn.
    drafts: how many of a sequence's tokens, the last ones, are guesses. slot: of a sequence; 0 of padding.
    """

    tokens: Int[Array, "*R rows T"]
    positions: Int[Array, "*R rows T"]
    pieces: Pieces | None
    begins: Int[Array, "*R B"]
    draws: Int[Array, "*R draws"]
    drawers: Int[Array, "*R draws"]
    tables: tuple[Int[Array, "*R B pages"], ...]
    firsts: tuple[Int[Array, "*R B"], ...]
    start: Int[Array, "*R B"]
    length: Int[Array, "*R B"]
    temperature: Float[Array, "*R B"]
    top_k: Int[Array, "*R B"]
    top_p: Float[Array, "*R B"]
    min_p: Float[Array, "*R B"]
    seed: Int[Array, "*R B"]
    following: Int[Array, "*R B"]
    drafts: Int[Array, "*R B"]
    slot: Int[Array, "*R B"]

    @property
    def sequences_in_use(self) -> Int[Array, "*R"] | None:
        return None if self.pieces is None else jnp.sum(self.length > 0, axis=-1, dtype=jnp.int32)

    @property
    def draws_in_use(self) -> Int[Array, "*R"] | None:
        in_use = self.sequences_in_use
        return None if in_use is None else in_use + jnp.sum(self.drafts, axis=-1, dtype=jnp.int32)

    @property
    def sampling(self) -> Sampling:
        """Of all draws of one rank."""
        params = (self.temperature, self.top_k, self.top_p, self.min_p, self.seed)
        of_sequences = Sampling(*params, self.start, self.slot)
        of_draws = Sampling(*(field[self.drawers] for field in of_sequences))
        return of_draws._replace(position=self.positions.reshape(-1)[self.draws] + 1)


class Following(NamedTuple):
    """What a layer that predicts a token more goes over, once the tokens of a step are drawn: of one rank, or of all.

    tokens: the one after each row's own. positions: -1 for padding, and for drafts that were wrong.
    ends: the row of each sequence's last token that stays. sampling: a `Sampling`, packed, of what comes after the
        token after that.
    """

    tokens: Int[Array, "*R rows T"]
    positions: Int[Array, "*R rows T"]
    ends: Int[Array, "*R B"]
    sampling: Int[Array, "*R B fields"]

    @classmethod
    def of(cls, batch: Batch, drawn: Int[Array, "draws"]) -> "Following":
        """From what a step's forward pass went over, and the tokens drawn after it.

        Of a sequence whose rows are 5 and the draft 7: if 3 is drawn after 5, 7 is wrong, and row 5, which 3 follows,
        is the end; if 7 and then 3 are drawn, it is right, 7 follows row 5 and 3 row 7, which is the end.
        """
        tokens, positions = batch.tokens.reshape(-1), batch.positions.reshape(-1)
        last = jnp.minimum(batch.begins + jnp.maximum(batch.length - 1, 0), len(tokens) - 1)
        drafted = batch.drafts > 0
        first_draw = jnp.cumsum(1 + batch.drafts) - 1 - batch.drafts
        own = drawn.at[first_draw].get(mode="clip")
        final = drawn.at[first_draw + batch.drafts].get(mode="clip")
        wrong = drafted & (own != tokens[last])

        def put(array: Array, rows: Array, values: Array | int, where: Array) -> Array:
            return array.at[jnp.where(where, rows, len(array))].set(values, mode="drop")

        after = jnp.where(batch.following < 0, final, batch.following)
        shifted = put(jnp.roll(tokens, -1), last, after, batch.length > 0)
        shifted = put(shifted, batch.begins, own, drafted)
        ends = jnp.where(wrong, batch.begins, last)
        params = (batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seed)
        return cls(
            shifted.reshape(batch.tokens.shape),
            put(positions, last, -1, wrong).reshape(batch.positions.shape),
            ends,
            Sampling(*params, positions[ends] + 2, batch.slot).pack(),
        )

    def keep(self, batch: Batch, drafts: Int[Array, "B"], kept: Int[Array, "slots kept"]) -> Int[Array, "slots kept"]:
        """`KEPT`, once one rank's drafts are drawn."""
        right = jnp.where(batch.drafts > 0, self.ends - batch.begins, 0)
        return kept.at[batch.slot].set(jnp.stack([self.tokens.reshape(-1)[self.ends], drafts, right], axis=-1))


PER_SEQUENCE = (
    "start", "length", "temperature", "top_k", "top_p", "min_p", "seed", "following", "drafts", "slot", "ahead",
)  # fmt: skip
FLOATS = ("temperature", "top_p", "min_p")


@dataclasses.dataclass(frozen=True)
class Packing:
    """A batch as one int32 array: a single transfer to the device.

    spans: of the groups of KV pages. page_size: tokens of a page. max_batch: sequences that run on a rank at once.
    """

    spans: tuple[Span, ...]
    page_size: int
    max_batch: int

    def widths(self, shape: StepShape) -> tuple[int, ...]:
        """Pages in a block table of each group."""
        return tuple(pages_reached(span, shape.tokens, self.page_size, shape.pages) for span in self.spans)

    def words(self, shape: StepShape) -> int:
        """int32 words of a packed batch, per rank."""
        return count_words(self._fields(shape))

    def pack(self, shape: StepShape, ranks: Ranks) -> Int[np.ndarray, "R words"]:
        """Everything a step needs; `unpack` is its inverse on the device."""
        layout = self._fields(shape)
        packed = np.zeros((len(ranks), count_words(layout)), np.int32)
        for row, chunks in zip(packed, ranks, strict=True):
            if not chunks:
                continue
            fields, count = self._split(row, layout), len(chunks)
            if shape.one_row:
                fields["decodes"][:] = sum(map(_decodes, chunks))
            tokens: list[int] = []
            for begin, chunk in zip(shape.begins(chunks), chunks, strict=False):
                tokens += [0] * (begin - len(tokens))
                tokens += chunk.tokens
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
            fields["following"][:count] = [
                -1 if chunk.samples else chunk.sequence.tokens[chunk.start + chunk.length] for chunk in chunks
            ]
            fields["drafts"][:count] = [chunk.draws - 1 for chunk in chunks]
            fields["slot"][:count] = [chunk.sequence.slot for chunk in chunks]
            fields["ahead"][:count] = [chunk.ahead for chunk in chunks]
        return packed

    def unpack(self, packed: Int[Array, "words"], shape: StepShape, kept: Int[Array, "slots kept"]) -> Batch:
        """One rank's batch. kept: see `KEPT`; tokens below 0 are places of tokens and drafts there (`Chunk.tokens`)."""
        fields = self._split(packed, self._fields(shape))
        tokens, ahead = fields["tokens"], fields.pop("ahead") > 0
        fields["tokens"] = jnp.where(tokens < 0, kept[:, :2].reshape(-1)[jnp.maximum(-tokens, 0)], tokens)
        fields["start"] += jnp.where(ahead, kept[fields["slot"], KEPT.index("right")], 0)
        as_float = {name: jax.lax.bitcast_convert_type(fields[name], jnp.float32) for name in FLOATS}
        start, length = fields["start"], fields["length"]
        if shape.one_row:
            begins = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(length, dtype=jnp.int32)])
            row = jnp.arange(shape.tokens)
            sequence = jnp.sum(row[:, None] >= begins[1:], axis=1)
            at = start.at[sequence].get(mode="clip") + row - begins[sequence]
            positions = jnp.where(row < begins[-1], at, -1)[None]
            pieces = Pieces(begins, jnp.arange(shape.draws) < begins[fields.pop("decodes")[0]])
            begins, ends = begins[:-1], jnp.maximum(begins[1:] - 1, 0)
        else:
            pieces, offset = None, jnp.arange(shape.tokens)
            positions = jnp.where(offset < length[:, None], start[:, None] + offset, -1)
            begins = jnp.arange(shape.batch, dtype=jnp.int32) * shape.tokens
            ends = begins + jnp.maximum(length - 1, 0)
        fields["tokens"] = fields["tokens"].reshape(positions.shape)
        drawers, draws = jnp.arange(shape.batch, dtype=jnp.int32), ends
        if shape.drafts:
            # Of each draw, whose it is and how many more that sequence has.
            until, draw = jnp.cumsum(1 + fields["drafts"]), jnp.arange(shape.draws)
            drawers = jnp.minimum(jnp.sum(draw[:, None] >= until, axis=1, dtype=jnp.int32), shape.batch - 1)
            draws = jnp.maximum(ends[drawers] - jnp.maximum(until[drawers] - 1 - draw, 0), 0)
        found = {"positions": positions, "pieces": pieces, "begins": begins, "draws": draws, "drawers": drawers}
        return Batch(**{**fields, **as_float, **found})

    def _fields(self, shape: StepShape) -> dict[str, tuple[int, ...]]:
        """Shapes of the fields of one rank's words."""
        fields: dict[str, tuple[int, ...]] = {"decodes": (1,)} if shape.one_row else {}
        fields["tokens"] = (shape.rows,)
        fields |= {f"tables {group}": (shape.batch, width) for group, width in enumerate(self.widths(shape))}
        fields |= {f"firsts {group}": (shape.batch,) for group in range(len(self.spans))}
        return fields | dict.fromkeys(PER_SEQUENCE, (shape.batch,))

    def _split(self, words: Any, layout: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Views of the fields of one rank's words; of each group those that there are as often."""
        fields, groups = split_words(words, layout), range(len(self.spans))
        of_groups = {name: tuple(fields.pop(f"{name} {group}") for group in groups) for name in ("tables", "firsts")}
        return fields | of_groups


def split_words(words: Any, fields: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Views of fields of these shapes, one after the other."""
    views, offset = {}, 0
    for name, shape in fields.items():
        end = offset + math.prod(shape)
        views[name] = words[offset:end].reshape(shape)
        offset = end
    return views


def count_words(fields: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, fields.values()))


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
        self._packing, self._max_batch, self._drafts = packing, config.max_batch, config.decode_tokens - 1
        pages = -(-max_context // packing.page_size)
        self._pages = _powers(min(pages, -(-LONG_CONTEXT // packing.page_size)), pages, 16)
        # Sampling pays for its rows, so that there are as many sizes of batches as tokens up to a full one.
        self._tokens = [
            *_powers(1, most := config.max_batch * config.decode_tokens, 2),
            *_powers(most, config.token_budget, 4)[1:],
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
        shape = StepShape(min(tokens, self._max_batch), tokens, pages, one_row=True, drafts=self._drafts)
        return dataclasses.replace(shape, pages=_needed(self._packing, shape))


class Grid:
    """Of programs that have a row for each sequence: decodes together, and prefills of chunks of about one length.

    For attention that gathers what a table names, and pays for its length.
    """

    def __init__(self, config: EngineConfig, max_context: int, packing: Packing) -> None:
        self.packing, self._decode_tokens = packing, config.decode_tokens
        pages = -(-max_context // packing.page_size)
        self.pages = _powers(min(pages, -(-SHORT_CONTEXT // packing.page_size)), pages, 4)
        self.decode = _powers(1, config.max_batch, 2)
        # A prompt's last piece may be one token, but its program also gives what only prefills do.
        longest, together = max(2, config.max_prefill_tokens), min(config.max_prefill_sequences, config.max_batch)
        short = min(SHORT_CHUNK, longest)
        # Sequences and tokens of each, by tokens: whatever there is fits the last.
        prefills = {(1, min(FEW_TOKENS, longest)), (1, longest), (together, short)}
        self.prefill = sorted(prefills, key=lambda shape: (shape[1], shape[0]))

    def __iter__(self) -> Iterator[StepShape]:
        of_decodes, drafts = self._decode_tokens, self._decode_tokens - 1
        rows = [*((batch, of_decodes, drafts) for batch in self.decode), *((*rows, 0) for rows in self.prefill)]
        shapes = [self._shape(batch, tokens, pages, drafts) for pages in self.pages for batch, tokens, drafts in rows]
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
            shape = self._shape(batch, self._decode_tokens, pages, self._decode_tokens - 1)
            calls.append((shape, plan.decodes))
        return calls

    def _shape(self, batch: int, tokens: int, pages: int, drafts: int = 0) -> StepShape:
        pages = _needed(self.packing, StepShape(batch, tokens, pages))
        return StepShape(batch, tokens, pages, drafts=drafts)


def first_draws(chunks: Seq[Chunk]) -> list[int]:
    """The place of each chunk's first draw among all, and how many there are."""
    return [0, *itertools.accumulate(chunk.draws for chunk in chunks)]


def buckets(config: EngineConfig, max_context: int, packing: Packing, kernels: Kernels = "xla") -> Buckets:
    """Those that suit the kernels that a program is made of."""
    return (OneRow if kernels == "native" else Grid)(config, max_context, packing)


def _decodes(chunk: Chunk) -> bool:
    """Whether it is an answer's token, alone but for a draft: what a prompt leaves for its end is a piece of it."""
    return chunk.length == chunk.draws and chunk.start >= len(chunk.sequence.request.prompt)


def _needed(packing: Packing, shape: StepShape) -> int:
    """Pages of the longest table: without a group that spans it all, contexts beyond the widest reach are all alike."""
    return max(packing.widths(shape))


def _pages(sizes: Seq[int], page_size: int, ranks: Ranks) -> int:
    context = max(chunk.end for chunks in ranks for chunk in chunks)
    return next(pages for pages in sizes if pages * page_size >= context)
