"""What a request may ask of its tokens beyond a temperature, on a real (tiny) model."""

import json
import re

import numpy as np
import pytest
import scipy.special

from jaxmoe.demo import DEMO_MODEL
from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.grammars import Grammars
from jaxmoe.engine.model import Model
from jaxmoe.engine.request import Constraint, Request, SamplingParams
from jaxmoe.errors import InvalidRequestError
from jaxmoe.serving.tokenization import Tokenizer

EOS = 7
SMALL = EngineConfig(page_size=4, max_batch=4, max_prefill_tokens=16, max_prefill_sequences=4)
LENGTHS = (3, 17, 1, 30, 9)


@pytest.fixture(scope="module")
def model(reference_checkpoint):
    return Model(reference_checkpoint(eos_token_id=EOS).folder)


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, SMALL)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(1)
    return [rng.integers(8, 128, length).tolist() for length in LENGTHS]


def answers(engine, prompts, params):
    """Each request's outputs, all requests at once; `params` one for all, or a list."""
    each = params if isinstance(params, list) else [params] * len(prompts)
    found = {str(index): [] for index in range(len(prompts))}
    for name, prompt, own in zip(found, prompts, each, strict=True):
        engine.submit(Request(name, tuple(prompt), own))
    while engine.has_work:
        for output in engine.step():
            found[output.request_id].append(output)
    engine.check_integrity()
    return list(found.values())


def tokens_of(outputs):
    return [token for output in outputs for token in output.token_ids]


def logprobs_of(model, tokens):
    logits = model.logits(np.array([tokens]))[0].astype(np.float64)
    return scipy.special.log_softmax(logits, -1)


def greedy_oracle(model, prompt, params):
    """One token after the other from uncached logits, changed as transformers' and vLLM's definitions say."""
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    tokens = list(prompt)
    for _ in range(params.max_tokens):
        logits = model.logits(np.array([tokens]))[0, -1].copy()
        output = tokens[len(prompt) :]
        if len(output) < params.min_tokens:
            logits[[EOS, *params.stop_token_ids]] = -np.inf
        for token, bias in params.logit_bias.items():
            logits[token] += bias
        penalise = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
        logits = penalise(torch.tensor([tokens]), torch.tensor(logits)[None])[0].numpy()
        times = np.bincount(output, minlength=len(logits)).astype(np.int64)
        logits = logits - params.frequency_penalty * times - params.presence_penalty * (times > 0)
        tokens.append(int(logits.argmax()))
        if tokens[-1] in (EOS, *params.stop_token_ids):
            break
    return tokens[len(prompt) :]


ASKED = [
    {"repetition_penalty": 1.8},
    {"frequency_penalty": 1.5, "presence_penalty": -0.5},
    {"logit_bias": {EOS: 100.0}, "min_tokens": 5},
    {"logit_bias": {9: 1.0, 10: -50.0}, "repetition_penalty": 0.7, "presence_penalty": 2.0},
    {"logit_bias": {11: 100.0}, "stop_token_ids": (11,), "min_tokens": 3},
]


def test_greedy_tokens_are_those_of_the_definitions_in_a_batch_where_each_asks_for_something_else(
    engine, model, prompts
):
    params = [SamplingParams(temperature=0, max_tokens=8, **asked) for asked in ASKED]
    found = answers(engine, prompts, params)
    for prompt, own, outputs in zip(prompts, params, found, strict=True):
        assert tokens_of(outputs) == greedy_oracle(model, prompt, own)
        expected = logprobs_of(model, prompt + tokens_of(outputs))
        told = [logprob for output in outputs for logprob in output.logprobs]
        rows = np.arange(len(told)) + len(prompt) - 1
        np.testing.assert_allclose(told, expected[rows, tokens_of(outputs)], atol=5e-4)
    assert tokens_of(found[2])[-1] == EOS
    assert len(tokens_of(found[2])) == 6
    assert len(tokens_of(found[4])) == 4


def test_a_seed_gives_the_same_tokens_whatever_it_and_others_ask_for(engine, prompts):
    asked = [*ASKED[:2], {"min_p": 0.05}, {"top_k": 9, "logprobs": 3}, {}]
    params = [
        SamplingParams(temperature=1.3, seed=index, max_tokens=8, ignore_eos=True, **more)
        for index, more in enumerate(asked)
    ]
    together = [tokens_of(outputs) for outputs in answers(engine, prompts, params)]
    alone = [tokens_of(*answers(engine, [prompt], own)) for prompt, own in zip(prompts, params, strict=True)]
    assert together == alone


