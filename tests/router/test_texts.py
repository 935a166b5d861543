"""Text at the router's edge: padded vocabularies, special tokens around prompts, bytes and offsets of every kind."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import processors

from router.answers.stream import ChoiceStream
from router.requests.job import OutputOptions
from router.requests.texts import ModelTexts
from tandem.cli.options import build
from tandem.config import RouterConfig, UpConfig
from tandem.errors import CheckpointError, ConfigError, Unavailable
from tandem.testing.tokenizer import BOS, byte_level_tokenizer
from tandem.testing.tokenizer_kinds import kinds
from tandem.text.tokenizer import Tokenizer
from tandem.types import Delta, FinishReason, ModelInfo, TokenLogprob, Usage

MESSAGES = [{"role": "user", "content": "Hi"}]
KINDS = kinds()


def with_bos() -> Tokenizer:
    wrapped = byte_level_tokenizer()
    backend = wrapped.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(f"{BOS} $A", None, [(BOS, backend.token_to_id(BOS))])
    return Tokenizer(wrapped)


@asynccontextmanager
async def calling(world: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(world.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        yield client


async def test_ids_of_a_padded_vocabulary_are_no_text(make_world: Callable[..., Any]) -> None:
    for kind in ("gpt2", "llama2", "t5", "bert"):
        tokenizer = Tokenizer(KINDS[kind])
        world = make_world(tokenizer)
        padded = tokenizer.size + 64
        world.dispatcher.info = world.dispatcher.model = replace(world.dispatcher.info, vocab_size=padded)
        ids = tokenizer.encode("a cat")
        holes = [*ids[:1], padded - 1, *ids[1:], tokenizer.size]
        world.dispatcher.script = lambda request, choice, holes=holes: holes
        async with calling(world) as client:
            text = (await client.post("/detokenize", json={"tokens": holes})).json()["prompt"]
            assert text == tokenizer.decode(ids)
            refused = await client.post("/detokenize", json={"tokens": [padded]})
            assert refused.status_code == 400
            assert refused.json()["error"]["message"] == f"tokens has the id {padded}; ids are 0 to {padded - 1}"
            asked = {"prompt": [ids[0], padded - 2], "logprobs": 1, "echo": True}
            choice = (await client.post("/v1/completions", json=asked)).json()["choices"][0]
            assert choice["text"].strip().replace(" ", "").endswith("acat")
            tokens = choice["logprobs"]["tokens"]
            assert (tokens[1], tokens[3], tokens[-1]) == ("", "", "")
            chat = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
            entries = (await client.post("/v1/chat/completions", json=chat)).json()["choices"][0]["logprobs"]["content"]
            assert entries[1]["token"] == "" and entries[1]["bytes"] == []


async def test_a_template_keeps_its_bos_the_only_one(make_world: Callable[..., Any]) -> None:
    world = make_world(with_bos())
    bos = world.tokenizer.encode(BOS)[0]
    async with calling(world) as client:
        await client.post("/v1/chat/completions", json={"messages": MESSAGES})
        for add_special in (True, False, None):
            asked = {"messages": MESSAGES, "add_special_tokens": add_special}
            ids = (await client.post("/tokenize", json=asked)).json()["tokens"]
            assert ids == list(world.dispatcher.requests[0].prompt)
            assert ids.count(bos) == 1


@pytest.mark.parametrize(("asked", "count"), [(None, 1), (True, 1), (False, 0)])
async def test_special_tokens_around_completions(
    make_world: Callable[..., Any], asked: bool | None, count: int
) -> None:
    world = make_world(with_bos())
    async with calling(world) as client:
        body = {"prompt": ["Hello", world.tokenizer.encode("Hello")], "add_special_tokens": asked}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        assert (await client.post("/tokenize", json={"prompt": "Hello", "add_special_tokens": asked})).is_success
    text, ids = (list(request.prompt) for request in world.dispatcher.requests)
    assert text == world.tokenizer.encode(BOS) * count + ids


async def test_templates_are_rendered_off_the_loop(make_world: Callable[..., Any]) -> None:
    world = make_world(Tokenizer(byte_level_tokenizer()))
    wrapped, threads = world.tokenizer._wrapped, []

    def apply(*given: Any, **named: Any) -> str:
        threads.append(threading.get_ident())
        return str(type(wrapped).apply_chat_template(wrapped, *given, **named))

    wrapped.apply_chat_template = apply
    async with calling(world) as client:
        assert (await client.post("/v1/chat/completions", json={"messages": MESSAGES})).is_success
        threads.clear()
        assert (await client.post("/v1/chat/completions", json={"messages": MESSAGES})).is_success
        assert (await client.post("/tokenize", json={"messages": MESSAGES})).is_success
    assert len(threads) == 2
    assert threading.get_ident() not in threads


async def test_a_chat_template_from_a_file_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path)
    model = ModelInfo("tiny", str(tmp_path), "f" * 32, 500, 512, (1,))
    file = tmp_path / "mine.jinja"
    file.write_text("mine: {{ messages[0].content }}")
    monkeypatch.setenv("TANDEM_CHAT_TEMPLATE", str(file))
    texts = ModelTexts(None, chat_template=RouterConfig().chat_template)
    text = await texts.get(model)
    assert text.tokenizer.render(MESSAGES) == "mine: Hi"
    file.write_bytes(b"\xff")
    with pytest.raises(Unavailable, match="cannot be read"):
        await ModelTexts(None, chat_template=file).get(model)


async def test_another_model_s_tokeniser_is_loaded_anew(tmp_path: Path) -> None:
    texts, loaded = ModelTexts(None), []
    for name in ("one", "two"):
        folder = tmp_path / name
        byte_level_tokenizer().save_pretrained(folder)
        model = ModelInfo(name, str(folder), name * 10, 500, 512, (1,))
        loaded += [await texts.get(model), await texts.get(model)]
    first, again, other, again_other = loaded
    assert first is again is not other is again_other


@pytest.mark.parametrize("error", [OSError("the share is not there"), CheckpointError("no tokenizer")])
async def test_a_load_that_failed_is_tried_again_by_the_next_request(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, model = ModelTexts(None, use_defaults=False), ModelInfo("tiny", "/tiny", "f" * 32, 500, 512, (1,))
    results: list[Exception | Tokenizer] = [error, Tokenizer(byte_level_tokenizer())]

    def load(path: str, chat_template: Path | None) -> Tokenizer:
        if isinstance(result := results.pop(0), Exception):
            raise result
        return result

    monkeypatch.setattr(Tokenizer, "load", load)
    with pytest.raises((OSError, Unavailable), match=str(error)):
        await texts.get(model)
    text = await texts.get(model)
    assert text is await texts.get(model)


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "gemma", "t5", "bert"])
@pytest.mark.parametrize("prompt", ["", "The cat"])
def test_bytes_and_offsets_of_a_stream_add_up_to_its_text(kind: str, prompt: str) -> None:
    tokenizer = Tokenizer(KINDS[kind])
    text = "Hello two 中文 🙂🙂 worlds" if kind not in ("t5", "bert") else "the cat sat on the mat."
    ids = tokenizer.encode(text)
    context = tuple(tokenizer.encode(prompt)) if prompt else ()
    stream = ChoiceStream(0, tokenizer, OutputOptions(logprobs=0), context, ())
    pieces = []
    for index, token in enumerate(ids):
        last = index + 1 == len(ids)
        finish, usage = (FinishReason.LENGTH, Usage(1, 1, 0)) if last else (None, None)
        pieces.append(
            stream.feed(Delta("r", 0, 0, index, (token,), (TokenLogprob(token, -1.0),), (), finish, usage=usage))
        )
    said = "".join(piece.text for piece in pieces if piece is not None)
    placed = [entry for piece in pieces if piece is not None for entry in piece.logprobs]
    data = b""
    for entry in placed:
        assert entry.offset == len(data.decode("utf-8", "ignore"))
        data += tokenizer.token_bytes(entry.entry.token, entry.first)
    assert data.decode() == said
    assert said.strip() == text
    assert said.startswith(" ") == bool(prompt and kind in ("llama2", "t5", "bert"))


@pytest.mark.parametrize("schema", [RouterConfig, UpConfig])
def test_a_missing_file_is_refused_at_the_start(schema: type[RouterConfig] | type[UpConfig]) -> None:
    with pytest.raises(ConfigError, match=r"--chat-template: there is no such file"):
        build(schema, {"model": "demo", "chat_template": "/none/such"})
