"""Which tokens of which requests go through the model in the next step. Imports neither jax nor numpy.

Every step decodes all that decode and prefills chunks of the rest. Requests wait in one queue, first come first served;
once admitted to an attention rank they stay there. When a rank runs out of KV pages, the one admitted last gives up all
of its own, keeps its tokens, and waits at the front of the queue to have them recomputed. So the one admitted first
always moves on, and with it the whole.
"""

import dataclasses
import operator
from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.pages import PageGroup, PageTables, RankPages, pages_reached
from jaxmoe.engine.request import Output, Request, Sampled
from jaxmoe.errors import DuplicateRequestError, InvalidRequestError, QueueFullError

NO_PAGES = PageTables(0)


@dataclasses.dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """A live request and how far it has come.

    tokens: the prompt, then what was generated.
    limit: the number of tokens at which it ends, whatever they are.
    rank: its attention rank; -1 while it waits.
    num_computed: the first so many tokens have their keys and values in the cache.
    tables: its pages; none while it waits.
    """

    request: Request
    tokens: list[int]
    limit: int
    rank: int = -1
    num_computed: int = 0
    tables: PageTables = NO_PAGES

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def decodes(self) -> bool:
        """Only its newest token is still to be computed."""
        return self.num_computed > 0 and self.num_uncomputed == 1


