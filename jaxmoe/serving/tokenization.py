"""Text to tokens and back: `tokenizer.json` without transformers, chat templates in a sandbox, and text that grows
token by token. Imports neither jax nor grpc."""

import codecs
import datetime
import functools
import io
import json
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxmoe.engine.request import RoutedExperts
from jaxmoe.errors import CheckpointError, InvalidRequestError

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json")
_MAX_ARCHIVE_FILES = 50
_MAX_ARCHIVE_BYTES = 200 << 20


def read_files(directory: str | pathlib.Path) -> dict[str, bytes]:
    """The tokenizer's files of a checkpoint, by name; empty if it has none, or if there is no checkpoint ("")."""
    if not str(directory):
        return {}
    root = pathlib.Path(directory)
    paths = [root / name for name in _FILES] + sorted(root.glob("*.jinja"))
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def pack_files(files: Mapping[str, bytes]) -> bytes:
    """A zip archive of the files: the same bytes for the same files."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as writer:
        for name, content in files.items():
            writer.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return archive.getvalue()


def unpack_files(archive: bytes) -> dict[str, bytes]:
    """Undoes `pack_files`, on an archive that need not be trusted. Raises CheckpointError."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as reader:
            members = reader.infolist()
            size = sum(member.file_size for member in members)
            if len(members) > _MAX_ARCHIVE_FILES or size > _MAX_ARCHIVE_BYTES:
                raise CheckpointError(
                    f"the tokenizer archive holds {len(members)} files of {size} bytes together; at most "
                    f"{_MAX_ARCHIVE_FILES} files and {_MAX_ARCHIVE_BYTES} bytes are taken"
                )
            return {member.filename: reader.read(member) for member in members}
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"the tokenizer archive is not a zip file: {error}") from error


class Tokenizer:
    """A checkpoint's tokenizer and chat template. Raises CheckpointError if the files do not make one."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        if "tokenizer.json" not in files:
            raise CheckpointError("the checkpoint has no tokenizer.json")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # the library raises nothing more specific
            raise CheckpointError(f"tokenizer.json cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._spelling = _spelling(self._tokenizer.decoder)
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._config = _load_json(files, "tokenizer_config.json")
        self._chat_template = _chat_template(files, self._config)
        self.token_bytes = functools.cache(self._token_bytes)

    @classmethod
    def load(cls, directory: str | pathlib.Path) -> "Tokenizer":
        return cls(read_files(directory))

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of the longest token; a text of n characters is at least n / longest_token tokens long."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text; `add_special_tokens` puts those round it that the model was trained to see there."""
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self._config.get("add_bos_token") is True:
            bos = self._tokenizer.token_to_id(_content(self._config.get("bos_token")))
            if bos is not None and ids[:1] != [bos]:
                ids.insert(0, bos)
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of whole token sequences, special tokens left out."""
        detokenizer = Detokenizer(self)
        return "".join(map(detokenizer.push, tokens)) + detokenizer.flush()

    def is_special(self, token: int) -> bool:
        return token in self._added and self._added[token].special

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt that asks for the next answer in a conversation; it carries its special tokens as text.

        messages: `{"role": "user", "content": "..."}` and so on. Raises InvalidRequestError if the template refuses
            them.
        """
        if self._chat_template is None:
            raise CheckpointError("the checkpoint has no chat template; send a prompt instead of a conversation")
        special = {
            name: _content(value)
            for name, value in self._config.items()
            if name.endswith("_token") and isinstance(value, str | Mapping)
        }
        try:
            return self._chat_template.render(
                special | {"messages": messages, "add_generation_prompt": True} | variables
            )
        except jinja2.TemplateError as error:
            raise InvalidRequestError(f"the chat template refuses this conversation: {error}", "messages") from error

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of `render_chat`."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def _token_bytes(self, token: int) -> bytes:
        """What a token adds to a text; nothing if the tokenizer does not have it."""
        if token in self._added:
            return self._added[token].content.encode()
        piece = self._tokenizer.id_to_token(token)
        return b"" if piece is None else self._spelling(piece)


