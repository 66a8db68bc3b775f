"""Structured output: which tokens may come next, by llguidance. Imports no jax."""

import collections
import functools
import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
from jaxtyping import Int

from jaxmoe.engine.request import Constraint
from jaxmoe.errors import InvalidRequestError

log = logging.getLogger(__name__)

CACHED = 256
# Between the tokens of JSON a space, or a new line with its indentation: where any whitespace goes, weak models never
# come to an end of it. A schema's own "x-guidance" goes before this.
JSON_STYLE: Any = {"whitespace_pattern": r"( |\r?\n[ \t]{0,32})"}


class Grammars:
    """The constraints of a model's requests, compiled; the last of them are kept. Any thread may ask."""

    def __init__(self, folder: Path | None, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """folder: of the checkpoint, with its tokenizer.json."""
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._compiled: collections.OrderedDict[Constraint, llguidance.LLMatcher] = collections.OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint) -> "Matcher":
        """One that has seen no token yet. Raises InvalidRequestError naming the field whose value does not compile."""
        with self._lock:
            compiled = self._compiled.pop(constraint, None) or self._compile(constraint)
            self._compiled[constraint] = compiled
            while len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
            return Matcher(compiled.deep_copy(), self._eos_token_ids)

    def prepare(self) -> None:
        """Reads the tokenizer, which takes a second if it is a large one, so that no request waits for it."""
        with self._lock:
            _ = self._tokenizer

    def _compile(self, constraint: Constraint) -> llguidance.LLMatcher:
        tokenizer, problem = self._tokenizer
        if tokenizer is None:
            raise InvalidRequestError(
                f"structured output is not to be had from this model: {problem}; leave {constraint.kind} out",
                constraint.kind,
            )
        try:
            compiled = llguidance.LLMatcher(tokenizer, _grammar(constraint, tokenizer), log_level=0)
            problem = compiled.get_error()
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            raise InvalidRequestError(
                f"{constraint.kind} cannot be followed: {problem.strip()}; correct it or leave it out", constraint.kind
            )
        return compiled

    @functools.cached_property
    def _tokenizer(self) -> tuple[llguidance.LLTokenizer | None, str]:
        """The tokenizer, or what is the matter with it."""
        if self._folder is None or not (self._folder / "tokenizer.json").is_file():
            return None, "it has no tokenizer.json"
        if not self._eos_token_ids:
            return None, "it has no end-of-sequence token"
        try:
            text = (self._folder / "tokenizer.json").read_text()
            return llguidance.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_token_ids), ""
        except (OSError, ValueError) as error:
            log.warning("no structured output: %s", error)
            return None, f"its tokenizer.json cannot be used ({error})"


class Matcher:
    """Follows one generation."""

    def __init__(self, matcher: llguidance.LLMatcher, eos_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._eos_token_ids = eos_token_ids
        self._seen = 0

    def follow(self, tokens: Sequence[int]) -> None:
        """tokens: all of the output until now; those seen before are not looked at."""
        for token in tokens[self._seen :]:
            if not self._matcher.is_error() and not self._matcher.consume_token(token):
                log.error("a constraint cannot go on after token %d: %s", token, self._matcher.get_error())
        self._seen = len(tokens)

    def allow(self, allowed: Int[np.ndarray, "words"]) -> None:
        """Sets the bits of the tokens that may come next; only the end may where the constraint cannot go on."""
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(allowed.ctypes.data, allowed.nbytes)
        if self._matcher.is_error():
            allowed[:] = 0
            bits = allowed.view(np.uint32)
            for token in self._eos_token_ids:
                bits[token >> 5] |= np.uint32(1 << (token & 31))


def _grammar(constraint: Constraint, tokenizer: llguidance.LLTokenizer) -> str:
    """In llguidance's notation. Raises ValueError and its like."""
    match constraint.kind:
        case "json_schema":
            if not isinstance(json.loads(constraint.text), dict | bool):
                raise ValueError("a schema is an object")
            return _json(constraint.text)
        case "json_object":
            return _json('{"type": "object"}')
        case "regex":
            return llguidance.grammar_from("regex", constraint.text)
        case "grammar":
            return llguidance.grammar_from("grammar", constraint.text)
        case "choice":
            if not constraint.choices:
                raise ValueError("there is no choice")
            choices = (json.dumps(choice, ensure_ascii=False) for choice in constraint.choices)
            return llguidance.grammar_from("lark", f"start: {' | '.join(choices)}")
    return _structural_tag(constraint.text, tokenizer)


def _json(schema: str) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=JSON_STYLE)


def _structural_tag(text: str, tokenizer: llguidance.LLTokenizer) -> str:
    described = json.loads(text)
    if not isinstance(described, dict) or not {"structures", "triggers"} <= described.keys():
        raise ValueError("it must be an object with `structures` and `triggers`")
    triggers, tags = described["triggers"], []
    for structure in described["structures"]:
        begin = structure["begin"]
        trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
        if trigger is None:
            raise ValueError(f"no trigger begins {begin!r}; triggers are {triggers}")
        schema = {"x-guidance": JSON_STYLE, **structure.get("schema", {})}
        tags.append(llguidance.StructTag(trigger=trigger, begin=begin, grammar=schema, end=structure["end"]))
    if not tags:
        raise ValueError("structures is empty")
    as_one = (tokenizer.tokenize_str(tag.trigger, parse_special=True) for tag in tags)
    special = all(len(tokens) == 1 and tokenizer.is_special_token(tokens[0]) for tokens in as_one)
    return llguidance.StructTag.to_grammar(tags, assume_special=special)