class Chunk(NamedTuple):
    """`sequence.tokens[start : start + length]` go through the model; if `samples`, a token is drawn after the last."""

    sequence: Sequence
    start: int
    length: int
    samples: bool


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The work of one step, by attention rank. Every chunk in `decodes` is one token long and samples."""

    prefills: tuple[tuple[Chunk, ...], ...]
    decodes: tuple[tuple[Chunk, ...], ...]

    @property
    def chunks(self) -> Iterator[Chunk]:
        return (chunk for ranks in (self.prefills, self.decodes) for rank in ranks for chunk in rank)

    @property
    def empty(self) -> bool:
        return not any(self.prefills) and not any(self.decodes)


class RankLoad(NamedTuple):
    """What one attention rank carries.

    waiting: those in the queue that are pinned to it.
    used_pages, total_pages: of all groups of pages together, so that they tell what share of the pages is in use; one
        token has a place in every group.
    """

    running: int
    waiting: int
    pending_tokens: int
    used_pages: int
    total_pages: int


class Scheduler:
    """`schedule` and `complete` alternate; `submit` and `cancel` may come at any time between."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_ranks: int,
        groups: Seq[PageGroup],
        max_context: int,
        eos_token_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        self._config = config
        self._groups = groups
        self._max_context = max_context
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._pages = [RankPages(groups, config.page_size) for _ in range(num_ranks)]
        self._running: list[list[Sequence]] = [[] for _ in range(num_ranks)]  # by rank, first admitted first
        self._waiting: deque[Sequence] = deque()
        self._live: dict[str, Sequence] = {}
        self._aborted: dict[str, Output] = {}  # cancelled, and not yet told by `complete`
        self.num_preemptions = 0

    @property
    def queue_length(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._live) - len(self._waiting)

    @property
    def has_work(self) -> bool:
        """A step would bring something: tokens, or word of a cancelled request (then its plan may be empty)."""
        return bool(self._live or self._aborted)

    def submit(self, request: Request) -> None:
        """Queues a request, or raises and leaves no trace of it.

        Raises InvalidRequestError, DuplicateRequestError while its id lives or its end is untold, QueueFullError.
        """
        limit = self._limit(request)
        if request.id in self._live or request.id in self._aborted:
            raise DuplicateRequestError(
                f"a request with id {request.id!r} is live; use another id, or wait for its end"
            )
        if len(self._waiting) >= self._config.max_queue:
            raise QueueFullError(f"{len(self._waiting)} requests wait already (max_queue); try again later")
        self._live[request.id] = sequence = Sequence(request, list(request.prompt), limit)
        self._waiting.append(sequence)

    def cancel(self, request_id: str) -> bool:
        """Ends a request and frees its pages; the next `complete` tells of it. False if no such request is live.

        A step already planned may still run: its plan still names those pages, and nobody gets them before the next.
        """
        sequence = self._live.get(request_id)
        if sequence is None:
            return False
        self._end(sequence)
        self._aborted[request_id] = Output(request_id, (), (), "abort")
        return True

    def schedule(self) -> StepPlan:
        """Plans a step and gives its tokens the pages they need."""
        prefills: list[list[Chunk]] = [[] for _ in self._running]
        decodes: list[list[Chunk]] = [[] for _ in self._running]
        for rank, running in enumerate(self._running):
            for sequence in running:  # preemption shortens this list, at its end
                if sequence.decodes:
                    self._plan(sequence, 1, decodes[rank])
                else:
                    self._plan(sequence, self._prefill_room(prefills[rank]), prefills[rank])
        if self._waiting:
            self._admit(prefills)
        return StepPlan(tuple(map(tuple, prefills)), tuple(map(tuple, decodes)))

    def complete(self, plan: StepPlan, sampled: Mapping[str, Sampled]) -> list[Output]:
        """Takes in what a step brought: `sampled` has it by request id, for each chunk that samples."""
        outputs = list(self._aborted.values())
        self._aborted.clear()
        for sequence, start, length, samples in plan.chunks:
            request = sequence.request
            if request.id not in self._live:  # cancelled while the step ran
                continue
            sequence.num_computed = start + length
            self._pages[sequence.rank].trim(sequence.tables, sequence.num_computed)
            if not samples:
                continue
            brought = sampled[request.id]
            token = brought[0]
            sequence.tokens.append(token)
            reason = self._finish_reason(sequence)
            if reason:
                self._end(sequence)
            stop_token = token if reason == "stop" else None
            outputs.append(Output(request.id, (token,), (brought[1],), reason, stop_token, 0, *brought[2:]))
        return outputs

    def loads(self) -> list[RankLoad]:
        pinned = [sequence.request.rank for sequence in self._waiting]
        return [
            RankLoad(
                running=len(running),
                waiting=pinned.count(rank),
                pending_tokens=sum(len(sequence.tokens) for sequence in running),
                used_pages=pages.used,
                total_pages=pages.total,
            )
            for rank, (running, pages) in enumerate(zip(self._running, self._pages, strict=True))
        ]

    def check_integrity(self) -> None:
        """Raises AssertionError unless every page and every live request is where it should be, once."""
        for rank, (running, pages) in enumerate(zip(self._running, self._pages, strict=True)):
            pages.check_integrity([(sequence.tables, sequence.num_computed) for sequence in running])
            assert all(sequence.rank == rank for sequence in running)
        for sequence in self._waiting:
            assert (sequence.rank, sequence.num_computed, sequence.tables) == (-1, 0, NO_PAGES)
        placed = [*self._waiting, *(sequence for running in self._running for sequence in running)]
        assert sorted(sequence.request.id for sequence in placed) == sorted(self._live)

    def _limit(self, request: Request) -> int:
        """The number of tokens at which the request ends; raises InvalidRequestError if it cannot be served."""
        prompt, max_tokens, rank = request.prompt, request.params.max_tokens, request.rank
        request.params.validate(self._vocab_size)
        if rank is not None and not 0 <= rank < len(self._running):
            raise InvalidRequestError(
                f"rank={rank} is not one of the attention ranks 0..{len(self._running) - 1}", "rank"
            )
        if not prompt:
            raise InvalidRequestError("the prompt is empty; send at least one token", "prompt")
        for position, token in enumerate(prompt):
            if not 0 <= token < self._vocab_size:
                raise InvalidRequestError(
                    f"prompt token {token} at position {position} is outside the vocabulary of {self._vocab_size}",
                    "prompt",
                )
        room = min([self._max_context, *(self._room(group) for group in self._groups)])
        cause = "the context limit" if room == self._max_context else "the KV cache of one attention rank"
        if len(prompt) >= room:
            raise InvalidRequestError(
                f"prompt of {len(prompt)} tokens leaves no room to generate: {cause} is {room} tokens; "
                f"send at most {room - 1}",
                "prompt",
            )
        if max_tokens is None:
            return room
        limit = min(self._max_context, len(prompt) + max_tokens)
        if limit > room:
            raise InvalidRequestError(
                f"prompt of {len(prompt)} tokens and max_tokens={max_tokens} can never fit: {cause} is {room} tokens; "
                f"use max_tokens <= {room - len(prompt)}",
                "max_tokens",
            )
        return limit

    def _finish_reason(self, sequence: Sequence) -> str | None:
        params, token = sequence.request.params, sequence.tokens[-1]
        if token in params.stop_token_ids or (token in self._eos_token_ids and not params.ignore_eos):
            return "stop"
        return "length" if len(sequence.tokens) >= sequence.limit else None

    def _admit(self, prefills: list[list[Chunk]]) -> None:
        """Starts as many of those who wait as there is room for, in order; each on the rank with the least to do.

        Nobody overtakes: who could go nowhere holds up all behind, who is pinned to a full rank holds up that rank.
        """

        def has_place(rank: int) -> bool:
            return len(self._running[rank]) < self._config.max_batch and self._prefill_room(prefills[rank]) > 0

        open_ranks = [rank for rank in range(len(self._running)) if has_place(rank)]
        tokens = {rank: sum(len(sequence.tokens) for sequence in self._running[rank]) for rank in open_ranks}
        spare = {rank: self._spare_pages(rank) for rank in open_ranks}
        for sequence in list(self._waiting):
            pinned, needed = sequence.request.rank, self._pages_ahead(sequence)
            choices = [rank for rank in open_ranks if pinned in (None, rank)]
            choices = [rank for rank in choices if all(map(operator.le, needed, spare[rank]))]
            if choices:
                rank = min(choices, key=tokens.__getitem__)
                self._waiting.remove(sequence)
                self._running[rank].append(sequence)
                sequence.rank, sequence.tables = rank, PageTables(len(self._groups))
                self._plan(sequence, self._prefill_room(prefills[rank]), prefills[rank])
                tokens[rank] += len(sequence.tokens)
                spare[rank] = list(map(operator.sub, spare[rank], needed))
                if not has_place(rank):
                    open_ranks.remove(rank)
            elif pinned is None or not open_ranks:
                break
            elif pinned in open_ranks:
                open_ranks.remove(pinned)

    def _plan(self, sequence: Sequence, room: int, chunks: list[Chunk]) -> None:
        """Adds its next tokens, `room` at most, and gives them pages: if none are free, those of who came last."""
        length = min(room, sequence.num_uncomputed)
        pages = self._pages[sequence.rank]
        while not pages.extend(sequence.tables, sequence.num_computed + length):
            last = self._running[sequence.rank][-1]
            self._preempt(last)
            if last is sequence:
                return
        if length:
            chunks.append(Chunk(sequence, sequence.num_computed, length, length == sequence.num_uncomputed))

    def _prefill_room(self, chunks: list[Chunk]) -> int:
        """How many tokens one more chunk beside these may hold."""
        if len(chunks) >= self._config.max_prefill_sequences:
            return 0
        return self._config.max_prefill_tokens - sum(chunk.length for chunk in chunks)

    def _preempt(self, sequence: Sequence) -> None:
        self._vacate(sequence)
        sequence.rank, sequence.num_computed, sequence.tables = -1, 0, NO_PAGES
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _end(self, sequence: Sequence) -> None:
        del self._live[sequence.request.id]
        if sequence.rank < 0:
            self._waiting.remove(sequence)
        else:
            self._vacate(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        self._running[sequence.rank].remove(sequence)
        self._pages[sequence.rank].release(sequence.tables)

    def _room(self, group: PageGroup) -> int:
        """The most tokens that a request can have for its pages to fit into a group."""
        held = self._most_pages(group, self._max_context, self._config.max_prefill_tokens)
        return self._max_context if group.pages_per_rank >= held else group.pages_per_rank * self._config.page_size

    def _spare_pages(self, rank: int) -> list[int]:
        """Pages of each group beside those that the sequences running on a rank need, or soon will."""
        spare = [group.pages_per_rank for group in self._groups]
        for sequence in self._running[rank]:
            spare = list(map(operator.sub, spare, self._pages_ahead(sequence)))
        return spare

    def _pages_ahead(self, sequence: Sequence) -> list[int]:
        """Pages for all its tokens and a page's worth more, so that whoever is admitted next is not soon preempted."""
        tokens = min(len(sequence.tokens) + self._config.page_size, sequence.limit)
        at_once = min(sequence.num_uncomputed, self._config.max_prefill_tokens)
        return [self._most_pages(group, tokens, at_once) for group in self._groups]

    def _most_pages(self, group: PageGroup, tokens: int, at_once: int) -> int:
        """Pages that a sequence of so many tokens holds at most, if its steps compute up to `at_once` of them."""
        page_size = self._config.page_size
        return pages_reached(group.span, at_once, page_size, -(-tokens // page_size))
