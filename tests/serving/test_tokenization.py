import io
import json
import subprocess
import sys
import zipfile

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from jaxmoe.errors import CheckpointError, InvalidRequestError
from jaxmoe.serving.tokenization import (
    AnswerText,
    Detokenizer,
    StopStrings,
    Tokenizer,
    pack_files,
    read_files,
    unpack_files,
)

TEXT = "naïve café 你好世界 😀 the END\n"


def test_text_grows_in_whole_characters_to_what_was_encoded(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode(TEXT)
    pieces = [detokenizer.push(token) for token in ids]
    assert len(ids) > len(TEXT.split())
    assert "" in pieces  # some character was split over tokens
    assert not any("�" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == TEXT


def test_an_unfinished_character_comes_out_at_the_end_only(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    first_byte = tokenizer.encode("\U0001f680", add_special_tokens=False)[0]
    assert detokenizer.push(first_byte) == ""
    assert detokenizer.flush() == "�"


def test_bytes_that_are_no_character_do_not_hold_up_the_text(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    last_byte = tokenizer.encode("\U0001f680", add_special_tokens=False)[-1]
    assert [detokenizer.push(last_byte) for _ in range(3)] == ["�"] * 3


def test_special_tokens_are_shown_only_if_asked_for(tokenizer):
    ids = [0, *tokenizer.encode("one", add_special_tokens=False), 1, 400]
    assert "".join(map(Detokenizer(tokenizer).push, ids)) == "one"
    assert "".join(map(Detokenizer(tokenizer, skip_special_tokens=False).push, ids)) == "<s>one</s>"


def test_sentencepiece_spelling_with_byte_fallback():
    vocabulary = {"▁the": 0, "▁": 1, "<0xE4>": 2, "<0xBD>": 3, "<0xA0>": 4, "a": 5}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(parts)
    tokenizer = Tokenizer({"tokenizer.json": model.to_str().encode()})
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(token) for token in (0, 2, 3, 4, 1, 5)] == [" the", "", "", "你", " ", "a"]


def test_a_decoder_that_needs_the_whole_text_is_refused_by_name():
    model = tokenizers.Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    model.decoder = decoders.WordPiece()
    with pytest.raises(CheckpointError, match="WordPiece"):
        Tokenizer({"tokenizer.json": model.to_str().encode()})


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff"])
def test_a_broken_tokenizer_file_is_named(content):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer({"tokenizer.json": content})


def test_add_bos_token_of_the_config_is_honoured(checkpoint):
    files = read_files(checkpoint)
    model = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    model.post_processor = tokenizers.processors.ByteLevel()
    files["tokenizer.json"] = model.to_str().encode()
    assert Tokenizer(files).encode("one")[0] != 0
    files["tokenizer_config.json"] = json.dumps({"bos_token": "<s>", "add_bos_token": True}).encode()
    assert Tokenizer(files).encode("one")[0] == 0
    assert Tokenizer(files).encode("one", add_special_tokens=False)[0] != 0


def test_stop_strings_by_example():
    stops = StopStrings(["END"])
    assert stops.push("one E") == "one "
    assert stops.matched is None
    assert stops.push("ND two") == ""
    assert stops.matched == "END"
    assert stops.push("more") == stops.flush() == ""


def test_what_was_kept_back_in_vain_is_shown():
    stops = StopStrings(["END", "\n\n"])
    assert [stops.push(text) for text in ("a\n", "bE", "N", "Q", "E")] == ["a", "\nb", "", "ENQ", ""]
    assert stops.flush() == "E"


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text, strings, data):
    whole = StopStrings(strings)
    shown = whole.push(text) + whole.flush()
    pieces, cut = StopStrings(strings), ""
    while text:
        length = data.draw(st.integers(1, len(text)))
        cut, text = cut + pieces.push(text[:length]), text[length:]
    assert (cut + pieces.flush(), pieces.matched) == (shown, whole.matched)


def test_the_answer_leaves_out_special_tokens_and_the_stop_string(tokenizer):
    ids = tokenizer.encode("one two END of it")
    answer = AnswerText(tokenizer, ["END"])
    assert "".join(answer.push([token]) for token in ids) + answer.push([], last=True) == "one two "
    assert answer.stopped


def test_the_stop_string_is_shown_if_asked_for(tokenizer):
    ids = tokenizer.encode("one two END of it")
    answer = AnswerText(tokenizer, ["END"], include_stop=True)
    assert "".join(answer.push([token]) for token in ids) == "one two END"


def test_a_stop_string_among_the_first_tokens_is_passed_over(tokenizer):
    ids = tokenizer.encode("END of it END now", add_special_tokens=False)
    first = tokenizer.encode("END of", add_special_tokens=False)
    for early in range(1, len(first) + 1):
        answer = AnswerText(tokenizer, ["END"], min_tokens=early)
        shown = "".join(answer.push([token]) for token in ids)
        complete = len(tokenizer.decode(ids[:early])) >= len("END")
        assert shown == ("END of it " if complete else "")


def test_a_chat_template_is_rendered(tokenizer):
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    assert tokenizer.render_chat(messages) == "<s><|user|>one</s><|assistant|>two</s><|assistant|>"
    assert tokenizer.render_chat(messages, add_generation_prompt=False).endswith("two</s>")


def test_what_the_chat_template_refuses_is_told(tokenizer):
    with pytest.raises(InvalidRequestError, match="no role bot"):
        tokenizer.render_chat([{"role": "bot", "content": "one"}])


@pytest.mark.parametrize(
    "template", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ ''.__class__.__base__ }}"]
)
def test_a_chat_template_stays_in_its_sandbox(checkpoint, template):
    files = read_files(checkpoint) | {"chat_template.jinja": f"{{% if {template[2:-2]} %}}x{{% endif %}}".encode()}
    with pytest.raises(InvalidRequestError, match=r"unsafe|not safely callable"):
        Tokenizer(files).render_chat([{"role": "user", "content": "one"}])


