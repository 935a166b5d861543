"""The routes over a scripted cluster: what clients get, and what the cluster was asked."""

from __future__ import annotations

import asyncio
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


async def test_choices_have_their_own_text_and_share_the_prompt(client: httpx.AsyncClient, world: Any) -> None:
    world.answers[:] = ["one", "two two", "three three three"]
    response = await client.post("/v1/chat/completions", json={**CHAT, "n": 3})
    choices = response.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in choices] == world.answers
    usage = response.json()["usage"]
    assert usage["completion_tokens"] == sum(len(world.tokenizer.encode(text)) + 1 for text in world.answers)
    got = events(await client.post("/v1/chat/completions", json={**CHAT, "n": 3, "stream": True}))[:-1]
    for index, text in enumerate(world.answers):
        mine = [each["choices"][0] for each in got if each["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == text
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]


async def test_a_stop_string_ends_the_answer_and_the_work(client: httpx.AsyncClient, world: Any) -> None:
    world.answers[:] = ["The cat sat on the mat. The dog sat on the log."]
    asked = {**CHAT, "stop": ["mat. T", "never"]}
    response = await client.post("/v1/chat/completions", json=asked)
    (choice,) = response.json()["choices"]
    assert choice["message"]["content"] == "The cat sat on the "
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "mat. T"
    assert world.dispatcher.accepted[0].cancelled.is_set()
    whole = len(world.tokenizer.encode(world.answers[0]))
    assert response.json()["usage"]["completion_tokens"] < whole
    got = events(await client.post("/v1/chat/completions", json={**asked, "stream": True}))
    assert got.pop() == "[DONE]"
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in got) == "The cat sat on the "


@pytest.mark.parametrize("stream", [False, True])
async def test_the_work_ends_with_the_last_choice_also_when_the_worker_ended_that(
    client: httpx.AsyncClient, world: Any, stream: bool
) -> None:
    world.answers[:] = ["The cat sat" + " and sat" * 50, "A dog ran to the cat's own mat."]
    # The first choice is cut at its third word; the worker goes on with it when it has ended the second.
    world.dispatcher.hold_at = len(world.tokenizer.encode(world.answers[1])) + 1
    asked = {**CHAT, "n": 2, "stop": "sat", "stream": stream}
    async with asyncio.timeout(20):
        response = await client.post("/v1/chat/completions", json=asked)
    assert world.dispatcher.accepted[0].cancelled.is_set()
    if stream:
        got = events(response)
        assert got.pop() == "[DONE]"
        said = ["", ""]
        for each in got:
            (choice,) = each["choices"]
            said[choice["index"]] += choice["delta"].get("content", "")
    else:
        choices = response.json()["choices"]
        said = [choice["message"]["content"] for choice in choices]
        assert [choice["stop_reason"] for choice in choices] == ["sat", None]
    assert said == ["The cat ", world.answers[1]]


async def test_cached_tokens_of_a_stopped_answer_are_those_at_acceptance(client: httpx.AsyncClient, world: Any) -> None:
    world.dispatcher.cached_tokens = 3
    world.dispatcher.silent_cancel = True
    body = (await client.post("/v1/chat/completions", json={**CHAT, "stop": "wor"})).json()
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    world.dispatcher.cached_tokens = 1000
    body = (await client.post("/v1/chat/completions", json={**CHAT, "stop": "wor"})).json()
    used = body["usage"]["prompt_tokens"]
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": used - 1}


async def test_stop_strings_wait_for_min_tokens(client: httpx.AsyncClient, world: Any) -> None:
    world.answers[:] = ["cat cat cat cat"]
    first = len(world.tokenizer.encode("cat cat"))
    response = await client.post("/v1/chat/completions", json={**CHAT, "stop": "cat", "min_tokens": first})
    assert response.json()["choices"][0]["message"]["content"] == "cat cat "


async def test_a_token_limit_ends_with_length(client: httpx.AsyncClient, world: Any) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        response = await client.post("/v1/chat/completions", json={**CHAT, field: 2})
        assert response.json()["choices"][0]["finish_reason"] == "length"
        assert response.json()["usage"]["completion_tokens"] == 2
    default = await client.post("/v1/chat/completions", json=CHAT)
    used = default.json()["usage"]["prompt_tokens"]
    assert world.dispatcher.requests[-1].sampling.max_tokens == 512 - used


async def test_sampling_fields_reach_the_cluster(client: httpx.AsyncClient, world: Any) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "frequency_penalty": -1, "presence_penalty": 1.5,
        "repetition_penalty": 1.2, "logit_bias": {"5": -100, "3": 2.5}, "seed": -1, "min_tokens": 2, "ignore_eos": True,
        "stop_token_ids": [9, 9, 8], "priority": 3, "cache_salt": "tenant", "max_tokens": 11,
    }  # fmt: skip
    await client.post("/v1/chat/completions", json={**CHAT, **fields, "stop": None})
    (request,) = world.dispatcher.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (-1, 1.5, 1.2)
    assert sampling.logit_bias == ((3, 2.5), (5, -100.0))
    assert sampling.seed == (1 << 64) - 1
    assert (sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos) == (11, 2, True)
    assert sampling.stop_token_ids == (9, 8)
    assert (request.priority, request.salt) == (3, "tenant")


