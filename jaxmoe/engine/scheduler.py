"""Which tokens of which requests go through the model in the next step. Imports neither jax nor numpy.

Every step decodes all that decode and, within a budget of tokens, prefills chunks of the rest. Requests have one order,
by arrival and priority, and it never changes: a level of priority is worth so many steps of having waited, so that
whoever waits comes first in the end. They wait in that order; once admitted to an attention rank they stay there. When
a rank runs out of KV pages, the last in order of those running there gives up all of its own, keeps its tokens, and
waits in its place to have them recomputed. So the first in order always moves on, and with it the whole.
"""

import bisect
import dataclasses
import operator
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from hashlib import blake2b
from typing import NamedTuple

from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.kv_events import KvEventBatch, RankEvents
from jaxmoe.engine.pages import PageGroup, PageTables, RankPages, page_name, pages_reached
from jaxmoe.engine.request import MOST_PRIORITY, Output, Request, Sampled
from jaxmoe.engine.sequence import NO_PAGES, Chunk, Sequence, StepPlan
from jaxmoe.errors import DuplicateRequestError, InvalidRequestError, QueueFullError

# How much more than the least loaded rank another may carry, in multiples of the tokens it need not compute, for a
# request to go where its prefix is cached.
AFFINITY = 4
BY_ORDER = operator.attrgetter("order")


class RankLoad(NamedTuple):
    """What one attention rank carries.

    waiting: those in the queue that are pinned to it.
    used_pages, total_pages: of all groups of pages together, so that they tell what share of the pages is in use; one
        token has a place in every group.
    generated_tokens, queried_tokens, hit_tokens: since the start: that it generated, of the prompts that it admitted,
        and of these those found in its prefix cache.
    """

    running: int
    waiting: int
    pending_tokens: int
    used_pages: int
    total_pages: int
    generated_tokens: int = 0
    queried_tokens: int = 0
    hit_tokens: int = 0


class Stats(NamedTuple):
    """Counts since the start, and what there is now, over all ranks.

    preemptions: how often a sequence gave up its pages. failed_steps: see `Scheduler.fail`.
    queried_tokens, hit_tokens: of the prompts that were admitted, and of these those found in the prefix cache.
    cached_pages: that nobody uses and the prefix cache could give.
    drafts, accepted_drafts: that went through the model, and of these those that were what was then chosen.
    """

    running: int
    waiting: int
    preemptions: int
    failed_steps: int
    queried_tokens: int
    hit_tokens: int
    used_pages: int
    cached_pages: int
    total_pages: int
    drafts: int = 0
    accepted_drafts: int = 0

    @property
    def accepted_length(self) -> float:
        """Tokens that a step with a draft brings a sequence, in the mean: from 1 to 2; nan without drafts."""
        return 1 + self.accepted_drafts / self.drafts if self.drafts else float("nan")