def test_the_likeliest_tokens_are_those_of_the_full_log_softmax(engine, model, prompts):
    params = [SamplingParams(seed=2, max_tokens=6, ignore_eos=True, logprobs=count) for count in (20, 1, 0, 5, 20)]
    for prompt, own, outputs in zip(prompts, params, answers(engine, prompts, params), strict=True):
        expected = logprobs_of(model, prompt + tokens_of(outputs))[len(prompt) - 1 :]
        if not own.logprobs:
            assert not any(output.top_logprobs for output in outputs)
            continue
        for output, row in zip(outputs, expected[:-1], strict=True):
            ((likely, values),) = [zip(*top, strict=True) for top in output.top_logprobs]
            assert len(likely) == own.logprobs
            np.testing.assert_allclose(values, np.sort(row)[::-1][: own.logprobs], atol=5e-4)
            np.testing.assert_allclose(values, row[list(likely)], atol=5e-4)


@pytest.fixture(scope="module")
def told_of_prompts(engine, prompts):
    return prompt_logprobs(engine, prompts)


def prompt_logprobs(engine, prompts):
    found = answers(engine, prompts, SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=20, ignore_eos=True))
    assert not any(output.prompt_logprobs for outputs in found for output in outputs[1:])
    return [outputs[0].prompt_logprobs for outputs in found]


def test_prompt_logprobs_are_those_of_the_full_log_softmax(model, prompts, told_of_prompts):
    for prompt, told in zip(prompts, told_of_prompts, strict=True):
        expected = logprobs_of(model, prompt)
        assert len(told) == len(prompt) - 1
        for (logprob, top), row, token in zip(told, expected[:-1], prompt[1:], strict=True):
            assert logprob == pytest.approx(row[token], abs=5e-4)
            np.testing.assert_allclose([value for _, value in top], np.sort(row)[::-1][:20], atol=5e-4)


@pytest.mark.parametrize(
    ("mesh", "limits"),
    [
        ("ep=1", {"max_prefill_tokens": 5, "max_prefill_sequences": 1}),
        ("ep=1", {"max_prefill_tokens": 1, "max_prefill_sequences": 1}),
        ("ep=1", {"max_prefill_tokens": 64, "max_prefill_sequences": 2}),
        ("ep=1", {"max_prefill_tokens": 8, "max_prefill_sequences": 2, "pages_per_rank": 9}),  # preempts
        ("dp=2,ep=2", {"max_prefill_tokens": 7, "max_prefill_sequences": 2}),
    ],
    ids=str,
)
def test_prompt_logprobs_do_not_depend_on_chunks_preemption_and_mesh(
    reference_checkpoint, prompts, told_of_prompts, mesh, limits
):
    model = Model(reference_checkpoint(eos_token_id=EOS).folder, mesh)
    engine = Engine(model, EngineConfig(page_size=4, max_batch=4, warm_up=False, **limits))
    for told, expected in zip(prompt_logprobs(engine, prompts), told_of_prompts, strict=True):
        assert len(told) == len(expected)
        for (logprob, top), (same, same_top) in zip(told, expected, strict=True):
            assert logprob == pytest.approx(same, abs=2e-5)
            np.testing.assert_allclose([each[1] for each in top], [each[1] for each in same_top], atol=2e-5)


def test_all_of_it_is_compiled_at_warm_up_and_nothing_of_it_runs_for_a_plain_batch(model, engine, prompts):
    for own in ({"logprobs": 3, "prompt_logprobs": 0}, *ASKED):
        for count in (1, len(prompts)):
            answers(engine, prompts[:count], SamplingParams(max_tokens=5, **own))
    assert engine.late_compiles == 0
    lazy = Engine(model, EngineConfig(page_size=4, max_batch=4, warm_up=False))
    answers(lazy, prompts, SamplingParams(temperature=1, top_k=5, min_p=0.1, max_tokens=3, min_tokens=0))
    assert {program.title.split()[0] for program in lazy.programs} <= {"prefill", "decode", "step", "sampling"}