async def test_requests_without_a_seed_draw_different_ones(client: httpx.AsyncClient, world: Any) -> None:
    for _ in range(2):
        await client.post("/v1/chat/completions", json={**CHAT, "top_k": -1})
    first, second = world.dispatcher.requests
    assert first.sampling.seed != second.sampling.seed
    assert first.request_id != second.request_id
    assert first.sampling.top_k == 0


async def test_chat_logprobs(client: httpx.AsyncClient, world: Any) -> None:
    asked = {**CHAT, "logprobs": True, "top_logprobs": 2}
    body = (await client.post("/v1/chat/completions", json=asked)).json()
    content = body["choices"][0]["logprobs"]["content"]
    ids = [*world.tokenizer.encode(ANSWER), world.tokenizer.encode("<|end|>")[0]]
    assert [bytes(each["bytes"]) for each in content] == [world.tokenizer.token_bytes(token) for token in ids]
    assert b"".join(bytes(each["bytes"]) for each in content[:-1]).decode() == ANSWER
    assert all(len(each["top_logprobs"]) == 2 for each in content)
    assert all(each["logprob"] == each["top_logprobs"][0]["logprob"] == -0.5 for each in content)
    got = events(await client.post("/v1/chat/completions", json={**asked, "stream": True}))[:-1]
    streamed = [entry for each in got for entry in (each["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == content
    plain = (await client.post("/v1/chat/completions", json=CHAT)).json()
    assert plain["choices"][0]["logprobs"] is None


async def test_prompt_logprobs(client: httpx.AsyncClient, world: Any) -> None:
    body = (await client.post("/v1/chat/completions", json={**CHAT, "prompt_logprobs": 1})).json()
    entries = body["prompt_logprobs"]
    prompt = world.dispatcher.requests[0].prompt
    assert len(entries) == len(prompt)
    assert entries[0] is None
    assert [next(iter(entry)) for entry in entries[1:]] == [str(token) for token in prompt[1:]]
    asked = {"prompt": "Hello", "prompt_logprobs": 1}
    choice = (await client.post("/v1/completions", json=asked)).json()["choices"][0]
    assert len(choice["prompt_logprobs"]) == len(world.dispatcher.requests[1].prompt)
    got = events(await client.post("/v1/completions", json={**asked, "stream": True}))[:-1]
    streamed = [each["choices"][0]["prompt_logprobs"] for each in got if "prompt_logprobs" in each["choices"][0]]
    assert streamed == [choice["prompt_logprobs"]]


async def test_completions_of_several_prompts(client: httpx.AsyncClient, world: Any) -> None:
    world.answers[:] = ["first", "second"]
    ids = world.tokenizer.encode("Hello")
    asked = {"model": "tiny", "prompt": ["The cat", ids], "n": 2, "max_tokens": 20}
    body = (await client.post("/v1/completions", json=asked)).json()
    assert body["object"] == "text_completion"
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "first"), (1, "second"), (2, "first"), (3, "second"),
    ]  # fmt: skip
    assert [list(request.prompt) for request in world.dispatcher.requests] == [world.tokenizer.encode("The cat"), ids]
    got = events(await client.post("/v1/completions", json={**asked, "stream": True}))
    assert got.pop() == "[DONE]"
    texts = ["".join(e["choices"][0]["text"] for e in got if e["choices"][0]["index"] == index) for index in range(4)]
    assert texts == ["first", "second", "first", "second"]
    assert sorted(e["choices"][0]["index"] for e in got if e["choices"][0]["finish_reason"]) == [0, 1, 2, 3]


async def test_completions_echo_and_default_limit(client: httpx.AsyncClient, world: Any) -> None:
    asked = {"prompt": "Hello, world!", "echo": True}
    body = (await client.post("/v1/completions", json=asked)).json()
    assert body["choices"][0]["text"] == "Hello, world!" + ANSWER
    assert world.dispatcher.requests[0].sampling.max_tokens == 16
    got = events(await client.post("/v1/completions", json={**asked, "stream": True}))[:-1]
    assert "".join(each["choices"][0]["text"] for each in got) == "Hello, world!" + ANSWER


async def test_completion_logprobs_have_the_older_form(client: httpx.AsyncClient, world: Any) -> None:
    world.answers[:] = ["The cat sat"]
    body = (await client.post("/v1/completions", json={"prompt": "Hi", "logprobs": 1})).json()
    logprobs = body["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"][:-1]) == "The cat sat"
    assert logprobs["token_logprobs"] == [-0.5] * len(logprobs["tokens"])
    starts = [len("".join(logprobs["tokens"][:count])) for count in range(len(logprobs["tokens"]))]
    assert logprobs["text_offset"] == starts
    assert all(len(top) == 1 for top in logprobs["top_logprobs"])