@pytest.mark.parametrize(
    ("config", "files", "rendered"),
    [
        ({"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}, {}, "d"),
        ({"chat_template": "config"}, {"chat_template.jinja": b"{{ messages[0] | tojson }}"}, '{"role": "ü"}'),
        ({"chat_template": "{% for m in messages %}{% break %}{% endfor %}{{ strftime_now('%%') }}"}, {}, "%"),
    ],
)
def test_where_chat_templates_are_found(checkpoint, config, files, rendered):
    files = read_files(checkpoint) | {"tokenizer_config.json": json.dumps(config).encode()} | files
    assert Tokenizer(files).render_chat([{"role": "ü"}]) == rendered


def test_no_chat_template_and_a_broken_one_are_told(checkpoint):
    files = read_files(checkpoint) | {"tokenizer_config.json": b"{}"}
    assert not Tokenizer(files).has_chat_template
    with pytest.raises(CheckpointError, match="no chat template"):
        Tokenizer(files).render_chat([])
    with pytest.raises(CheckpointError, match="chat template"):
        Tokenizer(files | {"chat_template.jinja": b"{% if %}"})


def test_files_survive_the_archive(checkpoint):
    files = read_files(checkpoint)
    assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= files.keys()
    assert unpack_files(pack_files(files)) == files
    assert pack_files(files) == pack_files(read_files(checkpoint))


def test_an_archive_that_is_none_or_too_large_is_refused():
    with pytest.raises(CheckpointError, match="not a zip file"):
        unpack_files(b"PK nonsense")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        for n in range(51):
            writer.writestr(str(n), b"")
    with pytest.raises(CheckpointError, match="51 files"):
        unpack_files(archive.getvalue())


def test_nothing_of_the_front_end_or_the_client_loads_jax():
    modules = "frontend, client, tokenization, link, server, engine_loop"
    program = f"import sys; from jaxmoe.serving import {modules}; import jaxmoe.generate; print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_without_a_checkpoint_no_file_of_the_current_folder_is_taken_for_its_tokenizer(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    assert read_files("") == {}
    assert "tokenizer.json" in read_files(checkpoint)
