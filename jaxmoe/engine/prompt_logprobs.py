"""Log-probabilities of prompts: which rows of a prefill's hidden states to look at, and what was found so far."""

import itertools
import weakref
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxmoe.engine.batch import Ranks, StepShape
from jaxmoe.engine.request import PromptLogprobs, TopLogprobs
from jaxmoe.engine.sequence import Chunk, Sequence

ROWS = 64  # of hidden states that one call looks at, on each rank


class Rows(NamedTuple):
    """Rows of a prefill's hidden states, and the token that follows each in its prompt; unused ones are 0."""

    rows: Int[np.ndarray, "R rows"]
    targets: Int[np.ndarray, "R rows"]


class PromptReports:
    """By sequence, until its first token is there. Forgets a sequence when everybody else has."""

    def __init__(self) -> None:
        self._found: weakref.WeakKeyDictionary[Sequence, list[tuple[float, TopLogprobs]]] = weakref.WeakKeyDictionary()

    def pick(self, shape: StepShape, ranks: Ranks) -> Iterator[Rows]:
        """The rows of one prefill that are asked for; none if no sequence asks."""
        wanted = [list(_wanted(shape, chunks)) for chunks in ranks]
        count = rows_a_call(shape)
        for start in range(0, max(map(len, wanted)), count):
            picked = np.zeros((2, len(ranks), count), np.int32)
            for rank, own in enumerate(wanted):
                for place, pair in enumerate(own[start : start + count]):
                    picked[:, rank, place] = pair
            yield Rows(*picked)

    def take(self, chunk: Chunk, told: Iterator[tuple[float, TopLogprobs]]) -> None:
        """Takes in what the rows of a chunk brought, in the order in which they were picked."""
        if count := _count(chunk):
            found = self._found.setdefault(chunk.sequence, [])
            del found[chunk.start :]  # of before it was preempted
            most = chunk.sequence.request.params.prompt_logprobs
            found += [(logprob, top[:most]) for logprob, top in itertools.islice(told, count)]

    def give(self, sequence: Sequence) -> PromptLogprobs | None:
        """All there is of a sequence, with its first token; None if nobody asks."""
        if sequence.request.params.prompt_logprobs is None or len(sequence.tokens) > len(sequence.request.prompt):
            return None
        return tuple(self._found.pop(sequence, ()))


def rows_a_call(shape: StepShape) -> int:
    return min(ROWS, shape.rows)


def _count(chunk: Chunk) -> int:
    """How many tokens of its prompt follow the chunk's own; 0 if nobody asks, or if they are told already."""
    request, tokens = chunk.sequence.request, len(chunk.sequence.tokens)
    if request.params.prompt_logprobs is None or tokens > len(request.prompt):
        return 0
    return min(chunk.start + chunk.length, tokens - 1) - chunk.start


def _wanted(shape: StepShape, chunks: Seq[Chunk]) -> Iterator[tuple[int, int]]:
    for begin, chunk in zip(shape.begins(chunks), chunks, strict=False):
        for offset in range(_count(chunk)):
            yield begin + offset, chunk.sequence.tokens[chunk.start + offset + 1]
