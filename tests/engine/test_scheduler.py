import dataclasses
import zlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.pages import PageGroup, pages_reached
from jaxmoe.engine.request import Request, Sampled, SamplingParams
from jaxmoe.engine.scheduler import Scheduler, sample_of
from jaxmoe.errors import ConfigError, DuplicateRequestError, InvalidRequestError, QueueFullError
from jaxmoe.spans import FULL, Span

VOCAB = 32
EOS = frozenset({0, 1})


def next_token(tokens, spans=(FULL,), seed=None):
    """Depends on all that the last token sees through any of the spans, and on the seed."""
    seen = [token for span in spans for token in tokens[span.first(len(tokens) - 1) :]]
    return zlib.crc32(bytes(seen), (seed or 0) & 0xFFFFFFFF) % VOCAB


def solo_run(request, max_context, spans=(FULL,)):
    """Tokens and finish reason of a request that has the model to itself."""
    params, tokens = request.params, list(request.prompt)
    while True:
        tokens.append(next_token(tokens, spans, params.seed))
        generated = tokens[len(request.prompt) :]
        if tokens[-1] in params.stop_token_ids or (tokens[-1] in EOS and not params.ignore_eos):
            return generated, "stop"
        if len(generated) == params.max_tokens or len(tokens) == max_context:
            return generated, "length"


class PagedModel:
    """A model that keeps in pages, by group, what stands for keys and values: they depend on all tokens up to theirs.

    Every query must find there, in the pages that its sequence's tables name, those of each token that it sees.
    """

    def __init__(self, num_ranks, page_size, spans):
        self.page_size = page_size
        self.spans = spans
        self.num_ranks = num_ranks
        self.reset()

    def reset(self):
        self.caches = [[{} for _ in self.spans] for _ in range(self.num_ranks)]
        # By slot all tokens but the one that was drawn last, that one, and what was drafted after it.
        self.kept = [{} for _ in range(self.num_ranks)]

    def __call__(self, plan):
        sampled, kept = {}, []
        for rank, chunk in plan.placed:
            sequence, seed, own = chunk.sequence, chunk.sequence.request.params.seed, chunk.tokens
            before = sequence.tokens[: chunk.start]
            if chunk.ahead:
                before, drawn, draft = self.kept[rank][sequence.slot]
                own = [{-2 * sequence.slot: drawn, -2 * sequence.slot - 1: draft}[token] for token in own]
            tokens, start, end = [*before, *own], len(before), len(before) + len(own)
            assert chunk.start <= start <= end <= chunk.end
            assert chunk.ahead == 2 or (start, end) == (chunk.start, chunk.end)
            for group, span in enumerate(self.spans):
                self.attend(sequence, tokens, group, span, range(start, end))
            if chunk.samples:
                drawn = [next_token(tokens[:seen], self.spans, seed) for seen in range(end + 1 - chunk.draws, end + 1)]
                drawn = drawn[: 1 + (chunk.draft and drawn[0] == own[-1])]
                known = tokens[:-1] if chunk.draft else tokens
                # Right about every second time.
                coming = next_token([*known, *drawn], self.spans, seed)
                draft = coming if zlib.crc32(bytes(tokens)) % 2 else (coming + 1) % VOCAB
                sampled[sequence.request.id] = Sampled(tuple(drawn), (-0.5,) * len(drawn), draft=draft)
                kept.append((rank, sequence.slot, ([*known, *drawn[:-1]], drawn[-1], draft)))
        for rank, slot, latest in kept:
            self.kept[rank][slot] = latest
        return sampled

    def attend(self, sequence, tokens, group, span, queries):
        cache, tables = self.caches[sequence.rank][group], sequence.tables

        def slot(position):
            index = position // self.page_size - tables.passed[group]
            assert index >= 0
            return tables.pages[group][index], position % self.page_size

        def vector(position):
            return zlib.crc32(bytes(tokens[: position + 1]))

        cache.update({slot(query): vector(query) for query in queries})
        for query in queries:
            for position in range(span.first(query), query + 1):
                assert cache[slot(position)] == vector(position)


def make(num_ranks=1, pages_per_rank=16, max_context=32, page_size=2, spans=(FULL,), **limits):
    """pages_per_rank: of every group, or of each. No prefix cache unless asked for: prompts here begin alike."""
    config = EngineConfig(page_size=page_size, **{"max_prefill_tokens": 8, "prefix_cache": False, **limits})
    pages = [pages_per_rank] * len(spans) if isinstance(pages_per_rank, int) else pages_per_rank
    scheduler = Scheduler(
        config,
        num_ranks=num_ranks,
        groups=list(map(PageGroup, spans, pages)),
        max_context=max_context,
        eos_token_ids=EOS,
        vocab_size=VOCAB,
    )
    return scheduler, PagedModel(num_ranks, page_size, spans)


def prompt_of(length, first=2):
    return tuple((first + i) % VOCAB for i in range(length))


def ask(name, length=3, rank=None, **params):
    return Request(name, prompt_of(length), SamplingParams(**{"ignore_eos": True, "max_tokens": 4, **params}), rank)


def chunks_of(plan):
    return [(chunk.sequence.request.id, chunk.start, chunk.length, chunk.samples) for chunk in plan.chunks]


def ranks_of(plan):
    return {chunk.sequence.request.id: chunk.sequence.rank for chunk in plan.chunks}


def step(scheduler, model):
    plan = scheduler.schedule()
    return plan, scheduler.complete(plan, model(plan))


