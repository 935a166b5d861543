"""Bad requests: one clear line in OpenAI's envelope with status 400, nothing sent to the cluster."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.requests.openai import ChatBody, CompletionBody, DetokenizeBody, parse, prompts, stop_strings
from tandem.errors import BadRequest

HI = [{"role": "user", "content": "Hi"}]
BIG = 10**18

BAD_SHARED: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 0}, "n", "1"),
    ({"n": 129}, "n", "128"),
    ({"n": BIG}, "n", "128"),
    ({"n": "2"}, "n", "integer"),
    ({"n": 1.5}, "n", "integer"),
    ({"n": True}, "n", "integer"),
    ({"temperature": -0.1}, "temperature", "[0, 100]"),
    ({"temperature": 101}, "temperature", "[0, 100]"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"temperature": []}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "(0, 1]"),
    ({"top_p": 1.1}, "top_p", "(0, 1]"),
    ({"top_k": -2}, "top_k", "-1"),
    ({"min_p": 2}, "min_p", "[0, 1]"),
    ({"frequency_penalty": 2.5}, "frequency_penalty", "[-2, 2]"),
    ({"presence_penalty": -3}, "presence_penalty", "[-2, 2]"),
    ({"repetition_penalty": 0}, "repetition_penalty", "(0, 10]"),
    ({"max_tokens": -5}, "max_tokens", "than or equal to"),
    ({"max_tokens": BIG}, "max_tokens", str(1 << 31)),
    ({"max_tokens": 5000}, "max_tokens", "512"),
    ({"min_tokens": -1}, "min_tokens", "0"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "8"),
    ({"seed": 1 << 64}, "seed", str(1 << 64)),
    ({"seed": "x"}, "seed", "integer"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "[-100, 100]"),
    ({"logit_bias": {"five": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "399"),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias", "1024"),
    ({"logit_bias": [1]}, "logit_bias", "object"),
    ({"stop": ["a"] * 17}, "stop", "16"),
    ({"stop": ""}, "stop", "1 to 1024"),
    ({"stop": ["a", ""]}, "stop", "1 to 1024"),
    ({"stop": "x" * 1025}, "stop", "1024"),
    ({"stop": [1]}, "stop", "strings"),
    ({"stop": {"a": 1}}, "stop", "strings"),
    ({"stop_token_ids": [400]}, "stop_token_ids", "399"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "0"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids", "64"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "20"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "0"),
    ({"priority": 1001}, "priority", "1000"),
    ({"cache_salt": ""}, "cache_salt", "1"),
    ({"cache_salt": "x" * 257}, "cache_salt", "256"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": []}, "stream_options", "object"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed when stream is true"),
    ({"max_token": 5}, "max_token", "Unrecognized request argument supplied: max_token"),
    ({"x" * 500: 5}, "x" * 80, "Unrecognized request argument"),
    ({"guided_json": 5}, "guided_json", "an object, true or false"),
    ({"guided_json": "{"}, "guided_json", "not JSON"),
    ({"guided_choice": []}, "guided_choice", "1 to 1024"),
    ({"regex": ""}, "regex", "not empty"),
    ({"regex": "a" * (1 << 18) + "a"}, "regex", "at most 262144"),
    ({"regex": "a", "ebnf": "root ::= 'a'"}, "ebnf", "exclude each other"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one of"),
    ({"structured_outputs": {"regex": "a", "whitespace": 1}}, "structured_outputs", "structured_outputs.whitespace is"),
    ({"response_format": {"type": "xml"}}, "response_format", "text, json_object, json_schema"),
    ({"skip_special_tokens": False}, "skip_special_tokens", "not supported"),
    ({"skip_special_tokens": 1}, "skip_special_tokens", "not supported"),
    ({"model": 5}, "model", "string"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "an object with a 'schema'"),
]

BAD_CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": None}, "messages", "array"),
    ({"messages": "Hi"}, "messages", "array"),
    ({"messages": [[]]}, "messages", "messages.0"),
    ({"messages": [{}]}, "messages", "messages.0.role is required"),
    ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages", "system, developer, user, assistant or tool"),
    ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages", "no turns of the role 'tool'"),
    ({"messages": [{"role": "function", "content": "Hi"}]}, "messages", "role tool"),
    ({"messages": [{"role": "user"}]}, "messages", "messages.0.content is required"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages", "string"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "'image_url'"),
    ({"messages": [{"role": "user", "content": ["Hi"]}]}, "messages", "messages.0.content.0"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages", "tool_calls"),
    ({"messages": HI * 4097}, "messages", "4096"),
    ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages.0.content", "NUL"),
    ({"messages": [{"role": "user", "content": "Hi " * 2000}]}, "messages", "512"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ({"max_tokens": 0}, "max_tokens", "1"),
    ({"logprobs": 3}, "logprobs", "boolean"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "1"),
    ({"tools": [{"type": "function"}]}, "tools", "tools.0"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "chat template takes no tools"),
    ({"tool_choice": "required"}, "tool_choice", "together with tools"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"modalities": ["audio"]}, "modalities", "not supported"),
    ({"chat_template": "x"}, "chat_template", "not supported"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "chat_template_kwargs.tokenize"),
]

BAD_COMPLETION: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "string"),
    ({"prompt": ""}, "prompt", "at least 1"),
    ({"prompt": []}, "prompt", "at least 1"),
    ({"prompt": [[]]}, "prompt", "prompt[0]"),
    ({"prompt": ["a", [1.5]]}, "prompt", "prompt[1]"),
    ({"prompt": [1, "a"]}, "prompt", "prompt[0]"),
    ({"prompt": [400]}, "prompt", "399"),
    ({"prompt": [-1]}, "prompt", "-1"),
    ({"prompt": [BIG]}, "prompt", "399"),
    ({"prompt": [True]}, "prompt", "prompt[0]"),
    ({"prompt": ["a"] * 129}, "prompt", "128"),
    ({"prompt": ["a"] * 20, "n": 100}, "n", "1024"),
    ({"prompt": "a\0b"}, "prompt", "NUL"),
    ({"prompt": [5] * 512}, "prompt", "512"),
    ({"prompt": {"a": 1}}, "prompt", "string"),
    ({"logprobs": 21}, "logprobs", "20"),
    ({"logprobs": True}, "logprobs", "integer"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"best_of": 2, "n": 3}, "best_of", "at least n, which is 3"),
    ({"best_of": 3, "n": 2, "stream": True}, "best_of", "cannot be streamed"),
    ({"prompt": "a", "best_of": 129}, "best_of", "128"),
    ({"prompt": ["a"] * 20, "best_of": 100}, "n", "1024"),
]

CASES = [
    *(("/v1/chat/completions", {"messages": HI, **each[0]}, *each[1:]) for each in BAD_SHARED + BAD_CHAT),
    *(("/v1/completions", {"prompt": "Hi", **each[0]}, *each[1:]) for each in BAD_SHARED + BAD_COMPLETION),
]


async def test_each_bad_field_is_named_with_its_limit(client: httpx.AsyncClient, world: Any) -> None:
    for path, body, param, text in CASES:
        response = await client.post(path, json=body)
        shown = json.dumps(body)[:80]
        assert response.status_code == 400, (path, shown, response.text[:200])
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error", shown
        assert error["param"].startswith(param), (shown, error)
        assert text in error["message"], (shown, error)
        assert "\n" not in error["message"]
        assert len(error["message"]) < 400
    assert world.dispatcher.requests == []
    ok = await client.post("/v1/chat/completions", json={"messages": HI})
    assert ok.status_code == 200


def test_a_body_of_more_values_than_are_parsed_is_refused_at_once() -> None:
    for kind, name in ((CompletionBody, "prompt"), (DetokenizeBody, "tokens")):
        over = b'{"%s":[%s5]}' % (name.encode(), b"5," * ((1 << 20) + 1))
        with pytest.raises(BadRequest, match="at most 1048576"):
            parse(kind, over)
    assert len(parse(CompletionBody, b'{"prompt":[%s5]}' % (b"5," * (1 << 18))).prompt) == (1 << 18) + 1


RAW = [
    b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"{'messages': 1}",
    b'{"messages":[{"role":"user","content":"\\ud800"}]}',
    b'{"messages":[{"role":"user","content":"Hi"}],"temperature":NaN}',
    b'{"messages":[{"role":"user","content":"Hi"}],"temperature":Infinity}',
    b'{"messages":[{"role":"user","content":"Hi"}],"temperature":1e999}',
    b'{"messages":[{"role":"user","content":"Hi"}],"max_tokens":1e999}',
    b'{"messages":' + b"[" * 100_000,
    b'{"messages":[{"role":"user","content":"Hi"}],"stop":' + b"[" * 5000 + b"]" * 5000 + b"}",
]  # fmt: skip


async def test_bodies_that_are_no_json_objects(client: httpx.AsyncClient) -> None:
    for raw in RAW:
        for path in ("/v1/chat/completions", "/v1/completions", "/detokenize"):
            response = await client.post(path, content=raw)
            assert response.status_code == 400, (path, raw[:60])
            assert response.json()["error"]["type"] == "invalid_request_error"


async def test_a_prompt_over_the_context_is_told_both_numbers(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"prompt": [5] * 600})
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "600" in error["message"]
    assert "512" in error["message"]
    together = await client.post("/v1/completions", json={"prompt": [5] * 500, "max_tokens": 13})
    assert all(number in together.json()["error"]["message"] for number in ("500", "13", "512"))


async def test_a_chat_that_is_refused_for_its_length_is_not_remembered(client: httpx.AsyncClient, world: Any) -> None:
    for content, limit, status in (("x" * 600, None, 400), ("x", 511, 400), ("x", 8, 200)):
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": limit}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == status
        assert bool(len(world.text.turns)) == (status == 200)


async def test_unknown_models_are_404(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": HI, "model": "gpt-x"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert response.json()["error"]["param"] == "model"


def test_inert_values_of_unsupported_fields_are_accepted() -> None:
    body = {
        "messages": HI, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
        "stop": None, "n": None, "temperature": None, "user": "me", "metadata": {"a": "b"}, "store": False,
        "reasoning_effort": "low", "parallel_tool_calls": True, "prompt_cache_key": "k", "service_tier": "auto",
        "safety_identifier": "x", "skip_special_tokens": True, "use_beam_search": False, "length_penalty": 1.0,
        "guided_json": None, "request_id": "theirs",
    }  # fmt: skip
    assert parse(ChatBody, json.dumps(body).encode()).messages[0].content == "Hi"
    assert parse(CompletionBody, b'{"prompt":"a","suffix":null,"best_of":1,"echo":false}').prompt == "a"


HUGE: list[bytes] = [
    json.dumps({"messages": HI, "stop": ["a"] * 200_000}).encode(),
    json.dumps({"messages": HI, "stop_token_ids": [1] * 200_000}).encode(),
    json.dumps({"messages": [[]] * 200_000}).encode(),
    json.dumps({"messages": HI, "logit_bias": {str(i): 0 for i in range(50_000)}}).encode(),
    json.dumps({"messages": HI, "cache_salt": "x" * 900_000}).encode(),
]


@pytest.mark.parametrize("index", range(len(HUGE)))
def test_huge_fields_are_refused_without_reading_all_of_them(index: int) -> None:
    start = time.process_time()

    def read() -> None:
        stop_strings(parse(ChatBody, HUGE[index]).stop)

    with pytest.raises(BadRequest) as caught:
        read()
    assert len(str(caught.value)) < 300
    assert time.process_time() - start < 2.0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted(set(ChatBody.model_fields) | set(CompletionBody.model_fields))


@given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=5))
def test_any_values_parse_or_are_bad_requests(values: dict[str, Any]) -> None:
    for kind, base in ((ChatBody, {"messages": HI}), (CompletionBody, {"prompt": "a"})):
        with contextlib.suppress(BadRequest):
            body = parse(kind, json.dumps({**base, **values}).encode())
            stop_strings(body.stop)
            if isinstance(body, CompletionBody):
                assert prompts(body.prompt)