class Detokenizer:
    """Text that grows token by token, in whole characters: one split over tokens comes with the last of them."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if self._skip and self._tokenizer.is_special(token):
            return ""
        return self._characters.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """The last, unfinished character, if there is one."""
        return self._characters.decode(b"", final=True)


class StopStrings:
    """Finds the first of some strings in a text that comes in pieces, however it is cut.

    The one that is complete first counts; of two that are complete together, the longer. `push` gives what can be
    shown: text that may yet turn out to be the beginning of a stop string is kept back.

        stops = StopStrings(["END"])
        stops.push("one E")   -> "one "     and stops.matched is None
        stops.push("ND two")  -> ""         and stops.matched == "END"
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """include: a stop string that is found is shown too."""
        self._stops = tuple(stops)
        self._include = include
        self._kept = ""
        self.matched: str | None = None

    def push(self, text: str, *, early: bool = False) -> str:
        """early: no stop string counts that is complete with this text."""
        if self.matched is not None:
            return ""
        text = self._kept + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found and not early:
            end, start, self.matched = min(found)
            self._kept = ""
            return text[: end if self._include else start]
        shown = next((i for i in range(len(text)) if any(map(_begins(text[i:]), self._stops))), len(text))
        self._kept = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was kept back, once no more text will come."""
        kept, self._kept = self._kept, ""
        return kept


def _begins(text: str) -> Callable[[str], bool]:
    """Whether a stop string begins with a text and goes on after it."""
    return lambda stop: len(stop) > len(text) and stop.startswith(text)


class Delta(NamedTuple):
    """What came of an answer since the last one.

    finish_reason: None while it goes on. routed_experts: if asked for; see `jaxmoe.engine.request.Output`.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None = None
    routed_experts: RoutedExperts | None = None


class AnswerText:
    """The text of an answer as it should be shown: special tokens and the stop string left out.

    include_stop: the stop string is shown. min_tokens: after which a stop string may end the answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stops = StopStrings(stop, include=include_stop)
        self._early_tokens = min_tokens

    @property
    def stopped(self) -> bool:
        return self.stop_string is not None

    @property
    def stop_string(self) -> str | None:
        """The one that has ended the answer."""
        return self._stops.matched

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        text = ""
        for token in token_ids:
            text += self._stops.push(self._detokenizer.push(token), early=self._early_tokens > 0)
            self._early_tokens -= 1
        if last:
            text += self._stops.push(self._detokenizer.flush(), early=self._early_tokens > 0) + self._stops.flush()
        return text


def _load_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise CheckpointError(f"{name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} holds a {type(content).__name__}, not an object")
    return content


def _content(token: Any) -> str:
    """The text of a special token, which `tokenizer_config.json` spells out in one of two ways."""
    return token.get("content", "") if isinstance(token, Mapping) else token or ""


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _spelling(decoder: Any) -> Callable[[str], bytes]:
    """From a token's spelling in the vocabulary to its bytes, for the decoder that `tokenizer.json` asks for."""
    description = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "None"}
    byte_fallback, replacements = False, []
    for part in description.get("decoders", [description]):
        match part:
            case {"type": "ByteLevel"}:
                return functools.partial(_from_byte_level, _byte_level_alphabet())
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": old}:
                replacements.append((old, " "))
            case {"type": "Fuse" | "Strip"}:  # Strip drops the first space of a text; a continuation keeps it
                pass
            case _:
                raise CheckpointError(
                    f"tokenizer.json has a decoder of type {part['type']}, which cannot be applied token by token; "
                    "known are ByteLevel, Metaspace, and Replace with ByteFallback"
                )
    return functools.partial(_from_sentencepiece, replacements, byte_fallback)


def _from_byte_level(alphabet: Mapping[str, int], piece: str) -> bytes:
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return piece.encode()


def _from_sentencepiece(replacements: Sequence[tuple[str, str]], byte_fallback: bool, piece: str) -> bytes:
    if byte_fallback and (byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece)):
        return bytes.fromhex(byte[1])
    for old, new in replacements:
        piece = piece.replace(old, new)
    return piece.encode()


def _chat_template(files: Mapping[str, bytes], config: Mapping[str, Any]) -> jinja2.Template | None:
    """The template of `chat_template.jinja`, else of `tokenizer_config.json`, where several have names."""
    source = files["chat_template.jinja"].decode() if "chat_template.jinja" in files else config.get("chat_template")
    if isinstance(source, list):
        by_name = {entry.get("name"): entry.get("template") for entry in source}
        source = by_name.get("default")
    if source is None:
        return None

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.filters["tojson"] = tojson
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise CheckpointError(f"the chat template cannot be read: {error}") from error