def steps(scheduler, model, most=1000):
    """Plan and outputs of each step until nothing is left to do."""
    for _ in range(most):
        if not scheduler.has_work:
            return
        plan, outputs = step(scheduler, model)
        scheduler.check_integrity()
        yield plan, outputs
    raise AssertionError(f"work is left after {most} steps")


def drain(scheduler, model):
    return [output for _, outputs in steps(scheduler, model) for output in outputs]


def tokens_of(outputs, name):
    return [token for output in outputs if output.request_id == name for token in output.token_ids]


SPANS = st.sampled_from([FULL, Span("window", 1), Span("window", 5), Span("chunk", 6), Span("chunk", 16)])
REQUESTS = st.builds(
    dict,
    length=st.integers(1, 9),
    first=st.integers(2, 4),
    priority=st.sampled_from([0, 0, 0, -1, 2]),
    n=st.sampled_from([1, 1, 1, 2, 3]),
    prompt_logprobs=st.sampled_from([None, None, None, 0]),
    seed=st.sampled_from([None, 5]),
    rank=st.none() | st.integers(0, 2),
    max_tokens=st.none() | st.integers(1, 12),
    stop_token_ids=st.just(()) | st.tuples(st.integers(0, VOCAB - 1)),
    ignore_eos=st.booleans(),
)


