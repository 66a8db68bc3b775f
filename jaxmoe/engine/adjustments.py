"""What some rows ask of their logits before a token is chosen: biases, penalties, and which tokens are allowed.

Kept for each sequence on the host, packed for `ops.sampling.adjust` while the device works on the forward pass.
"""

import dataclasses
import weakref
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.engine.batch import Ranks, count_words, first_draws, split_words
from jaxmoe.engine.grammars import Grammars, Matcher
from jaxmoe.engine.sequence import Sequence

ENTRIES_A_ROW, FEWEST_ENTRIES = 256, 1024


class Adjustments(NamedTuple):
    """The arguments of `ops.sampling.adjust` after the logits, of one rank."""

    allowed: Int[Array, "B words"]
    repetition: Float[Array, "B"]
    frequency: Float[Array, "B"]
    presence: Float[Array, "B"]
    row: Int[Array, "N"]
    token: Int[Array, "N"]
    bias: Float[Array, "N"]
    times: Int[Array, "N"]


PENALTIES = ("repetition", "frequency", "presence")
FLOATS = (*PENALTIES, "bias")


@dataclasses.dataclass(frozen=True)
class AdjustmentShape:
    """Sequences a rank, and the vocabulary; together they say how a rank's adjustments lie in int32 words."""

    batch: int
    vocab_size: int

    @property
    def entries(self) -> int:
        return max(FEWEST_ENTRIES, ENTRIES_A_ROW * self.batch)

    @property
    def words(self) -> int:
        return count_words(self._fields())

    def split(self, words: Any) -> dict[str, Any]:
        """Views of the fields of one rank's words."""
        return split_words(words, self._fields())

    def unpack(self, words: Int[Array, "words"]) -> Adjustments:
        """One rank's adjustments, on the device."""
        fields = self.split(words)
        as_float = {name: jax.lax.bitcast_convert_type(fields[name], jnp.float32) for name in FLOATS}
        return Adjustments(**{**fields, **as_float})

    def _fields(self) -> dict[str, tuple[int, ...]]:
        rows, entries = (self.batch,), (self.entries,)
        shapes = [(self.batch, -(-self.vocab_size // 32)), rows, rows, rows, entries, entries, entries, entries]
        return dict(zip(Adjustments._fields, shapes, strict=True))


class Adjuster:
    """Packs the adjustments of a call's rows. Forgets a sequence when everybody else has.

    stops: the end-of-sequence tokens.
    """

    def __init__(self, vocab_size: int, stops: Seq[int], grammars: Grammars) -> None:
        self._vocab_size = vocab_size
        self._stops = tuple(stops)
        self._grammars = grammars
        self._histories: weakref.WeakKeyDictionary[Sequence, History] = weakref.WeakKeyDictionary()
        self._matchers: weakref.WeakKeyDictionary[Sequence, Matcher] = weakref.WeakKeyDictionary()

    def pack(self, batch: int, ranks: Ranks) -> Iterator[Int[np.ndarray, "R words"]]:
        """What to apply to the `batch` rows of logits of a call, one after the other: nothing if none asks.

        Entries that are too many for one array go on in the next.
        """
        rows = [
            [
                (first + ahead, chunk.sequence, ahead)
                for first, chunk in zip(first_draws(chunks), chunks, strict=False)
                for ahead in range(chunk.draws)
                if chunk.samples and not chunk.sequence.ended and self._asks(chunk.sequence, ahead)
            ]
            for chunks in ranks
        ]
        if not any(rows):
            return
        shape = AdjustmentShape(batch, self._vocab_size)
        packed = np.zeros((len(rows), shape.words), np.int32)
        fields = [shape.split(words) for words in packed]
        left = [self._fill(own, of_rank) for own, of_rank in zip(fields, rows, strict=True)]
        for start in range(0, max(1, *(entries.shape[1] for entries in left)), shape.entries):
            for own, entries in zip(fields, left, strict=True):
                part = entries[:, start : start + shape.entries]
                own["row"][:] = batch
                for name, values in zip(("row", "token", "bias", "times"), part, strict=True):
                    own[name][: len(values)] = values
                if start:
                    own["allowed"][:] = -1
            yield packed.copy()  # a launched call may yet read it

    def _fill(self, fields: dict[str, Any], rows: Seq[tuple[int, Sequence, int]]) -> Int[np.ndarray, "four entries"]:
        """Writes what there is for each row into a rank's fields, and returns the entries.

        rows: with its sequence, and how many tokens ahead of that it draws, after drafts.
        """
        repetition, frequency, presence = (fields[name].view(np.float32) for name in PENALTIES)
        fields["allowed"][:] = -1
        repetition[:] = 1
        for row, sequence, ahead in rows:
            params = sequence.request.params
            repetition[row] = params.repetition_penalty
            frequency[row], presence[row] = params.frequency_penalty, params.presence_penalty
            self._allow(sequence, ahead, fields["allowed"][row])
        entries = (self._entries(row, sequence) for row, sequence, _ in rows)
        return np.concatenate([np.zeros((4, 0), np.int32), *entries], axis=1)

    def _asks(self, sequence: Sequence, ahead: int) -> bool:
        params = sequence.request.params
        return params.needs_last_token or bool(params.logit_bias) or bool(self._forbidden(sequence, ahead))

    def _forbidden(self, sequence: Sequence, ahead: int) -> tuple[int, ...]:
        """Tokens that would end it too soon."""
        params = sequence.request.params
        if len(sequence.tokens) + ahead - len(sequence.request.prompt) >= params.min_tokens:
            return ()
        return params.stop_token_ids + (() if params.ignore_eos else self._stops)

    def _allow(self, sequence: Sequence, ahead: int, allowed: Int[np.ndarray, "words"]) -> None:
        """Clears the bits of tokens that may not come next."""
        request = sequence.request
        if request.params.constraint is not None:
            matcher = self._matchers.get(sequence)
            if matcher is None:
                matcher = self._matchers[sequence] = self._grammars.matcher(request.params.constraint)
            matcher.follow(sequence.tokens[len(request.prompt) :])
            matcher.allow(allowed)
        if forbidden := self._forbidden(sequence, ahead):
            without = allowed.view(np.uint32).copy()
            for token in forbidden:
                without[token >> 5] &= np.uint32(~(1 << (token & 31)) & 0xFFFFFFFF)
            if without.any():
                allowed.view(np.uint32)[:] = without

    def _entries(self, row: int, sequence: Sequence) -> Int[np.ndarray, "four entries"]:
        history = self._histories.get(sequence)
        if history is None:
            history = self._histories[sequence] = History(sequence)
        history.follow(sequence)
        rows = np.full((1, history.entries.shape[1]), row, np.int32)
        return np.concatenate([rows, history.entries])


class History:
    """The tokens of a sequence that a bias or a penalty concerns, each once; see `ops.sampling.adjust`."""

    def __init__(self, sequence: Sequence) -> None:
        params, prompt = sequence.request.params, sequence.request.prompt
        self._seen = len(prompt)
        self._counts = params.penalises
        tokens = np.unique(np.asarray(prompt, np.int32)) if params.repetition_penalty != 1 else np.zeros(0, np.int32)
        biased = np.setdiff1d(np.fromiter(params.logit_bias, np.int32), tokens)
        self._size = len(tokens) + len(biased)
        self._words = np.zeros((3, self._size + 64), np.int32)
        self._words[0, : self._size] = np.concatenate([tokens, biased])
        self._words[2, len(tokens) : self._size] = -1
        self._place = {token: place for place, token in enumerate(self._words[0, : self._size].tolist())}
        for token, bias in params.logit_bias.items():
            self._words[1].view(np.float32)[self._place[token]] = bias

    @property
    def entries(self) -> Int[np.ndarray, "three entries"]:
        """Token, the bits of its bias, and how often it is in the output."""
        return self._words[:, : self._size]

    def follow(self, sequence: Sequence) -> None:
        """Counts the tokens that it has not seen yet."""
        if not self._counts:
            return
        for token in sequence.tokens[self._seen :]:
            place = self._place.get(token)
            if place is None:
                place = self._place[token] = self._size
                if place == self._words.shape[1]:
                    self._words = np.concatenate([self._words, np.zeros_like(self._words)], axis=1)
                self._words[0, place] = token
                self._size += 1
            self._words[2, place] = max(self._words[2, place], 0) + 1
        self._seen = len(sequence.tokens)
