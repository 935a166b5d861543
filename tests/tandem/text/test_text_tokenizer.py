"""Loading, rendering and encoding; without torch."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import BadRequest, CheckpointError
from tandem.testing.polling import eventually
from tandem.testing.tokenizer import byte_fallback_tokenizer, byte_level_tokenizer
from tandem.text.tokenizer import HUGE_AT_ONCE, HUGE_TEXT, LONG_TEXT, MANY_IDS, Tokenizer

WITHOUT_TORCH = """
import sys
from tandem.text.tokenizer import Tokenizer, import_transformers_without_torch
import_transformers_without_torch()
tokenizer = Tokenizer.load(sys.argv[1])
text = tokenizer.render([{"role": "user", "content": "Hi"}])
assert tokenizer.decode(tokenizer.encode(text), False) == text
import router.main
assert "torch" not in sys.modules, "torch was imported"
print(text)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    byte_level_tokenizer().save_pretrained(path)
    return path


def test_the_router_loads_and_renders_without_torch(folder: Path) -> None:
    script = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(folder)], capture_output=True, text=True, check=False, timeout=100
    )
    assert script.returncode == 0, script.stderr
    assert script.stdout == "<|bos|><|user|>Hi<|end|><|assistant|>\n"
    assert script.stderr == ""


def test_a_loaded_tokenizer_is_the_saved_one(folder: Path) -> None:
    loaded, built = Tokenizer.load(str(folder)), Tokenizer(byte_level_tokenizer())
    text = "<|user|>naïve 🙂\n  x"
    assert loaded.encode(text) == built.encode(text)
    assert loaded.special_ids == built.special_ids
    assert loaded.byte_level


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot load a tokenizer from"):
        Tokenizer.load(str(tmp_path))


async def test_long_texts_are_encoded_off_the_loop_alike() -> None:
    tokenizer = Tokenizer(byte_level_tokenizer())
    text = "The cat sat. " * LONG_TEXT
    assert await tokenizer.encode_async(text) == tokenizer.encode(text)


async def test_long_texts_leave_threads_for_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, texts, free = Tokenizer(byte_level_tokenizer()), [], threading.Event()
    many = 40  # more than the loop's own executor ever has threads

    def encode(text: str, add_special_tokens: bool = False) -> list[int]:
        texts.append(text)
        assert free.wait(60)
        return [len(text)]

    monkeypatch.setattr(tokenizer, "encode", encode)
    given_up = [asyncio.ensure_future(tokenizer.encode_async("x" * HUGE_TEXT)) for _ in range(many)]
    try:
        await eventually(lambda: len(texts) == HUGE_AT_ONCE)
        for each in given_up:
            each.cancel()
        await asyncio.wait(given_up)
        kept = [asyncio.ensure_future(tokenizer.encode_async("y" * HUGE_TEXT)) for _ in range(many)]
        async with asyncio.timeout(20):
            assert "Hi" in await tokenizer.render_async([{"role": "user", "content": "Hi"}])
        assert len(texts) == HUGE_AT_ONCE, "the work of those who gave up goes on, and counts"
    finally:
        free.set()
    assert await asyncio.gather(*kept) == [[HUGE_TEXT]] * many
    assert len(texts) == HUGE_AT_ONCE + many, "what had not begun for those who gave up never did"


def test_template_refusals_are_bad_requests_of_one_line() -> None:
    tokenizer = Tokenizer(byte_level_tokenizer())
    with pytest.raises(BadRequest, match="no such role"):
        tokenizer.render([{"role": "robot", "content": "Hi"}])
    with pytest.raises(BadRequest) as caught:
        tokenizer.render([{"role": "user", "content": 5}])
    assert "\n" not in str(caught.value)


def test_templates_run_in_a_sandbox() -> None:
    wrapped = byte_level_tokenizer()
    wrapped.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(BadRequest, match="refused"):
        Tokenizer(wrapped).render([{"role": "user", "content": "Hi"}])


def test_without_a_template_chats_are_refused() -> None:
    wrapped = byte_level_tokenizer()
    wrapped.chat_template = None
    tokenizer = Tokenizer(wrapped)
    assert not tokenizer.has_chat_template
    with pytest.raises(BadRequest, match="no chat template"):
        tokenizer.render([{"role": "user", "content": "Hi"}])


def test_token_bytes_concatenate_to_the_text() -> None:
    for wrapped in (byte_level_tokenizer(), byte_fallback_tokenizer()):
        tokenizer = Tokenizer(wrapped)
        text = "naïve 🙂 cat"
        data = b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(text))
        assert data.decode().strip() == text
        assert tokenizer.token_bytes(tokenizer.size + 1) == b""


class Recorded:
    """A Rust tokeniser whose calls are written down."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return getattr(self.backend, name)


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
def test_long_work_is_done_in_batches_which_alone_release_the_interpreters_lock(make: Any) -> None:
    tokenizer = Tokenizer(make())
    plain = tokenizer.backend
    tokenizer.backend = recorded = Recorded(plain)
    for length, calls in ((LONG_TEXT - 1, ["encode"]), (LONG_TEXT, ["encode_batch_fast"])):
        text = ("Hello wörld 🙂 " * LONG_TEXT)[:length]
        for special in (False, True):
            assert tokenizer.encode(text, special) == plain.encode(text, add_special_tokens=special).ids
        assert recorded.calls == calls * 2
        recorded.calls.clear()
    ids = (plain.encode("Hello wörld<|end|> 🙂 ").ids * MANY_IDS)[:MANY_IDS]
    for count, calls in ((MANY_IDS - 1, ["decode"]), (MANY_IDS, ["decode_batch"])):
        for skip in (False, True):
            assert tokenizer.decode(ids[:count], skip) == plain.decode(ids[:count], skip_special_tokens=skip)
        assert recorded.calls == calls * 2
        recorded.calls.clear()