class AnyUse(RuleBasedStateMachine):
    """Requests that come, run, fail and are cancelled in any order, on a machine with too little of everything."""

    @initialize(
        num_ranks=st.integers(1, 3),
        page_size=st.integers(1, 4),
        groups=st.lists(st.tuples(SPANS, st.integers(5, 9)), min_size=1, max_size=3, unique_by=lambda group: group[0]),
        max_context=st.integers(8, 40),
        max_batch=st.integers(1, 4),
        max_prefill_tokens=st.integers(1, 8),
        max_prefill_sequences=st.integers(1, 3),
        max_queue=st.integers(1, 6),
        spare_tokens=st.none() | st.integers(0, 4),
        prefix_cache=st.booleans(),
        priority_ageing=st.integers(1, 5),
        speculate=st.sampled_from([None, "mtp"]),
    )
    def start(self, groups, spare_tokens, **limits):
        self.most = 2 if limits["speculate"] else 1
        if spare_tokens is not None:
            limits["max_batch_tokens"] = limits["max_batch"] * self.most + spare_tokens
            limits["max_prefill_tokens"] = min(limits["max_prefill_tokens"], limits["max_batch_tokens"])
        self.limits = limits
        self.spans, pages_per_rank = zip(*groups, strict=True)
        self.scheduler, self.model = make(spans=self.spans, pages_per_rank=pages_per_rank, **limits)
        page_size, max_context = limits["page_size"], limits["max_context"]
        total = -(-max_context // page_size)
        self.max_context = min(
            max_context
            if pages_reached(span, limits["max_prefill_tokens"], page_size, total) <= pages
            else min(max_context, pages * page_size)
            for span, pages in groups
        )
        self.flights = []  # plans with what the model made of them, two at most
        self.requests = {}  # all that were accepted
        self.samples = {}  # what each of their samples asks for by itself, by id and index
        self.untouched = []  # those that never were in a plan, in the order in which they may be
        self.tokens = {}
        self.ends = {}
        self.num_steps = 0
        self.event_batches = 0
        self.found = [set() for _ in range(limits["num_ranks"])]  # hashes by rank, as events tell

    @rule(wanted=st.lists(REQUESTS, min_size=1, max_size=4))
    def submit(self, wanted):
        for request in wanted:
            self.submit_one(**request)

    def submit_one(self, length, first, rank, priority, **params):
        if rank is not None:
            rank %= self.limits["num_ranks"]
        request = Request(str(len(self.requests)), prompt_of(length, first), SamplingParams(**params), rank, priority)
        queue_length = self.scheduler.queue_length
        places = self.limits["max_queue"] + self.limits["max_batch"] * self.limits["num_ranks"]
        places -= self.scheduler.num_running
        longest = min(length + (params["max_tokens"] or 1), self.limits["max_context"])
        fits = length < self.max_context and longest <= self.max_context
        try:
            self.scheduler.submit(request)
        except InvalidRequestError:
            assert not fits
        except QueueFullError:
            assert queue_length >= places
        else:
            assert fits
            assert queue_length < places
            assert self.scheduler.queue_length == queue_length + params["n"]
            self.requests[request.id] = request
            self.untouched.append((self.num_steps + priority * self.limits["priority_ageing"], request))
            self.untouched.sort(key=lambda entry: entry[0])
            for index in range(params["n"]):
                self.samples[request.id, index] = sample_of(request, index)
                self.tokens[request.id, index] = []
            with pytest.raises(DuplicateRequestError):
                self.scheduler.submit(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data):
        request = data.draw(st.sampled_from(list(self.requests.values())))
        index = data.draw(st.none() | st.integers(0, request.params.n - 1))
        if self.scheduler.cancel(request.id, index):
            assert index is None or (request.id, index) not in self.ends
            self.untouched = [entry for entry in self.untouched if entry[1] is not request]
            with pytest.raises(DuplicateRequestError):
                self.scheduler.submit(request)
        assert not self.scheduler.cancel(request.id, index)

    @rule(steps=st.integers(1, 8), overlap=st.booleans())
    def run(self, steps, overlap):
        """overlap: each step is planned while the one before is in flight."""
        for _ in range(steps):
            if not self.flights or overlap:
                self.schedule()
            self.complete()

    @rule()
    def schedule(self):
        if len(self.flights) == 2:
            self.complete()
        self.plan = self.scheduler.schedule()
        self.flights.append((self.plan, self.model(self.plan)))
        self.num_steps += 1
        for prefills, decodes, load in zip(self.plan.prefills, self.plan.decodes, self.scheduler.loads(), strict=True):
            assert len(prefills) <= self.limits["max_prefill_sequences"]
            assert sum(chunk.length for chunk in prefills) <= self.limits["max_prefill_tokens"]
            if "max_batch_tokens" in self.limits:
                tokens = sum(chunk.length for chunk in (*prefills, *decodes))
                assert tokens <= self.limits["max_batch_tokens"]
            assert all(chunk.length == chunk.draws <= self.most for chunk in decodes)
            assert all(chunk.samples and chunk.start > 0 for chunk in decodes)
            assert not any(chunk.draft for chunk in prefills)
            assert len(decodes) <= load.running <= self.limits["max_batch"]
            assert load.used_pages <= load.total_pages
        if self.plan.empty and len(self.flights) == 1:
            assert self.scheduler.num_running == self.scheduler.queue_length == 0
        self.spans_hold_no_more_than_they_see(max(self.limits["max_prefill_tokens"], self.most))
        assert all(chunk.end < chunk.sequence.limit + max(0, chunk.ahead - 1) for chunk in self.plan.chunks)
        planned = ranks_of(self.plan)
        assert len(planned) == len(list(self.plan.chunks))
        self.nobody_was_overtaken(planned)
        self.untouched = [entry for entry in self.untouched if entry[1].id not in planned]

    def spans_hold_no_more_than_they_see(self, at_once):
        for sequence in (chunk.sequence for chunk in self.plan.chunks):
            for span, pages in zip(self.spans, sequence.tables.pages, strict=False):
                if span != FULL:
                    assert len(pages) <= -(-span.reach(at_once) // self.limits["page_size"]) + 1

    def nobody_was_overtaken(self, planned):
        passed_by = []
        for _, request in self.untouched:
            if request.id not in planned:
                passed_by.append(request.rank)
            else:
                assert None not in passed_by
                assert planned[request.id] not in passed_by
                assert request.rank in (None, planned[request.id])

    @precondition(lambda self: self.flights)
    @rule()
    def complete(self):
        self.take(self.scheduler.complete(*self.flights.pop(0)))

    @precondition(lambda self: self.requests)
    @rule(late=st.booleans())
    def fail(self, late):
        """late: the last of the steps in flight, the one before having come to its end; else the first."""
        while not self.flights or (late and len(self.flights) > 1):
            self.complete() if self.flights else self.schedule()
        (plan, _), *_ = self.flights
        self.flights.clear()
        self.model.reset()
        outputs = self.scheduler.fail(plan, "the device is gone")
        failed = {output.request_id for output in outputs if output.finish_reason == "error"}
        planned = {chunk.sequence.name for chunk in plan.chunks}
        assert failed <= planned
        self.take(outputs)
        assert all(key in self.ends for key in self.samples if key[0] in planned)
        assert all(load.used_pages == load.running == 0 for load in self.scheduler.loads())

    def take(self, outputs):
        for output in outputs:
            key = output.request_id, output.index
            assert key not in self.ends
            assert len(output.token_ids) == len(output.logprobs)
            self.tokens[key] += output.token_ids
            if output.finish_reason:
                self.ends[key] = output

    @rule(clear=st.sampled_from([False, False, True]))
    def gateway(self, clear):
        if clear:
            self.scheduler.clear_prefix_cache()
        self.follow_events()

    def follow_events(self):
        for batch in self.scheduler.kv_events():
            self.event_batches += 1
            assert batch.number == self.event_batches
            found = self.found[batch.rank]
            for event in batch.events:
                if event.kind == "stored":
                    assert not found & set(event.hashes)
                    assert len(event.token_ids) == len(event.hashes) * self.limits["page_size"]
                    found |= set(event.hashes)
                elif event.kind == "removed":
                    assert found >= set(event.hashes)
                    found -= set(event.hashes)
                else:
                    found.clear()

    @invariant()
    def pages_and_requests_are_where_they_should_be(self):
        self.scheduler.check_integrity()

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        taken = -len(self.flights)
        while self.scheduler.has_work or self.flights:
            self.run(1, overlap=False)
            taken += 1
            assert taken <= 1 + self.max_context * len(self.samples), "whoever came first did not advance in every step"
        self.follow_events()
        assert all(load.used_pages == load.running == load.waiting == 0 for load in self.scheduler.loads())
        assert self.ends.keys() == self.samples.keys()
        for key, request in self.samples.items():
            tokens, reason = solo_run(request, self.max_context, self.spans)
            end = self.ends[key]
            assert bool(end.error) == (end.finish_reason == "error")
            if end.finish_reason in ("abort", "error"):
                assert self.tokens[key] == tokens[: len(self.tokens[key])]
            else:
                assert (self.tokens[key], end.finish_reason) == (tokens, reason)
                assert end.stop_token == (tokens[-1] if reason == "stop" else None)


AnyUse.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
test_every_request_ends_once_with_the_tokens_of_its_solo_run_whatever_happens = AnyUse.TestCase


def test_a_long_prompt_is_prefilled_in_chunks_and_samples_after_the_last():
    scheduler, model = make()
    scheduler.submit(ask("long", 19))
    plans = [chunks_of(step(scheduler, model)[0]) for _ in range(4)]
    assert plans == [
        [("long", 0, 8, False)],
        [("long", 8, 8, False)],
        [("long", 16, 3, True)],
        [("long", 19, 1, True)],
    ]


def test_decodes_go_on_in_every_step_while_a_long_prompt_is_prefilled():
    scheduler, model = make()
    scheduler.submit(ask("short"))
    step(scheduler, model)
    scheduler.submit(ask("long", 19))
    for start in (0, 8):
        plan, _ = step(scheduler, model)
        assert [chunk.sequence.request.id for chunk in plan.decodes[0]] == ["short"]
        assert [(chunk.sequence.request.id, chunk.start) for chunk in plan.prefills[0]] == [("long", start)]


def test_a_prompt_under_way_comes_before_a_new_one_which_gets_what_remains():
    scheduler, model = make()
    scheduler.submit(ask("first", 11))
    scheduler.submit(ask("second", 9))
    assert chunks_of(step(scheduler, model)[0]) == [("first", 0, 8, False)]
    assert chunks_of(step(scheduler, model)[0]) == [("first", 8, 3, True), ("second", 0, 5, False)]


def test_no_more_prompts_share_a_step_than_allowed():
    scheduler, model = make(max_prefill_sequences=2)
    for name in "abc":
        scheduler.submit(ask(name, 2))
    assert list(ranks_of(step(scheduler, model)[0])) == ["a", "b"]
    assert [chunk.sequence.request.id for chunk in step(scheduler, model)[0].prefills[0]] == ["c"]


def test_a_request_goes_to_the_rank_with_the_fewest_tokens_and_of_equals_the_lowest():
    scheduler, model = make(num_ranks=3, max_prefill_tokens=32)
    for name, length in [("a", 9), ("b", 5), ("c", 6), ("d", 2), ("e", 1), ("f", 1)]:
        scheduler.submit(ask(name, length))
    assert ranks_of(step(scheduler, model)[0]) == {"a": 0, "b": 1, "c": 2, "d": 1, "e": 2, "f": 1}


def test_whoever_decodes_comes_first_in_the_budget_and_prompts_share_what_is_left():
    scheduler, model = make(max_batch=4, max_batch_tokens=6)
    for name in "abc":
        scheduler.submit(ask(name, 1))
    step(scheduler, model)
    scheduler.submit(ask("long", 8))
    plan, _ = step(scheduler, model)
    assert [len(plan.decodes[0]), [chunk.length for chunk in plan.prefills[0]]] == [3, [3]]
    assert EngineConfig(max_batch=4, max_batch_tokens=6).max_prefill_tokens == 6
    with pytest.raises(
        ConfigError, match=r"max_batch_tokens=3 has no room for max_batch=4 .* use max_batch_tokens >= 4"
    ):
        EngineConfig(max_batch=4, max_batch_tokens=3)


def test_a_lower_priority_number_goes_sooner_until_others_have_waited_long_enough():
    scheduler, model = make(max_batch=1, priority_ageing=3)
    scheduler.submit(ask("running", max_tokens=8))
    step(scheduler, model)

    def later(name, priority):
        scheduler.submit(dataclasses.replace(ask(name, max_tokens=1), priority=priority))

    later("plain", 0)
    later("urgent", -1)
    for _ in range(3):
        step(scheduler, model)
    later("too late", -1)
    started = [chunk.sequence.name for plan, _ in steps(scheduler, model) for chunk in plan.prefills[0]]
    assert started == ["urgent", "plain", "too late"]


def test_of_those_running_the_least_urgent_gives_up_its_pages_although_it_came_first():
    scheduler, model = make(pages_per_rank=8)
    scheduler.submit(ask("plain", 3, max_tokens=12))
    step(scheduler, model)
    scheduler.submit(dataclasses.replace(ask("urgent", 4, max_tokens=12), priority=-1))
    ends = [output.request_id for output in drain(scheduler, model) if output.finish_reason]
    assert scheduler.num_preemptions == 1
    assert ends == ["urgent", "plain"]


def computed(scheduler, model):
    """Tokens that went through the model for each request until all had ended, and on which rank."""
    tokens, ranks = {}, {}
    for plan, _ in steps(scheduler, model):
        for chunk in plan.chunks:
            tokens[chunk.sequence.name] = tokens.get(chunk.sequence.name, 0) + chunk.length
        ranks |= ranks_of(plan)
    return tokens, ranks


def cached(**limits):
    return make(**{"prefix_cache": True, "max_prefill_tokens": 32, **limits})


def test_what_a_prompt_has_in_common_with_an_earlier_one_is_not_computed_again_but_its_last_token_is():
    scheduler, model = cached()
    for name, length, expected in [("first", 8, 8), ("same", 8, 2), ("longer", 11, 3), ("shorter", 5, 1)]:
        scheduler.submit(ask(name, length, max_tokens=1))
        plan, (output,) = step(scheduler, model)
        assert [chunk.length for chunk in plan.chunks] == [expected]
        assert output.cached_tokens == length - expected
    scheduler.submit(Request("other", prompt_of(8, 3), SamplingParams(max_tokens=1, ignore_eos=True)))
    assert computed(scheduler, model)[0] == {"other": 8}
    stats = scheduler.stats()
    assert (stats.queried_tokens, stats.hit_tokens) == (40, 18)
    assert (stats.used_pages, stats.cached_pages) == (0, 5 + 4)


def test_prompts_under_way_share_pages():
    scheduler, model = cached()
    scheduler.submit(ask("a", 9))
    step(scheduler, model)
    scheduler.submit(ask("b", 9))
    step(scheduler, model)
    assert scheduler.loads()[0].used_pages == 4 + 1 + 1


def test_without_a_prefix_cache_or_for_prompt_logprobs_everything_is_computed():
    for limits, params in [({"prefix_cache": False}, {}), ({}, {"prompt_logprobs": 0})]:
        scheduler, model = cached(**limits)
        for name in "ab":
            scheduler.submit(ask(name, 8, max_tokens=1, **params))
            assert computed(scheduler, model)[0] == {name: 8}


def test_the_next_turn_of_a_conversation_goes_where_its_pages_are():
    scheduler, model = cached(num_ranks=2)
    scheduler.submit(ask("turn", 7, max_tokens=6, rank=1))
    answer = tokens_of(drain(scheduler, model), "turn")
    scheduler.submit(Request("next", (*prompt_of(7), *answer, 3), SamplingParams(max_tokens=1)))
    assert computed(scheduler, model) == ({"next": 2}, {"next": 1})


def test_a_rank_with_much_more_to_do_loses_a_request_although_it_has_its_prefix():
    scheduler, model = cached(num_ranks=2, pages_per_rank=64, max_context=64, max_prefill_tokens=64)
    scheduler.submit(ask("prefix", 4, max_tokens=2, rank=0))
    drain(scheduler, model)
    ranks = {}
    for count in range(8):
        scheduler.submit(ask(str(count), 4, max_tokens=8))
        ranks |= ranks_of(step(scheduler, model)[0])
    # While the other is idle, up to 4 times the two tokens that are found: then that one has the prefix too.
    assert [ranks[str(count)] for count in range(4)] == [0, 0, 1, 1]
    drain(scheduler, model)
    assert {ranks[str(count)] for count in range(4, 8)} == {0, 1}


def test_a_preempted_request_finds_what_it_had_computed():
    scheduler, model = cached(pages_per_rank=8, max_prefill_tokens=8)
    requests = [ask("old", 3, max_tokens=12), Request("new", prompt_of(4, 9), ask("new", max_tokens=12).params)]
    for request in requests:
        scheduler.submit(request)
    outputs, again = [], []
    for plan, new in steps(scheduler, model):
        outputs += new
        again += [chunk for chunk in plan.chunks if scheduler.num_preemptions and chunk.sequence.name == "new"]
    assert scheduler.num_preemptions == 1
    assert again[0].start > 0
    for request in requests:
        assert tokens_of(outputs, request.id) == solo_run(request, 16)[0]


def test_pages_that_nobody_uses_are_given_up_the_least_recently_used_and_the_end_of_a_prefix_first():
    scheduler, model = cached(pages_per_rank=6)
    for name, first in [("a", 2), ("b", 10), ("a again", 2), ("c", 20)]:
        scheduler.submit(Request(name, prompt_of(5, first), SamplingParams(max_tokens=1, ignore_eos=True)))
        drain(scheduler, model)
    assert scheduler.stats().hit_tokens == 4
    # The last took three pages: two that were blank, and the second of b's.
    for first, expected in [(20, 1), (2, 1), (10, 3)]:
        scheduler.submit(Request("x", prompt_of(5, first), SamplingParams(max_tokens=1, ignore_eos=True)))
        assert computed(scheduler, model)[0] == {"x": expected}


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_samples_of_a_request_share_the_pages_of_its_prompt_which_is_computed_once(prefix_cache):
    scheduler, model = make(prefix_cache=prefix_cache, max_prefill_tokens=4, pages_per_rank=32)
    request = ask("x", 9, n=3, seed=7)
    scheduler.submit(request)
    outputs, tokens, most = [], 0, 0
    for plan, new in steps(scheduler, model):
        tokens += sum(chunk.length for chunk in plan.chunks if chunk.start < 9)
        most = max(most, scheduler.loads()[0].used_pages)
        outputs += new
    assert tokens == 9 + 1 + 1
    assert most <= 4 + 3 * 2
    answers = [[token for out in outputs if out.index == index for token in out.token_ids] for index in range(3)]
    assert answers == [solo_run(sample_of(request, index), 32)[0] for index in range(3)]
    assert len({tuple(answer) for answer in answers}) == 3
    assert sorted(out.index for out in outputs if out.finish_reason) == [0, 1, 2]
    assert {out.request_id for out in outputs} == {"x"}


def test_one_sample_can_be_cancelled_and_an_id_is_taken_until_the_last_has_ended():
    scheduler, model = make()
    scheduler.submit(ask("x", n=2))
    step(scheduler, model)
    assert scheduler.cancel("x", 0)
    assert not scheduler.cancel("x", 0)
    with pytest.raises(DuplicateRequestError):
        scheduler.submit(ask("x"))
    ends = {out.index: out.finish_reason for out in drain(scheduler, model) if out.finish_reason}
    assert ends == {0: "abort", 1: "length"}
    scheduler.submit(ask("x"))


def test_a_step_that_fails_ends_its_requests_and_has_the_others_computed_anew():
    scheduler, model = cached(max_prefill_sequences=1)
    scheduler.submit(ask("a", 6, n=2))
    scheduler.submit(Request("b", prompt_of(6, 9), ask("b").params))
    step(scheduler, model)
    step(scheduler, model)
    plan = scheduler.schedule()
    assert {chunk.sequence.name for chunk in plan.chunks} == {"a", "b"}
    scheduler.submit(ask("waiting", 6))
    model.reset()
    outputs = scheduler.fail(plan, "what happened")
    assert sorted((out.request_id, out.index, out.finish_reason, out.error) for out in outputs) == [
        ("a", 0, "error", "what happened"),
        ("a", 1, "error", "what happened"),
        ("b", 0, "error", "what happened"),
    ]
    assert tokens_of(drain(scheduler, model), "waiting") == solo_run(ask("waiting", 6), 32)[0]
    assert scheduler.stats().failed_steps == 1
    assert [event.kind for batch in scheduler.kv_events() for event in batch.events] == ["cleared", "stored", "stored"]


def in_flight(scheduler, model):
    plan = scheduler.schedule()
    return plan, model(plan)


def test_a_step_is_planned_on_tokens_that_are_still_in_flight_and_is_void_for_whoever_ended_there():
    scheduler, model = make()
    request = ask("x", stop_token_ids=(solo_run(ask("x"), 32)[0][1],))
    scheduler.submit(request)
    first, second = in_flight(scheduler, model), in_flight(scheduler, model)
    assert [(chunk.start, chunk.tokens) for chunk in second[0].chunks] == [(3, [-2])]
    outputs = scheduler.complete(*first)
    third = in_flight(scheduler, model)
    outputs += scheduler.complete(*second)
    assert (tokens_of(outputs, "x"), outputs[-1].finish_reason) == solo_run(request, 32)
    # Its id can be had again although a step of it is still in flight.
    scheduler.submit(ask("x", 5))
    fourth = in_flight(scheduler, model)
    assert scheduler.complete(*third) == []
    outputs = scheduler.complete(*fourth) + drain(scheduler, model)
    assert tokens_of(outputs, "x") == solo_run(ask("x", 5), 32)[0]


def test_whoever_is_preempted_while_in_flight_keeps_the_token_and_waits_for_it_whatever_rank_has_room():
    scheduler, model = make(num_ranks=2, pages_per_rank=8)
    requests = [ask("other", 7, rank=1), ask("old", 3, max_tokens=12, rank=0), ask("new", 4, max_tokens=12)]
    for request in requests:
        scheduler.submit(request)
    flight = in_flight(scheduler, model)
    assert ranks_of(flight[0]) == {"old": 0, "new": 0, "other": 1}
    outputs = []
    for _ in range(100):
        before, flight = flight, in_flight(scheduler, model)
        outputs += scheduler.complete(*before)
        scheduler.check_integrity()
    assert not scheduler.has_work
    assert scheduler.num_preemptions >= 1
    for request in requests:
        assert tokens_of(outputs, request.id) == solo_run(request, 16)[0]


def test_when_the_first_of_two_steps_in_flight_fails_who_is_only_in_the_second_is_computed_anew():
    scheduler, model = make()
    scheduler.submit(ask("lost"))
    first = in_flight(scheduler, model)
    scheduler.submit(ask("kept"))
    assert set(ranks_of(in_flight(scheduler, model)[0])) == {"lost", "kept"}
    model.reset()
    assert [(out.request_id, out.finish_reason) for out in scheduler.fail(first[0], "gone")] == [("lost", "error")]
    assert tokens_of(drain(scheduler, model), "kept") == solo_run(ask("kept"), 32)[0]


def test_a_request_pinned_to_a_full_rank_holds_up_only_those_for_that_rank():
    scheduler, model = make(num_ranks=2, max_batch=1)
    scheduler.submit(ask("running", rank=0, max_tokens=3))
    step(scheduler, model)
    scheduler.submit(ask("pinned", rank=0))
    scheduler.submit(ask("free"))
    scheduler.submit(ask("later", rank=0))
    assert ranks_of(step(scheduler, model)[0]) == {"running": 0, "free": 1}
    assert scheduler.loads()[0].waiting == 2
    step(scheduler, model)
    assert ranks_of(step(scheduler, model)[0])["pinned"] == 0


def test_a_large_request_is_not_overtaken_by_small_ones_that_would_fit():
    scheduler, model = make(pages_per_rank=8, max_prefill_tokens=32)
    scheduler.submit(ask("running", 6, max_tokens=6))
    step(scheduler, model)
    scheduler.submit(ask("large", 12))
    scheduler.submit(ask("small", 1, max_tokens=1))
    started = [chunk.sequence.request.id for plan, _ in steps(scheduler, model) for chunk in plan.prefills[0]]
    assert started == ["large", "small"]


def test_when_pages_run_out_the_one_admitted_last_waits_and_no_token_changes_or_comes_twice():
    scheduler, model = make(pages_per_rank=8)
    requests = [ask("old", 3, max_tokens=12), ask("new", 4, max_tokens=12)]
    for request in requests:
        scheduler.submit(request)
    outputs = []
    for _, new in steps(scheduler, model):
        outputs += new
        if scheduler.num_preemptions:
            break
    assert scheduler.queue_length == 1
    assert scheduler.loads()[0].running == 1
    outputs += drain(scheduler, model)
    for request in requests:
        assert tokens_of(outputs, request.id) == solo_run(request, 16)[0]
    assert [output.request_id for output in outputs if output.finish_reason] == ["old", "new"]


def test_several_preempted_at_once_return_in_the_order_in_which_they_were_admitted():
    scheduler, model = make(page_size=4, pages_per_rank=10, max_prefill_tokens=32)
    for name, length in [("a", 4), ("b", 4), ("c", 4), ("d", 1), ("e", 1)]:
        scheduler.submit(ask(name, length, max_tokens=8))
    plan = next(plan for plan, _ in steps(scheduler, model) if scheduler.num_preemptions)
    assert list(ranks_of(plan)) == ["a", "b", "c"]
    scheduler.submit(ask("f", 1))
    admitted = [chunk.sequence.request.id for plan, _ in steps(scheduler, model) for chunk in plan.prefills[0]]
    assert admitted == ["d", "e", "f"]


def test_whoever_is_admitted_has_room_to_grow_by_a_page_before_it_is_preempted():
    scheduler, model = make(page_size=4, pages_per_rank=4, max_context=16)
    scheduler.submit(ask("old", 4, max_tokens=12))
    step(scheduler, model)
    scheduler.submit(ask("new", 5, max_tokens=8))
    for _ in range(4):
        plan, _ = step(scheduler, model)
        assert list(ranks_of(plan)) == ["old"]
    drain(scheduler, model)
    assert scheduler.num_preemptions == 0


def test_those_admitted_together_leave_each_other_room():
    scheduler, model = make(pages_per_rank=8)
    for name in "abcd":
        scheduler.submit(ask(name, 2, max_tokens=6))
    assert list(ranks_of(step(scheduler, model)[0])) == ["a", "b", "c", "d"]
    scheduler, model = make(pages_per_rank=7)
    for name in "abcd":
        scheduler.submit(ask(name, 2, max_tokens=2))
    assert list(ranks_of(step(scheduler, model)[0])) == ["a", "b", "c"]
    drain(scheduler, model)
    assert scheduler.num_preemptions == 0


def test_a_request_cancelled_while_its_step_runs_frees_its_pages_at_once_and_ends_with_abort():
    scheduler, model = make()
    scheduler.submit(ask("gone"))
    scheduler.submit(ask("stays"))
    plan = scheduler.schedule()
    assert scheduler.cancel("gone")
    assert scheduler.loads()[0].used_pages == 2
    outputs = scheduler.complete(plan, model(plan))
    assert [(output.request_id, output.finish_reason) for output in outputs] == [("gone", "abort"), ("stays", None)]
    assert not scheduler.cancel("gone")
    outputs += drain(scheduler, model)
    assert tokens_of(outputs, "gone") == []
    assert tokens_of(outputs, "stays") == solo_run(ask("stays"), 32)[0]


def test_a_cancelled_request_is_told_of_even_when_nothing_else_is_left():
    scheduler, model = make()
    scheduler.submit(ask("only"))
    assert scheduler.cancel("only")
    with pytest.raises(DuplicateRequestError, match="only"):
        scheduler.submit(ask("only"))
    assert scheduler.has_work
    plan, outputs = step(scheduler, model)
    assert plan.empty
    assert [(output.request_id, output.finish_reason) for output in outputs] == [("only", "abort")]
    assert not scheduler.has_work
    scheduler.submit(ask("only"))


def test_cancelling_what_is_not_live_changes_nothing():
    scheduler, model = make()
    assert not scheduler.cancel("unknown")
    scheduler.submit(ask("done", max_tokens=1))
    drain(scheduler, model)
    assert not scheduler.cancel("done")
    assert not scheduler.has_work


def test_a_full_queue_refuses_and_leaves_the_others_alone():
    scheduler, model = make(max_queue=2, max_batch=3)
    # Three have a place as soon as the next step begins: they do not count against the queue.
    for name in "abcde":
        scheduler.submit(ask(name))
    with pytest.raises(QueueFullError, match="5 requests"):
        scheduler.submit(ask("f"))
    scheduler.complete(plan := scheduler.schedule(), model(plan))
    with pytest.raises(QueueFullError, match="2 requests"):
        scheduler.submit(ask("f"))
    outputs = drain(scheduler, model)
    assert {output.request_id for output in outputs} == set("abcde")
    scheduler.submit(ask("f"))


@pytest.mark.parametrize(
    ("change", "field", "text"),
    [
        ({"prompt": ()}, "prompt", "empty"),
        ({"prompt": (3, 4, 32)}, "prompt", "token 32 at position 2"),
        ({"prompt": (-1,)}, "prompt", "token -1 at position 0"),
        ({"prompt": prompt_of(24)}, "prompt", "the context limit is 24 tokens; send at most 23"),
        ({"rank": 2}, "rank", r"rank=2 .* 0\.\.1"),
        ({"rank": -1}, "rank", "rank=-1"),
        ({"priority": 101}, "priority", "priority=101 must be between -100 and 100"),
        ({"params": SamplingParams(n=0)}, "n", "n=0"),
        ({"params": SamplingParams(top_p=0)}, "top_p", "top_p=0"),
        ({"params": SamplingParams(stop_token_ids=(32,))}, "stop_token_ids", "32"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_name_and_leaves_no_trace(change, field, text):
    scheduler, _ = make(num_ranks=2, max_context=24)
    request = dataclasses.replace(ask("x"), **change)
    with pytest.raises(InvalidRequestError, match=text) as caught:
        scheduler.submit(request)
    assert caught.value.field == field
    assert not scheduler.has_work
    scheduler.submit(ask("x"))


def test_a_request_that_could_never_fit_the_cache_is_refused_or_without_max_tokens_cut_short():
    scheduler, model = make(pages_per_rank=4)
    with pytest.raises(InvalidRequestError, match="the KV cache of one attention rank is 8 tokens; send at most 7"):
        scheduler.submit(ask("x", 8))
    with pytest.raises(InvalidRequestError, match=r"max_tokens=9 can never fit.*use max_tokens <= 5"):
        scheduler.submit(ask("x", 3, max_tokens=9))
    scheduler.submit(ask("x", 3, max_tokens=None))
    outputs = drain(scheduler, model)
    assert len(outputs) == 5
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize("span", [Span("window", 1), Span("window", 5), Span("chunk", 6), Span("chunk", 16)])
def test_a_short_span_takes_no_more_pages_however_long_the_context_grows(span):
    scheduler, model = make(pages_per_rank=(64, 6), page_size=4, max_context=250, spans=(FULL, span))
    scheduler.submit(ask("long", 21, max_tokens=None))
    held = {}
    for plan, _ in steps(scheduler, model):
        (chunk,) = plan.chunks
        held.setdefault(chunk.length, []).append(len(chunk.sequence.tables.pages[1]))
    assert max(held[1]) == pages_reached(span, 1, 4, 1000)
    assert max(held[8]) <= pages_reached(span, 8, 4, 1000)
    assert len(held[1]) == 250 - 21 - 1
    assert scheduler.num_preemptions == 0


def test_a_page_is_kept_until_the_step_that_still_sees_it_is_complete():
    scheduler, model = make(page_size=4, spans=(Span("window", 5),))
    scheduler.submit(ask("x", 16, max_tokens=2))
    step(scheduler, model)
    assert scheduler.loads()[0].used_pages == 1
    plan = scheduler.schedule()
    assert scheduler.loads()[0].used_pages == 3
    scheduler.complete(plan, model(plan))
    assert scheduler.loads()[0].used_pages == 1


def test_whichever_group_runs_out_the_one_admitted_last_is_preempted_in_all_and_recomputed():
    spans = (FULL, Span("chunk", 16))
    for pages_per_rank in [(8, 20), (20, 8)]:
        scheduler, model = make(pages_per_rank=pages_per_rank, spans=spans)
        requests = [ask("old", 3, max_tokens=12), ask("new", 4, max_tokens=12)]
        for request in requests:
            scheduler.submit(request)
        outputs = drain(scheduler, model)
        assert scheduler.num_preemptions == 1
        for request in requests:
            assert tokens_of(outputs, request.id) == solo_run(request, 16, spans)[0]


def test_a_newcomer_waits_for_room_in_every_group():
    scheduler, model = make(pages_per_rank=(32, 6), spans=(FULL, Span("window", 4)))
    scheduler.submit(ask("a", 8, max_tokens=2))
    scheduler.submit(ask("b", 8, max_tokens=2))
    assert list(ranks_of(step(scheduler, model)[0])) == ["a"]
    assert list(ranks_of(step(scheduler, model)[0])) == ["a"]
    assert list(ranks_of(step(scheduler, model)[0])) == ["b"]


def test_a_short_span_limits_a_request_only_if_its_pages_do_not_hold_what_a_step_sees():
    window = Span("window", 4)
    scheduler, model = make(pages_per_rank=6, spans=(window,))
    scheduler.submit(ask("x", 20, max_tokens=12))
    assert len(drain(scheduler, model)) == 12
    scheduler, _ = make(pages_per_rank=5, spans=(window,))
    with pytest.raises(InvalidRequestError, match="the KV cache of one attention rank is 10 tokens; send at most 9"):
        scheduler.submit(ask("x", 20, max_tokens=12))


def test_a_request_ends_at_whichever_limit_comes_first():
    long = ask("long", 3, max_tokens=100)
    tokens = solo_run(long, 32)[0]
    for params, max_context, expected, reason in [
        ({"max_tokens": 2}, 32, tokens[:2], "length"),
        ({"max_tokens": 100}, 10, tokens[:7], "length"),
        ({"max_tokens": 100, "stop_token_ids": (tokens[3],)}, 32, tokens[: tokens.index(tokens[3]) + 1], "stop"),
    ]:
        scheduler, model = make(max_context=max_context)
        scheduler.submit(ask("x", 3, **params))
        outputs = drain(scheduler, model)
        assert tokens_of(outputs, "x") == expected
        assert outputs[-1].finish_reason == reason
        assert outputs[-1].stop_token == (tokens[3] if reason == "stop" else None)


def test_an_end_of_sequence_token_ends_a_request_unless_ignored():
    prompt = next(prompt_of(3, first) for first in range(VOCAB) if next_token(prompt_of(3, first)) in EOS)
    for ignore_eos, length in [(False, 1), (True, 4)]:
        scheduler, model = make()
        scheduler.submit(Request("x", prompt, SamplingParams(ignore_eos=ignore_eos, max_tokens=4)))
        assert len(tokens_of(drain(scheduler, model), "x")) == length


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"page_size": 0}, "page_size=0"),
        ({"max_batch": -1}, "max_batch=-1"),
        ({"max_queue": 1.5}, "max_queue=1.5"),
        ({"pages_per_rank": 0}, "pages_per_rank=0"),
        ({"max_context": 1}, "max_context=1"),
    ],
)
def test_a_limit_that_cannot_work_is_refused_by_name(limits, text):
    with pytest.raises(ConfigError, match=text):
        EngineConfig(**limits)