class Scheduler:
    """`schedule` and `complete` alternate; `submit` and `cancel` may come at any time between.

    Or a step is planned while the one before is in flight: `complete` then comes after the next `schedule`, which takes
    it that every sequence goes on. What it plans for one that turns out to have ended is void, and only that.
    A plan is to be launched before the next call of either. From then on its tokens count as computed, and pages that
    only it looks into as free: whatever is launched later comes after it on the device.
    """

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
        self._events = [RankEvents() for _ in range(num_ranks if config.prefix_cache else 0)]
        self._pages = [
            RankPages(groups, config.page_size, self._events[rank] if self._events else None)
            for rank in range(num_ranks)
        ]
        self._running: list[list[Sequence]] = [[] for _ in range(num_ranks)]  # by rank, in order
        self._slots = [list(range(config.max_batch, 0, -1)) for _ in range(num_ranks)]  # free ones, by rank
        self._waiting: list[Sequence] = []  # in order
        self._live: dict[str, Sequence] = {}
        self._samples: dict[str, list[Sequence]] = {}  # those that live, by the id that was submitted
        self._aborted: dict[str, list[Output]] = {}  # cancelled, and not yet told by `complete`
        self._num_steps = self._num_submitted = self._num_event_batches = 0
        self._generated, self._queried, self._hits = ([0] * num_ranks for _ in range(3))  # tokens, by rank
        self._drafts = self._accepted_drafts = 0
        self.num_preemptions = self.num_failed = 0

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
        if request.id in self._samples or request.id in self._aborted:
            raise DuplicateRequestError(
                f"a request with id {request.id!r} is live; use another id, or wait for its end"
            )
        # Whoever comes between two steps waits for the next, though there may be a place.
        free = self._config.max_batch * len(self._running) - self.num_running
        if len(self._waiting) >= self._config.max_queue + free:
            raise QueueFullError(f"{len(self._waiting)} requests wait already (max_queue); try again later")
        self._num_submitted += 1
        urgency = self._num_steps + request.priority * self._config.priority_ageing
        root = b"" if self._config.prefix_cache else None
        if root is None and request.params.n > 1:
            root = page_name(b"", (self._num_submitted,))  # that no other request has
        samples = self._samples[request.id] = []
        for index in range(request.params.n):
            own, order = sample_of(request, index), (urgency, self._num_submitted, index)
            first = samples[0] if samples else None
            sequence = Sequence(own, request.id, index, list(request.prompt), limit, order, root, first)
            samples.append(sequence)
            self._live[own.id] = sequence
            bisect.insort(self._waiting, sequence, key=BY_ORDER)

    def cancel(self, request_id: str, index: int | None = None) -> bool:
        """Ends a request, or one of its samples, and frees the pages; the next `complete` tells of it.

        False if no such request or sample is live. A step already planned may still run, with those pages: who gets
        them next comes after it on the device.
        """
        samples = [each for each in self._samples.get(request_id, ()) if index in (None, each.index)]
        for sequence in samples:
            self._end(sequence)
            aborted = Output(request_id, (), (), "abort", index=sequence.index)
            self._aborted.setdefault(request_id, []).append(aborted)
        return bool(samples)

    def schedule(self) -> StepPlan:
        """Plans a step and gives its tokens the pages they need."""
        prefills: list[list[Chunk]] = [[] for _ in self._running]
        decodes: list[list[Chunk]] = [[] for _ in self._running]
        # What is left for prefills once all have decoded that can.
        decoding, each = self._config.token_budget, self._config.decode_tokens
        budgets = [decoding - each * sum(sequence.decodes for sequence in running) for running in self._running]
        for rank, running in enumerate(self._running):
            for sequence in running:  # preemption shortens this list, at its end
                if sequence.decodes:
                    self._plan(sequence, 1, decodes[rank])
                else:
                    self._plan(sequence, self._prefill_room(prefills[rank], budgets[rank]), prefills[rank])
        if self._config.speculate:
            decodes = [[self._with_draft(chunk) for chunk in chunks] for chunks in decodes]
        if self._waiting:
            self._admit(prefills, budgets)
        self._num_steps += 1
        plan = StepPlan(tuple(map(tuple, prefills)), tuple(map(tuple, decodes)))
        for chunk in plan.chunks:
            chunk.sequence.in_flight = chunk
        return plan

    def complete(self, plan: StepPlan, sampled: Mapping[str, Sampled]) -> list[Output]:
        """Takes in what a step brought: `sampled` has it by request id, for each chunk that samples."""
        outputs = self._told_aborts()
        for rank, chunk in plan.placed:
            sequence = chunk.sequence
            if sequence.in_flight is chunk:
                sequence.in_flight = None
            if sequence.ended:  # cancelled, or by the token before, while the step ran
                continue
            before, reason = len(sequence.tokens), None
            brought = sampled[sequence.request.id] if chunk.samples else None
            for token in brought.tokens if brought else ():
                sequence.tokens.append(token)
                if reason := self._finish_reason(sequence):
                    break
            if sequence.rank >= 0:  # not preempted while the step ran
                # What was sampled last is still to be computed; a draft that was wrong is written over.
                sequence.num_computed = len(sequence.tokens) - 1 if brought else chunk.start + chunk.length
                self._settle(sequence)
            if brought is None:
                continue
            sequence.draft = brought.draft
            self._generated[rank] += len(sequence.tokens) - before
            self._drafts += chunk.draws - 1
            self._accepted_drafts += len(brought.tokens) - 1
            if reason:
                self._end(sequence)
            tokens = tuple(sequence.tokens[before:])
            outputs.append(
                Output(
                    sequence.name,
                    tokens,
                    brought.logprobs[: len(tokens)],
                    reason,
                    tokens[-1] if reason == "stop" else None,
                    sequence.index,
                    brought.top_logprobs[: len(tokens)],
                    brought.prompt_logprobs,
                    cached_tokens=sequence.num_cached,
                )
            )
        return outputs

    def fail(self, plan: StepPlan, error: str) -> list[Output]:
        """In place of `complete`, after a step that failed and left nothing in the KV cache that can be relied on.

        All requests with a part in it end with "error"; the others are computed anew, and no prefix is cached. Whatever
        else is in flight is void too.
        """
        outputs = self._told_aborts()
        for name in dict.fromkeys(chunk.sequence.name for chunk in plan.chunks):
            for sequence in list(self._samples.get(name, ())):
                self._end(sequence)
                outputs.append(Output(name, (), (), "error", index=sequence.index, error=error))
        for running in self._running:
            for sequence in list(running):
                self._requeue(sequence)
        for sequence in self._live.values():
            sequence.in_flight = None
        self.clear_prefix_cache()
        self.num_failed += 1
        return outputs

    def clear_prefix_cache(self) -> None:
        """Forgets all prefixes; whoever runs keeps its pages."""
        for pages in self._pages:
            pages.clear()

    def kv_events(self) -> list[KvEventBatch]:
        """What entered and left the prefix caches since the last call, as far as it is in pages of the widest span."""
        batches = []
        for rank, events in enumerate(self._events):
            if taken := events.take():
                self._num_event_batches += 1
                batches.append(KvEventBatch(self._num_event_batches, rank, taken))
        return batches

    def stats(self) -> Stats:
        return Stats(
            running=self.num_running,
            waiting=self.queue_length,
            preemptions=self.num_preemptions,
            failed_steps=self.num_failed,
            queried_tokens=sum(self._queried),
            hit_tokens=sum(self._hits),
            used_pages=sum(pages.used for pages in self._pages),
            cached_pages=sum(pages.cached for pages in self._pages),
            total_pages=sum(pages.total for pages in self._pages),
            drafts=self._drafts,
            accepted_drafts=self._accepted_drafts,
        )

    def loads(self) -> list[RankLoad]:
        pinned = [sequence.request.rank for sequence in self._waiting]
        return [
            RankLoad(
                running=len(running),
                waiting=pinned.count(rank),
                pending_tokens=sum(len(sequence.tokens) for sequence in running),
                used_pages=pages.used,
                total_pages=pages.total,
                generated_tokens=self._generated[rank],
                queried_tokens=self._queried[rank],
                hit_tokens=self._hits[rank],
            )
            for rank, (running, pages) in enumerate(zip(self._running, self._pages, strict=True))
        ]

    def check_integrity(self) -> None:
        """Raises AssertionError unless every page and every live request is where it should be, once."""
        for rank, (running, pages) in enumerate(zip(self._running, self._pages, strict=True)):
            pages.check_integrity([(each.tables, each.num_computed, each.num_planned) for each in running])
            assert all(sequence.rank == rank for sequence in running)
            slots = [*self._slots[rank], *(sequence.slot for sequence in running)]
            assert sorted(slots) == list(range(1, self._config.max_batch + 1))
            assert running == sorted(running, key=BY_ORDER)
        assert self._waiting == sorted(self._waiting, key=BY_ORDER)
        assert not any(sequence.ended for sequence in self._live.values())
        for sequence in self._waiting:
            assert (sequence.rank, sequence.num_computed, sequence.num_stored) == (-1, 0, 0)
            assert sequence.tables is NO_PAGES
        assert not NO_PAGES.end
        placed = [*self._waiting, *(sequence for running in self._running for sequence in running)]
        assert sorted(sequence.request.id for sequence in placed) == sorted(self._live)
        samples = [(name, sequence) for name, samples in self._samples.items() for sequence in samples]
        assert sorted(sequence.request.id for _, sequence in samples) == sorted(self._live)
        assert all(sequence.name == name for name, sequence in samples)

    def _limit(self, request: Request) -> int:
        """The number of tokens at which the request ends; raises InvalidRequestError if it cannot be served."""
        prompt, max_tokens, rank = request.prompt, request.params.max_tokens, request.rank
        request.params.validate(self._vocab_size)
        if abs(request.priority) > MOST_PRIORITY:
            raise InvalidRequestError(
                f"priority={request.priority} must be between {-MOST_PRIORITY} and {MOST_PRIORITY}", "priority"
            )
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

    def _told_aborts(self) -> list[Output]:
        outputs = [output for samples in self._aborted.values() for output in samples]
        self._aborted.clear()
        return outputs

    def _admit(self, prefills: list[list[Chunk]], budgets: Seq[int]) -> None:
        """Starts as many of those who wait as there is room for, in order; `_place` says where.

        Nobody overtakes: who could go nowhere holds up all behind, who is pinned to a full rank holds up that rank.
        Only further samples stand aside until the first has computed what they share.
        """

        def has_place(rank: int) -> bool:
            room = self._prefill_room(prefills[rank], budgets[rank])
            return len(self._running[rank]) < self._config.max_batch and room > 0

        open_ranks = [rank for rank in range(len(self._running)) if has_place(rank)]
        loads = {rank: sum(len(sequence.tokens) for sequence in self._running[rank]) for rank in open_ranks}
        spare = {rank: self._spare_pages(rank) for rank in open_ranks}
        for sequence in list(self._waiting):
            if self._stands_aside(sequence):
                continue
            if sequence.in_flight is not None:  # preempted just now: its last token is not here yet
                break
            pinned = sequence.request.rank
            hits = {rank: self._hit(sequence, rank) for rank in open_ranks if pinned in (None, rank)}
            needed = {rank: self._pages_needed(sequence, rank, hit) for rank, hit in hits.items()}
            choices = [rank for rank in hits if all(map(operator.le, needed[rank], spare[rank]))]
            if choices:
                rank = self._place(choices, hits, loads)
                self._waiting.remove(sequence)
                self._start(sequence, rank, hits[rank])
                self._plan(sequence, self._prefill_room(prefills[rank], budgets[rank]), prefills[rank])
                loads[rank] += len(sequence.tokens)
                spare[rank] = list(map(operator.sub, spare[rank], needed[rank]))
                if not has_place(rank):
                    open_ranks.remove(rank)
            elif pinned is None or not open_ranks:
                break
            elif pinned in open_ranks:
                open_ranks.remove(pinned)

    def _place(self, choices: Seq[int], hits: Mapping[int, int], loads: Mapping[int, int]) -> int:
        """The rank that has most of the sequence's pages; of equals the one with the fewest tokens, computed or not.

        No rank is taken that carries more than twice the tokens of the least loaded one, and more by over AFFINITY
        times those that need not be computed there: so a prefix that all want spreads.
        """
        least = min(loads[rank] for rank in choices)
        size = self._config.page_size
        fair = (rank for rank in choices if loads[rank] - least <= max(least, AFFINITY * hits[rank] * size))
        return min(fair, key=lambda rank: (-hits[rank], loads[rank], rank))

    def _stands_aside(self, sequence: Sequence) -> bool:
        first, size = sequence.first, self._config.page_size
        if first is None or first.request.id not in self._live:
            return False
        return first.num_stored < (len(sequence.request.prompt) - 1) // size

    def _start(self, sequence: Sequence, rank: int, hit: int) -> None:
        """Lets a sequence run on a rank with so many pages that are there already."""
        bisect.insort(self._running[rank], sequence, key=BY_ORDER)
        sequence.rank, sequence.slot = rank, self._slots[rank].pop()
        sequence.tables = PageTables(len(self._groups))
        if hit:
            self._pages[rank].adopt(sequence.tables, sequence.names, hit)
        sequence.num_stored, sequence.num_computed = hit, hit * self._config.page_size
        if sequence.num_cached < 0:
            sequence.num_cached = sequence.num_computed
            self._queried[rank] += len(sequence.tokens)
            self._hits[rank] += sequence.num_cached

    def _hit(self, sequence: Sequence, rank: int) -> int:
        """How many pages of a waiting sequence need not be computed on a rank; its last token always is."""
        request = sequence.request
        # The prompt's log-probabilities, and its experts, are told with the first token.
        asked = request.params.prompt_logprobs is not None or (request.params.routed_experts and not sequence.index)
        untold = asked and len(sequence.tokens) == len(request.prompt)
        if sequence.root is None or untold:
            return 0
        most = (len(sequence.tokens) - 1) // self._config.page_size
        self._name_pages(sequence, most)
        return self._pages[rank].hit(sequence.names, most)

    def _name_pages(self, sequence: Sequence, count: int) -> None:
        """Names as many of its first pages."""
        names, size = sequence.names, self._config.page_size
        assert sequence.root is not None
        parent = names[-1] if names else sequence.root
        for index in range(len(names), count):
            parent = page_name(parent, sequence.tokens[index * size : (index + 1) * size])
            names.append(parent)

    def _settle(self, sequence: Sequence) -> None:
        """Lets others find the pages that have become full, and takes back those that it will not look into again."""
        size, start, computed = self._config.page_size, sequence.num_stored, sequence.num_planned
        count, pages = computed // size, self._pages[sequence.rank]
        if sequence.root is not None and count > start:
            self._name_pages(sequence, count)
            parent = sequence.names[start - 1] if start else sequence.root
            tokens = sequence.tokens[start * size : count * size]
            pages.store(sequence.tables, sequence.names[start:count], start, parent, tokens)
            sequence.num_stored = count
        pages.trim(sequence.tables, computed)

    def _plan(self, sequence: Sequence, room: int, chunks: list[Chunk]) -> None:
        """Adds its next tokens, `room` at most, and gives them pages: if none are free, those of who came last."""
        before = sequence.in_flight
        if before is not None:
            self._settle(sequence)
        length, start = min(room, sequence.num_uncomputed), sequence.num_planned
        ahead = before.draws if before is not None and before.samples else 0
        chunk = Chunk(sequence, start, length, length == sequence.num_uncomputed, ahead=ahead)
        pages = self._pages[sequence.rank]
        while not pages.extend(sequence.tables, chunk.end):
            last = self._running[sequence.rank][-1]
            self._preempt(last)
            if last is sequence:
                return
        if length:
            chunks.append(chunk)

    def _with_draft(self, chunk: Chunk) -> Chunk:
        """The same with what was drafted, where that can bring a token and there is a free place for it."""
        sequence, end = chunk.sequence, chunk.end + 1
        unknown = sequence.draft is None and not chunk.ahead
        if unknown or sequence.request.params.needs_last_token or end >= sequence.limit:
            return chunk
        # Nobody gives up pages for a guess.
        if not self._pages[sequence.rank].extend(sequence.tables, end):
            return chunk
        return chunk._replace(length=2, draft=True)

    def _prefill_room(self, chunks: list[Chunk], budget: int) -> int:
        """How many tokens one more chunk beside these may hold, if all may hold `budget`."""
        if len(chunks) >= self._config.max_prefill_sequences:
            return 0
        return min(budget, self._config.max_prefill_tokens) - sum(chunk.length for chunk in chunks)

    def _preempt(self, sequence: Sequence) -> None:
        self._requeue(sequence)
        self.num_preemptions += 1

    def _requeue(self, sequence: Sequence) -> None:
        self._vacate(sequence)
        sequence.rank, sequence.num_computed, sequence.num_stored, sequence.tables = -1, 0, 0, NO_PAGES
        bisect.insort(self._waiting, sequence, key=BY_ORDER)

    def _end(self, sequence: Sequence) -> None:
        sequence.ended = True
        del self._live[sequence.request.id]
        self._samples[sequence.name].remove(sequence)
        if not self._samples[sequence.name]:
            del self._samples[sequence.name]
        if sequence.rank < 0:
            self._waiting.remove(sequence)
        else:
            self._vacate(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        self._running[sequence.rank].remove(sequence)
        self._slots[sequence.rank].append(sequence.slot)
        self._pages[sequence.rank].release(sequence.tables)

    def _room(self, group: PageGroup) -> int:
        """The most tokens that a request can have for its pages to fit into a group."""
        held = self._most_pages(group, self._max_context, self._config.max_prefill_tokens)
        return self._max_context if group.pages_per_rank >= held else group.pages_per_rank * self._config.page_size

    def _spare_pages(self, rank: int) -> list[int]:
        """Free pages of each group beside those that the sequences running on a rank soon need."""
        spare = self._pages[rank].free
        for sequence in self._running[rank]:
            for group, ahead in enumerate(self._pages_ahead(sequence, sequence.num_uncomputed)):
                spare[group] -= max(0, ahead - len(sequence.tables.pages[group]))
        return spare

    def _pages_needed(self, sequence: Sequence, rank: int, hit: int) -> list[int]:
        """Free pages of each group that a waiting sequence takes, now or soon, if it finds `hit` pages on a rank."""
        ahead = self._pages_ahead(sequence, len(sequence.tokens) - hit * self._config.page_size)
        return list(map(operator.sub, ahead, self._pages[rank].shared(sequence.names, hit))) if hit else ahead

    def _pages_ahead(self, sequence: Sequence, uncomputed: int) -> list[int]:
        """Pages for all its tokens and a page's worth more, so that whoever is admitted next is not soon preempted."""
        tokens = min(len(sequence.tokens) + self._config.page_size, sequence.limit)
        at_once = min(uncomputed, self._config.max_prefill_tokens)
        return [self._most_pages(group, tokens, at_once) for group in self._groups]

    def _most_pages(self, group: PageGroup, tokens: int, at_once: int) -> int:
        """Pages that a sequence of so many tokens holds at most, if its steps compute up to `at_once` of them."""
        page_size = self._config.page_size
        return pages_reached(group.span, at_once, page_size, -(-tokens // page_size))


def sample_of(request: Request, index: int) -> Request:
    """A request for one of its samples alone. The first has the request's own id and seed."""
    params = request.params
    if index == 0:
        return request
    seed = blake2b(f"{params.seed} {index}".encode(), digest_size=4).digest()
    own = dataclasses.replace(params, seed=int.from_bytes(seed, "little"), prompt_logprobs=None)
    return dataclasses.replace(request, id=f"{request.id}\0{index}", params=own)
