"""Tokenisers and chat templates from checkpoints' folders, in every form they come in."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from tandem.errors import BadRequest, CheckpointError
from tandem.testing.tokenizer import CHAT_TEMPLATE, byte_level_tokenizer
from tandem.testing.tokenizer_kinds import write_sentencepiece, write_tekken, write_tiktoken
from tandem.text import loading
from tandem.text.detokenizer import detokenizer
from tandem.text.tokenizer import Tokenizer

TEXTS = ["Hello, world!", "中文 🙂 — naïve", "a\n\nb", "x  y"]
MESSAGES = [{"role": "user", "content": "Hi"}]
FORMS: dict[str, Callable[[Path], None]] = {
    "tiktoken": write_tiktoken,
    "tekken": write_tekken,
    "sentencepiece bpe": write_sentencepiece,
    "sentencepiece unigram": lambda folder: write_sentencepiece(folder, "unigram"),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_has_no_tokenizer_json_is_converted(form: str, tmp_path: Path) -> None:
    FORMS[form](tmp_path)
    tokenizer = Tokenizer.load(str(tmp_path))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        stream = detokenizer(tokenizer)
        got = "".join([*(stream.feed(token) for token in ids), stream.finish()])
        assert got == tokenizer._wrapped.decode(ids, skip_special_tokens=True)
        assert got == text or form == "sentencepiece unigram"  # T5 takes any white space for one space
    assert tokenizer.byte_level == (form in ("tiktoken", "tekken"))
    assert tokenizer.special_ids
    assert tokenizer.render(MESSAGES).endswith("<|user|>Hi<|end|><|assistant|>")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(loading, "find_spec", none)
    write_tiktoken(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model needs the package tiktoken.*tandem-serve\[convert\]"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00")
    with pytest.raises(CheckpointError, match="needs the package sentencepiece"):
        Tokenizer.load(str(tmp_path))
    byte_level_tokenizer().save_pretrained(tmp_path)
    assert Tokenizer.load(str(tmp_path)).byte_level


def test_a_tokenizer_written_in_python_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    with pytest.raises(CheckpointError, match="is a ByT5Tokenizer, which is written in Python"):
        Tokenizer.load(str(tmp_path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint without a chat template."""
    wrapped = byte_level_tokenizer()
    wrapped.chat_template = None
    wrapped.save_pretrained(tmp_path)
    return tmp_path


def in_config(folder: Path, template: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))


def test_no_template(folder: Path) -> None:
    tokenizer = Tokenizer.load(str(folder))
    assert not tokenizer.has_chat_template
    with pytest.raises(BadRequest, match="no chat template; use /v1/completions"):
        tokenizer.render(MESSAGES)


def test_templates_are_found_where_they_lie(folder: Path) -> None:
    def rendered() -> str:
        return Tokenizer.load(str(folder)).render(MESSAGES)

    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "processor {{ messages[0].content }}"}))
    assert rendered() == "processor Hi"
    in_config(folder, "config {{ messages[0].content }}")
    assert rendered() == "config Hi"
    (folder / "chat_template.jinja").write_text("jinja {{ messages[0].content }}")
    assert rendered() == "jinja Hi"
    given = folder / "mine.txt"
    given.write_text("mine {{ messages[0].content }} — é")
    assert Tokenizer.load(str(folder), given).render(MESSAGES) == "mine Hi — é"
    given.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"mine\.txt cannot be read"):
        Tokenizer.load(str(folder), given)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.json", "chat_templates"])
def test_of_several_templates_the_default_renders_chats(folder: Path, place: str) -> None:
    named = {"default": CHAT_TEMPLATE, "tool_use": "tools {{ messages[0].content }}"}
    listed = [{"name": name, "template": template} for name, template in named.items()]
    if place == "tokenizer_config.json":
        in_config(folder, listed)
    elif place == "chat_template.json":
        (folder / place).write_text(json.dumps({"chat_template": listed}))
    else:
        (folder / place).mkdir()
        (folder / place / "tool_use.jinja").write_text(named["tool_use"])
        (folder / "chat_template.jinja").write_text(named["default"])
    tokenizer = Tokenizer.load(str(folder))
    assert tokenizer.render(MESSAGES) == "<|bos|><|user|>Hi<|end|><|assistant|>"
    assert "developer" not in CHAT_TEMPLATE
    assert not tokenizer.knows_developer


def test_a_broken_template_file_is_named(folder: Path) -> None:
    (folder / "chat_template.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"chat_template\.json must be an object with the key chat_template"):
        Tokenizer.load(str(folder))


def test_a_template_that_raises_or_does_not_parse_is_a_bad_request(folder: Path) -> None:
    in_config(folder, "{{ raise_exception('Conversation roles must alternate') }}")
    with pytest.raises(BadRequest, match="refused the messages: Conversation roles must alternate") as caught:
        Tokenizer.load(str(folder)).render(MESSAGES)
    assert caught.value.param == "messages"
    in_config(folder, "{% for %}")
    with pytest.raises(BadRequest, match="refused the messages"):
        Tokenizer.load(str(folder)).render(MESSAGES)


def test_a_template_can_neither_reach_python_nor_change_the_messages(folder: Path) -> None:
    for template in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ raise_exception.__globals__.x }}"):
        in_config(folder, template)
        with pytest.raises(BadRequest, match="refused the messages"):
            Tokenizer.load(str(folder)).render(MESSAGES)