@pytest.mark.parametrize(
    "bad",
    [
        {"min_p": 1.5}, {"repetition_penalty": 0.0}, {"frequency_penalty": 2.5}, {"presence_penalty": float("nan")},
        {"logit_bias": {128: 1.0}}, {"logit_bias": {3: 101.0}}, {"n": 0}, {"min_tokens": 9, "max_tokens": 8},
        {"logprobs": 21}, {"prompt_logprobs": -1}, {"ignore_eos": True, "constraint": Constraint("json_object")},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_cannot_work_is_named(engine, bad):
    with pytest.raises(InvalidRequestError) as error:
        engine.submit(Request("bad", (1,), SamplingParams(**bad)))
    assert error.value.field == next(iter(bad))
    assert not engine.has_work


@pytest.fixture(scope="module")
def demo():
    return Engine(Model(DEMO_MODEL), EngineConfig(max_batch=4, max_context=256, warm_up=False))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(DEMO_MODEL)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CALL = {"type": "object", "properties": {"x": {"type": "integer", "maximum": 99, "minimum": 0}}, "required": ["x"],
        "additionalProperties": False}  # fmt: skip
TAGS = {"structures": [{"begin": "<call>", "schema": CALL, "end": "</call>"}], "triggers": ["<call"]}


def is_of_schema(text):
    value = json.loads(text)
    assert list(value) == ["name", "age", "tags"]
    assert len(value["name"]) <= 12
    assert 0 <= value["age"] <= 150
    assert 1 <= len(value["tags"]) <= 3
    return set(value["tags"]) <= {"a", "b"}


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_structured_output_is_what_it_should_be_in_one_batch(demo, tokenizer, temperature):
    wanted = [
        (Constraint("json_schema", json.dumps(SCHEMA)), is_of_schema),
        (Constraint("regex", "(ab|cd){2,4}-[0-9]{3}"), re.compile("(ab|cd){2,4}-[0-9]{3}").fullmatch),
        (Constraint("choice", choices=("yes", 'no "quoted"', "vielleicht, ü😀")),
         lambda text: text in ("yes", 'no "quoted"', "vielleicht, ü😀")),
        (Constraint("grammar", 'start: "x" ("+" "x")~2 "="'), lambda text: text == "x+x+x="),
        (Constraint("grammar", 'root ::= "y" [0-9] [0-9]'), re.compile("y[0-9]{2}").fullmatch),
        (None, lambda text: True),
    ]  # fmt: skip
    prompt = tokenizer.encode("Once upon a time")
    params = [
        SamplingParams(temperature=temperature, seed=1, max_tokens=240, constraint=constraint)
        for constraint, _ in wanted
    ]
    for (constraint, holds), outputs in zip(wanted, answers(demo, [prompt] * len(wanted), params), strict=True):
        if constraint is None:
            continue
        text = tokenizer.decode(tokens_of(outputs))
        assert holds(text), (constraint, text)
        assert outputs[-1].finish_reason == "stop"
        assert outputs[-1].stop_token in demo.model.eos_token_ids


def test_text_is_free_until_a_structural_tag_begins(demo, tokenizer):
    grammars = Grammars(demo.model.folder, demo.model.config.vocab_size, demo.model.eos_token_ids)
    matcher = grammars.matcher(Constraint("structural_tag", json.dumps(TAGS)))

    def allowed(text):
        """What may follow the text, as bytes."""
        matcher.follow(tokenizer.encode(text, add_special_tokens=False))
        words = np.zeros(-(-demo.model.config.vocab_size // 32), np.int32)
        matcher.allow(words)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        return {tokenizer.token_bytes(token) for token in np.flatnonzero(bits).tolist()}

    assert {b"a", b"<", b"}", b"</s>"} <= allowed("No")
    matcher = grammars.matcher(Constraint("structural_tag", json.dumps(TAGS)))
    assert allowed("No <call") == {b">"}
    matcher = grammars.matcher(Constraint("structural_tag", json.dumps(TAGS)))
    assert allowed('No <call>{"x":') >= {b"7"}
    matcher = grammars.matcher(Constraint("structural_tag", json.dumps(TAGS)))
    assert {b"a", b"</s>"} <= allowed('No <call>{"x":7}</call> ')


def test_a_constraint_bounds_the_minimum_of_tokens(demo, tokenizer):
    prompt = tokenizer.encode("Once upon a time")
    params = SamplingParams(
        temperature=0, min_tokens=50, max_tokens=60, constraint=Constraint("choice", choices=("a",))
    )
    (outputs,) = answers(demo, [prompt], params)
    assert tokenizer.decode(tokens_of(outputs)) == "a"
    assert outputs[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        (Constraint("json_schema", "{"), "json_schema cannot be followed"),
        (Constraint("json_schema", "[1]"), "a schema is an object"),
        (Constraint("json_schema", '{"type": "nonsense"}'), "nonsense"),
        (Constraint("json_schema", '{"type": "object", "if": {}}'), "Unimplemented keys"),
        (Constraint("regex", "(["), "unclosed character class"),
        (Constraint("grammar", "start: foo"), 'unknown name: "foo"'),
        (Constraint("choice"), "no choice"),
        (Constraint("structural_tag", "{}"), "`structures` and `triggers`"),
        (Constraint("structural_tag", json.dumps({**TAGS, "triggers": ["<x"]})), "no trigger begins '<call>'"),
    ],
    ids=str,
)
def test_a_constraint_that_cannot_be_followed_is_refused_by_its_field(demo, constraint, said):
    with pytest.raises(InvalidRequestError, match=re.escape(said)) as error:
        demo.submit(Request("bad", (1,), SamplingParams(constraint=constraint)))
    assert error.value.field == constraint.kind
    assert not demo.has_work


def test_without_a_tokenizer_structured_output_is_refused(engine):
    with pytest.raises(InvalidRequestError, match=r"not to be had from this model: it has no tokenizer.json"):
        engine.submit(Request("bad", (1,), SamplingParams(constraint=Constraint("json_object"))))
