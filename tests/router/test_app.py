"""The routes over a scripted cluster: what clients get, and what the cluster was asked."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.asyncio

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
ANSWER = "Hello, world! 🙂"


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream; the last is the string [DONE] when it ended well."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


async def test_chat_answers_in_one_piece(client: httpx.AsyncClient, world: Any) -> None:
    world.dispatcher.cached_tokens = 3
    response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    prompt = world.tokenizer.encode("<|bos|><|user|>Hi<|end|><|assistant|>")
    (request,) = world.dispatcher.requests
    assert list(request.prompt) == prompt
    answer_tokens = len(world.tokenizer.encode(ANSWER)) + 1
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": answer_tokens,
        "total_tokens": len(prompt) + answer_tokens,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert body["id"] == "chatcmpl-" + response.headers["x-request-id"]
    assert body["system_fingerprint"].startswith("fp_")


async def test_chat_streams_role_text_finish_usage_done(client: httpx.AsyncClient) -> None:
    asked = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    got = events(await client.post("/v1/chat/completions", json=asked))
    assert got.pop() == "[DONE]"
    usage = got.pop()
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert all(each["usage"] is None for each in got)
    assert got[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert got[-1]["choices"][0]["delta"] == {}
    assert got[-1]["choices"][0]["finish_reason"] == "stop"
    texts = [each["choices"][0]["delta"]["content"] for each in got[1:-1]]
    assert "".join(texts) == ANSWER
    assert len(texts) > 3
    assert {each["id"] for each in got} == {usage["id"]}


async def test_a_stream_without_usage_has_no_usage_field(client: httpx.AsyncClient) -> None:
    got = events(await client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
    assert all("usage" not in each for each in got[:-1])