async def test_the_next_turn_reuses_the_sampled_ids(client: httpx.AsyncClient, world: Any) -> None:
    end = world.tokenizer.encode("<|end|>")[0]
    sampled = [token for char in "Hello there" for token in world.tokenizer.encode(char)]
    world.dispatcher.script = lambda request, choice: [*sampled, end]
    await client.post("/v1/chat/completions", json=CHAT)
    messages = [*CHAT["messages"], {"role": "assistant", "content": "Hello there"}, {"role": "user", "content": "Bye"}]
    await client.post("/v1/chat/completions", json={**CHAT, "messages": messages})
    first, second = world.dispatcher.requests
    assert second.prompt[: len(first.prompt) + len(sampled) + 1] == (*first.prompt, *sampled, end)
    assert world.metric("tandem_spliced_prompt_tokens_total") == len(first.prompt) + len(sampled) + 1


async def test_text_parts_and_developer_messages(client: httpx.AsyncClient, world: Any) -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "world"}]
    messages = [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": parts}]
    await client.post("/v1/chat/completions", json={"messages": messages})
    text = world.tokenizer.decode(world.dispatcher.requests[0].prompt, False)
    assert text == "<|bos|><|system|>Be brief<|end|><|user|>Hello\nworld<|end|><|assistant|>"


async def test_models(client: httpx.AsyncClient, world: Any) -> None:
    listed = (await client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert (await client.get("/v1/models/tiny")).json() == listed["data"][0]
    missing = await client.get("/v1/models/org/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    world.dispatcher.model = None
    assert (await client.get("/v1/models")).json()["data"] == []


async def test_many_tokens_are_written_as_few_are(client: httpx.AsyncClient, world: Any) -> None:
    text = 'Hello 🙂 "quoted" ' * 3000
    ids = world.tokenizer.backend.encode(text, add_special_tokens=False).ids
    assert len(ids) > 2 * 4096
    body = (await client.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    assert body["tokens"][-len(ids) :] == ids
    assert body["token_strs"] == [world.tokenizer.token(token) for token in body["tokens"]]
    assert (await client.post("/detokenize", json={"tokens": ids})).json() == {"prompt": text}


async def test_tokenize_and_detokenize(client: httpx.AsyncClient, world: Any) -> None:
    body = (await client.post("/tokenize", json={"prompt": "Hello 🙂", "return_token_strs": True})).json()
    ids = world.tokenizer.encode("Hello 🙂")
    assert body["tokens"] == ids
    assert body["count"] == len(ids) == len(body["token_strs"])
    assert body["max_model_len"] == 512
    assert (await client.post("/detokenize", json={"tokens": ids})).json() == {"prompt": "Hello 🙂"}
    chat = (await client.post("/tokenize", json={"messages": CHAT["messages"]})).json()
    await client.post("/v1/chat/completions", json=CHAT)
    assert tuple(chat["tokens"]) == world.dispatcher.requests[0].prompt
    for bad in ({}, {"prompt": "a", "messages": CHAT["messages"]}):
        assert (await client.post("/tokenize", json=bad)).status_code == 400
    assert (await client.post("/detokenize", json={"tokens": [1 << 30]})).status_code == 400


async def test_health_and_readiness(client: httpx.AsyncClient, world: Any) -> None:
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/ready")).status_code == 200
    world.dispatcher.model = None
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/ready")).status_code == 503
    refused = await client.post("/v1/chat/completions", json=CHAT)
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"


async def test_unknown_routes_and_methods_use_the_envelope(client: httpx.AsyncClient) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/", 404)):
        response = await client.request(method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert len(response.headers["x-request-id"]) == 32


async def test_request_ids_are_the_routers_own(client: httpx.AsyncClient, world: Any) -> None:
    for theirs, answered in ((None, None), ("mine", "mine"), ("x" * 129, None), ("a b", None), ("", None)):
        headers = {} if theirs is None else {"x-request-id": theirs}
        response = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        ours = world.dispatcher.requests[-1].request_id
        assert ours != theirs
        assert response.json()["id"] == f"chatcmpl-{ours}"
        assert response.headers["x-request-id"] == (answered or ours)
        assert response.headers.get("x-tandem-request-id", ours) == ours
    refused = await client.post("/v1/chat/completions", json={}, headers={"x-request-id": "mine"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (400, "mine")


async def test_metrics_count_each_request_once(client: httpx.AsyncClient, world: Any) -> None:
    await client.post("/v1/chat/completions", json=CHAT)
    await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    await client.post("/v1/chat/completions", json={**CHAT, "n": 0})
    page = (await client.get("/metrics")).text
    assert 'tandem_requests_total{endpoint="chat",outcome="ok"} 2.0' in page
    assert 'tandem_requests_total{endpoint="chat",outcome="refused"} 1.0' in page
    assert world.metric("tandem_requests_running") == world.metric("tandem_requests_queued") == 0
    tokens = len(world.tokenizer.encode(ANSWER)) + 1
    assert world.metric("tandem_completion_tokens_total") == 2 * tokens
    assert world.metric("tandem_inter_token_latency_seconds_count") == 2 * (tokens - 1)
    assert world.metric("tandem_time_to_first_token_seconds_count") == 2
    assert world.metric("tandem_request_duration_seconds_count") == 3
