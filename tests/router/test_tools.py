"""Tool calls and reasoning through the routes: what the model is shown, what clients get, what is refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.requests.messages import chat_turns
from router.requests.openai import ChatBody, parse
from router.requests.tools import tool_use
from tandem.errors import BadRequest
from tandem.testing.tokenizer import byte_level_tokenizer
from tandem.text.abilities import CallStyle, find_abilities
from tandem.text.tokenizer import Tokenizer

MISTRAL_MARKERS = ["[TOOL_CALLS]", "[ARGS]"]

TURN_END = "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
HERMES = (
    "<|bos|>{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|end|>{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}<|user|><tool_response>{{ message.content }}</tool_response>{% else %}"
    "{{ '<|' + message.role + '|>' }}"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content or '' }}{% for call in message.tool_calls or [] %}"
    "{% if message.content or not loop.first %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}{% endif %}" + TURN_END + "{% if thinking %}<think>\n{% endif %}{% endif %}"
)
MISTRAL = (
    "<|bos|>{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% for message in messages %}"
    "{% if message.role == 'tool' %}<|user|>{{ message.tool_call_id }}: {{ message.name }}: {{ message.content }}"
    "{% else %}{{ '<|' + message.role + '|>' }}{{ message.content or '' }}{% for call in message.tool_calls or [] %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}{% endif %}"
    + TURN_END
    + "{% endif %}"
)
TEXT_ARGUMENTS = (
    "{% for message in messages %}{% if message.role == 'assistant' and message.content is not defined %}"
    "{% for call in message.tool_calls %}{{ '```' + call.function.arguments + '```' }}{% endfor %}"
    "{% else %}{{ message.content }}{% endif %}" + TURN_END + "{% endif %}"
)

FUNCTION = {
    "name": "get_weather",
    "description": "Weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": FUNCTION}, {"type": "function", "function": {"name": "now"}}]
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Weather in Paris?"}], "tools": TOOLS, "temperature": 0}
ARGUMENTS = '{"city": "Paris \\"é\\" {}"}'
CALL = '<tool_call>\n{"name": "get_weather", "arguments": ' + ARGUMENTS + "}\n</tool_call>"
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def tokenizer_with(template: str, specials: list[str]) -> Tokenizer:
    wrapped = byte_level_tokenizer()
    wrapped.add_special_tokens({"additional_special_tokens": specials})
    wrapped.chat_template = template
    return Tokenizer(wrapped)


TOKENIZERS = {
    "hermes": tokenizer_with(HERMES, []),
    "mistral": tokenizer_with(MISTRAL, MISTRAL_MARKERS),
    "text": tokenizer_with(TEXT_ARGUMENTS, []),
}


class Served:
    """A router for one kind of model, and a client of it."""

    def __init__(self, world: Any, client: httpx.AsyncClient) -> None:
        self.world = world
        self.client = client

    async def ask(self, answer: str, **fields: Any) -> Any:
        """The whole answer, after checking that a stream says the same."""
        self.world.answers[:] = [answer]
        whole = await self.refused(**fields)
        assert whole.status_code == 200, whole.text
        body = whole.json()
        streamed = await self.stream(**fields)
        for index, choice in enumerate(body["choices"]):
            message = choice["message"]
            said = streamed[index]
            assert said["content"] == (message["content"] or "")
            assert said["reasoning"] == message.get("reasoning_content", "")
            assert said["finish"] == choice["finish_reason"]
            calls = [
                (call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])
            ]
            assert said["calls"] == calls
        return body

    async def refused(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json={**ASK, **fields})

    async def stream(self, **fields: Any) -> list[dict[str, Any]]:
        """What each choice's deltas add up to, after checking their shapes."""
        response = await self.refused(**fields, stream=True)
        assert response.status_code == 200, response.text
        blocks = [block.removeprefix("data: ") for block in response.text.split("\n\n")[:-1]]
        assert blocks.pop() == "[DONE]"
        said: list[dict[str, Any]] = []
        for block in blocks:
            (choice,) = json.loads(block)["choices"]
            if choice["index"] == len(said):
                assert choice["delta"]["role"] == "assistant"
                said.append({"content": "", "reasoning": "", "calls": [], "finish": None})
                continue
            add_delta(said[choice["index"]], choice["delta"])
            said[choice["index"]]["finish"] = choice["finish_reason"]
        return said

    @property
    def prompt(self) -> str:
        """The last request's prompt as text."""
        text: str = self.world.tokenizer.decode(self.world.dispatcher.requests[-1].prompt, False)
        return text


def add_delta(said: dict[str, Any], delta: dict[str, Any]) -> None:
    assert len(delta) <= 1
    said["content"] += delta.get("content", "")
    said["reasoning"] += delta.get("reasoning_content", "")
    for call in delta.get("tool_calls", []):
        if call["index"] == len(said["calls"]):
            assert set(call) == {"index", "id", "type", "function"}
            assert call["type"] == "function"
            assert call["function"]["arguments"] == ""
            said["calls"].append((call["function"]["name"], ""))
        else:
            assert set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
            name, before = said["calls"][call["index"]]
            said["calls"][call["index"]] = (name, before + call["function"]["arguments"])


@pytest.fixture
def serve(make_world: Callable[..., Any]) -> Callable[..., Any]:
    @asynccontextmanager
    async def served(kind: str = "hermes", **settings: Any) -> AsyncIterator[Served]:
        world = make_world(TOKENIZERS[kind], 4096, **settings)
        transport = httpx.ASGITransport(world.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            yield Served(world, client)

    return served


async def test_a_call_and_the_turn_after_it(serve: Any) -> None:
    async with serve() as served:
        body = await served.ask(f"I look.\n{CALL}")
        assert '{"type": "function", "function": {"name": "get_weather"' in served.prompt
        (choice,) = body["choices"]
        assert choice["finish_reason"] == "tool_calls"
        message = choice["message"]
        assert message["content"] == "I look."
        (call,) = message["tool_calls"]
        assert call["id"].startswith("call_")
        assert call == {
            "id": call["id"], "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS},
        }  # fmt: skip
        first = served.world.dispatcher.requests[0]
        result = {"role": "tool", "tool_call_id": call["id"], "content": "Sunny"}
        await served.ask("It is sunny.", messages=[*ASK["messages"], message, result])
        assert served.prompt.endswith(
            f"<|assistant|>I look.\n{CALL}<|end|><|user|><tool_response>Sunny</tool_response><|end|><|assistant|>"
        )
        # The answer's own ids were spliced in: its turn was not tokenised again.
        answer = served.world.tokenizer.encode(f"I look.\n{CALL}<|end|>")
        assert served.world.dispatcher.requests[-1].prompt[: len(first.prompt) + len(answer)] == (
            *first.prompt,
            *answer,
        )
        assert served.world.metric("tandem_spliced_prompt_tokens_total") > len(first.prompt)


async def test_only_calls_leave_no_content(serve: Any) -> None:
    async with serve() as served:
        body = await served.ask(f"{CALL}\n{NOW}")
        message = body["choices"][0]["message"]
        assert message["content"] is None
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather", "now"]
        assert len({call["id"] for call in message["tool_calls"]}) == 2
        body = await served.ask(f"{CALL}\n{NOW}", parallel_tool_calls=False)
        assert len(body["choices"][0]["message"]["tool_calls"]) == 1
        served.world.answers[:] = [f"{CALL}"]
        one = (await served.refused(n=2)).json()["choices"]
        assert one[0]["message"]["tool_calls"][0]["id"] != one[1]["message"]["tool_calls"][0]["id"]


async def test_what_is_no_call_is_text(serve: Any) -> None:
    async with serve() as served:
        for text in ("Hello.", "<tool_call>oh no</tool_call>", '<tool_call>{"name": ', "a <tool_ca"):
            choice = (await served.ask(text))["choices"][0]
            assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
            assert choice["finish_reason"] == "stop"


async def test_without_tools_calls_are_text_too(serve: Any) -> None:
    async with serve() as served:
        cases: list[dict[str, Any]] = [{"tools": None}, {"tools": []}, {"tool_choice": "none"}]
        for fields in cases:
            choice = (await served.ask(CALL, **fields))["choices"][0]
            assert choice["message"]["content"] == CALL
            assert "get_weather" not in served.prompt


async def test_a_length_limit_cuts_a_call(serve: Any) -> None:
    async with serve() as served:
        whole = len(served.world.tokenizer.encode(CALL))
        choice = (await served.ask(CALL, max_tokens=whole - 14))["choices"][0]
        assert choice["finish_reason"] == "length"
        (call,) = choice["message"]["tool_calls"]
        assert ARGUMENTS.startswith(call["function"]["arguments"])
        assert call["function"]["arguments"] != ARGUMENTS


async def test_stop_strings_apply_to_the_text_as_it_is_written(serve: Any) -> None:
    async with serve() as served:
        choice = (await served.ask(f"{CALL} and {NOW}", stop="</tool_call>"))["choices"][0]
        assert choice["stop_reason"] == "</tool_call>"
        assert choice["finish_reason"] == "tool_calls"
        assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == [ARGUMENTS]


async def test_special_tokens_of_the_format_are_kept_and_others_are_not(serve: Any) -> None:
    async with serve("mistral") as served:
        raw = f"Well.[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]now[ARGS]{{}}<|user|>"
        message = (await served.ask(raw))["choices"][0]["message"]
        assert message["content"] == "Well."
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather", "now"]
        assert [call["function"]["arguments"] for call in message["tool_calls"]] == [ARGUMENTS, "{}"]
        result = {"role": "tool", "tool_call_id": message["tool_calls"][1]["id"], "content": "Noon"}
        await served.ask("So.", messages=[*ASK["messages"], message, result])
        assert f"{result['tool_call_id']}: now: Noon<|end|>" in served.prompt
        unparsed = (await served.ask(raw, tools=None))["choices"][0]["message"]
        assert unparsed["content"] == f"Well.get_weather{ARGUMENTS}now{{}}"
        foreign = {**message, "tool_calls": [{**message["tool_calls"][0], "id": "call_1"}]}
        refused = await served.refused(messages=[*ASK["messages"], foreign])
        assert refused.status_code == 400
        assert "ids have 9 characters" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "forced", "named"),
    [
        ("hermes", '<tool_call>\n{"name":', '<tool_call>\n{"name": "now", "arguments":'),
        ("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]now[ARGS]"),
    ],
)
async def test_a_forced_call_is_begun_in_the_prompt(serve: Any, kind: str, forced: str, named: str) -> None:
    choice = {"type": "function", "function": {"name": "now"}}
    async with serve(kind, reasoning_parser="none") as served:
        end = "}\n</tool_call>" if kind == "hermes" else ""
        for _ in range(2):
            answer = (await served.ask(' {"a": 1}' + end, tool_choice=choice))["choices"][0]
            assert served.prompt.endswith("<|assistant|>" + named)
            assert answer["finish_reason"] == "tool_calls"
            (call,) = answer["message"]["tool_calls"]
            assert call["function"] == {"name": "now", "arguments": '{"a": 1}'}
        rest = ' "now", "arguments": {"a": 1}' + end if kind == "hermes" else 'now[ARGS]{"a": 1}'
        answer = (await served.ask(rest, tool_choice="required"))["choices"][0]
        assert served.prompt.endswith("<|assistant|>" + forced)
        assert answer["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": '{"a": 1}'}
        failed = (await served.ask(" never", tool_choice="required"))["choices"][0]
        assert failed["message"]["content"] == f"{forced} never"
        assert failed["finish_reason"] == "stop"


async def test_a_forced_call_is_spliced_into_the_next_turn(serve: Any) -> None:
    async with serve(reasoning_parser="none") as served:
        rest = " {}}\n</tool_call>"
        body = await served.ask(rest, tool_choice={"type": "function", "function": {"name": "now"}})
        first = served.world.dispatcher.requests[-1].prompt
        message = body["choices"][0]["message"]
        result = {**RESULT, "tool_call_id": message["tool_calls"][0]["id"]}
        before = served.world.metric("tandem_spliced_prompt_tokens_total")
        await served.ask("It is noon.", messages=[*ASK["messages"], message, result])
        second = served.world.dispatcher.requests[-1].prompt
        answer = (*first, *served.world.tokenizer.encode(f"{rest}<|end|>"))
        assert second[: len(answer)] == answer
        assert served.world.metric("tandem_spliced_prompt_tokens_total") - before >= 2 * len(answer)


async def test_a_forced_call_is_one_call_and_spares_the_reasoning(serve: Any) -> None:
    choice = {"type": "function", "function": {"name": "now"}}
    async with serve() as served:
        for values in ({}, {"thinking": True}):
            asked = {"tool_choice": choice, "chat_template_kwargs": values}
            answer = (await served.ask(f" {{}}}}\n</tool_call>\n{CALL}", **asked))["choices"][0]
            assert served.prompt.endswith(
                '<|assistant|><think>\n\n</think>\n\n<tool_call>\n{"name": "now", "arguments":'
            )
            assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["now"]
            assert "reasoning_content" not in answer["message"]


async def test_reasoning_is_apart_and_counted(serve: Any) -> None:
    async with serve() as served:
        body = await served.ask(f"<think>\nHm.\n\nSo.\n</think>\n\n{CALL}")
        message = body["choices"][0]["message"]
        assert message["reasoning_content"] == "Hm.\n\nSo."
        assert message["content"] is None
        thought = len(served.world.tokenizer.encode("<think>\nHm.\n\nSo.\n</think>"))
        assert abs(body["usage"]["completion_tokens_details"]["reasoning_tokens"] - thought) <= 1
        assert body["usage"]["completion_tokens"] > thought
        plain = await served.ask("Yes.", tools=None)
        assert plain["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
        result = {"role": "tool", "tool_call_id": "x", "content": "Sunny"}
        await served.ask("Yes.", messages=[*ASK["messages"], message, result])
        assert f"<|assistant|><think>\nHm.\n\nSo.\n</think>\n\n{CALL}<|end|>" in served.prompt


async def test_reasoning_that_the_prompt_began(serve: Any) -> None:
    async with serve() as served:
        asked: dict[str, Any] = {"tools": None, "chat_template_kwargs": {"thinking": True}}
        body = await served.ask("Hm.\n</think>\n\nYes.", **asked)
        assert served.prompt.endswith("<|assistant|><think>\n")
        message = body["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
        cut = await served.ask("Hm. And", **asked)
        assert cut["choices"][0]["message"] == {
            "role": "assistant", "content": "", "refusal": None, "reasoning_content": "Hm. And",
        }  # fmt: skip
        used = cut["usage"]
        assert used["completion_tokens_details"]["reasoning_tokens"] == used["completion_tokens"]
        hidden = await served.ask("Hm.\n</think>\n\nYes.", include_reasoning=False, **asked)
        assert hidden["choices"][0]["message"] == {"role": "assistant", "content": "Yes.", "refusal": None}
        whole = await served.ask("Hm.\n</think>\n\nYes.", separate_reasoning=False, **asked)
        assert whole["choices"][0]["message"]["content"] == "Hm.\n</think>\n\nYes."


def streamed_logprobs(response: httpx.Response) -> list[Any]:
    chunks = [json.loads(block.removeprefix("data: ")) for block in response.text.split("\n\n")[:-2]]
    return [each for chunk in chunks for each in (chunk["choices"][0]["logprobs"] or {}).get("content", [])]


@pytest.mark.parametrize(("raw", "said"), [("Hm.\n</think>\n\nYes.", "Yes."), ("Hm. And", "")])
@pytest.mark.parametrize("thinking", [False, True])
async def test_hidden_reasoning_has_no_logprobs(serve: Any, raw: str, said: str, thinking: bool) -> None:
    async with serve() as served:
        fields = {"logprobs": True, "include_reasoning": False, "chat_template_kwargs": {"thinking": thinking}}
        body = await served.ask(raw if thinking else f"<think>\n{raw}", tools=None, **fields)
        (choice,) = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": said, "refusal": None}
        told = bytes(byte for each in choice["logprobs"]["content"] for byte in each["bytes"] or [])
        assert told.removesuffix(b"<|end|>").lstrip(b"\n") == said.encode()
        response = await served.refused(**fields, tools=None, stream=True)
        assert streamed_logprobs(response) == choice["logprobs"]["content"]


async def test_logprobs_cover_every_token_once(serve: Any) -> None:
    async with serve() as served:
        raw = f"<think>\nHm.\n</think>\n\nOh.\n{CALL}"
        fields = {"logprobs": True, "top_logprobs": 1}
        body = await served.ask(raw, **fields)
        content = body["choices"][0]["logprobs"]["content"]
        ids = served.world.tokenizer.encode(raw)
        assert [bytes(each["bytes"]) for each in content[:-1]] == list(map(served.world.tokenizer.token_bytes, ids))
        response = await served.refused(**fields, stream=True)
        assert streamed_logprobs(response) == content


async def test_parsers_can_be_named_and_switched_off(serve: Any) -> None:
    async with serve(tool_parser="none", reasoning_parser="none") as served:
        refused = await served.refused()
        assert refused.status_code == 400
        assert "--tool-parser" in refused.json()["error"]["message"]
        raw = f"<think>\nHm.\n</think>\n\n{CALL}"
        assert (await served.ask(raw, tools=None))["choices"][0]["message"]["content"] == raw
    async with serve(tool_parser="llama3") as served:
        answer = await served.ask('{"name": "now", "parameters": {}}')
        assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "now"


async def test_what_was_chosen_is_logged(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "router.requests.formats"):
        async with serve() as served:
            await served.ask("Hi")
    (said,) = [record.message for record in caplog.records if record.name == "router.requests.formats"]
    assert "tool parser: hermes (asked for: auto; the chat template takes tools, calls, results)" in said
    assert "reasoning parser: think (asked for: auto)" in said


RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "a", "content": "x"}
CALLED: dict[str, Any] = {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}


def declared(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **function}}]}


def history(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*ASK["messages"], *messages]}


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": {}}, "tools", "at most 128"),
    ({"tools": TOOLS * 65}, "tools", "at most 128"),
    ({"tools": ["f"]}, "tools", "tools.0 must be an object"),
    ({"tools": [{"type": "web_search", "function": FUNCTION}]}, "tools", "type 'function'"),
    (declared(name=None), "tools", "tools.0.function.name must be 1 to 64"),
    (declared(name="a b"), "tools", "tools.0.function.name"),
    (declared(name="x" * 65), "tools", "1 to 64"),
    (declared(name="f\n"), "tools", "tools.0.function.name"),
    (declared(parameters=[]), "tools", "tools.0.function.parameters must be an object"),
    (declared(description=5), "tools", "tools.0.function.description must be a string"),
    (declared(description="a\0"), "tools", "NUL"),
    (declared(parameters={"a": {"b": ["\0"]}}), "tools", "NUL"),
    (declared(strict="yes"), "tools", "tools.0.function.strict must be true or false"),
    (declared(strict=True, parameters={"type": "string"}), "tools", "tools.0.function.parameters must have the type"),
    ({**declared(strict=True), "response_format": {"type": "json_object"}}, "response_format", "together with tools"),
    ({**declared(), "guided_regex": "a"}, "guided_regex", "guided_regex together with tools"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "tools.1.function.name"),
    ({"tools": None, "tool_choice": "required"}, "tool_choice", "together with tools"),
    ({"tool_choice": "always"}, "tool_choice", "'required'"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "'required'"),
    ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g'"),
    ({"tool_choice": 5}, "tool_choice", "'required'"),
    ({"parallel_tool_calls": "yes"}, "parallel_tool_calls", "boolean"),
    ({"functions": [FUNCTION]}, "functions", "not supported"),
    ({"function_call": {"name": "f"}}, "function_call", "not supported"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs", "object"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "chat_template_kwargs.messages"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "the router sets it"),
    ({"chat_template_kwargs": {"bos_token": ""}}, "chat_template_kwargs", "bos_token"),
    ({"chat_template_kwargs": {"raise_exception": 1}}, "chat_template_kwargs", "raise_exception"),
    ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs", "keys must be names"),
    ({"chat_template_kwargs": {"a": ["\0"]}}, "chat_template_kwargs", "NUL"),
    ({"chat_template_kwargs": {f"a{i}": i for i in range(33)}}, "chat_template_kwargs", "at most 32"),
    (history({"role": "tool", "content": "x"}), "messages", "messages.1.tool_call_id must be a string"),
    (history({"role": "tool", "tool_call_id": "a"}), "messages", "messages.1.content is required"),
    (history({"role": "tool", "tool_call_id": "a" * 257, "content": "x"}), "messages", "256"),
    (history({"role": "assistant", "tool_calls": {}, "content": 5}), "messages", "messages.1.content"),
    (history({"role": "assistant", "tool_calls": {"a": 1}}), "messages", "at most 128 calls"),
    (history({"role": "assistant", "tool_calls": [CALLED] * 129}), "messages", "at most 128 calls"),
    (history({"role": "assistant", "tool_calls": [5]}), "messages", "messages.1.tool_calls.0"),
    (history({"role": "assistant", "tool_calls": [{**CALLED, "id": 5}]}), "messages", "tool_calls.0.id"),
    (history({"role": "assistant", "tool_calls": [{**CALLED, "function": {"name": ""}}]}), "messages", "1 to 64"),
    (
        history({"role": "assistant", "tool_calls": [{**CALLED, "function": {"name": "f", "arguments": {}}}]}),
        "messages", "arguments must be a string",
    ),
    (history({"role": "assistant", "function_call": {"name": "f"}}), "messages", "use tool_calls"),
    (history({"role": "assistant", "content": "a", "reasoning_content": 5}), "messages", "reasoning_content"),
]  # fmt: skip


async def test_each_bad_field_is_named_with_its_limit(serve: Any) -> None:
    async with serve() as served:
        for fields, param, text in BAD:
            response = await served.refused(**fields)
            shown = json.dumps(fields)[:90]
            assert response.status_code == 400, (shown, response.text)
            error = response.json()["error"]
            assert (error["param"] or "").startswith(param), (shown, error)
            assert text in error["message"], (shown, error)
            assert "\n" not in error["message"] and len(error["message"]) < 400
        assert served.world.dispatcher.requests == []


async def test_broken_arguments_in_the_history_do_not_end_the_conversation(serve: Any) -> None:
    async with serve() as served:
        for arguments, shown in (('{"a": ', '"{\\"a\\": "'), ("", "{}"), ("[1]", '"[1]"'), ("[" * 500, "")):
            broken = {**CALLED, "function": {"name": "now", "arguments": arguments}}
            turns = history({"role": "assistant", "tool_calls": [broken]}, {**RESULT, "content": "error"})
            await served.ask("Sorry.", **turns)
            assert f'{{"name": "now", "arguments": {shown}' in served.prompt


async def test_templates_that_cannot_are_said_to(serve: Any) -> None:
    async with serve("text", tool_parser="hermes") as served:
        refused = await served.refused()
        assert refused.json()["error"]["message"] == "tools: this model's chat template takes no tools"
        assert (await served.refused(tools=None, **history({**RESULT}))).status_code == 200
        turn = {"role": "assistant", "content": None, "tool_calls": [CALLED]}
        await served.ask("Yes", tools=None, **history(turn))
        assert "```{}```" in served.prompt


def test_abilities_are_found_by_rendering() -> None:
    for kind, objects, null in (("hermes", True, True), ("mistral", True, True), ("text", False, True)):
        can = find_abilities(TOKENIZERS[kind])
        assert can.calls == CallStyle(objects, null)
        assert can.results
        assert can.tools == (kind != "text")
    plain = find_abilities(Tokenizer(byte_level_tokenizer()))
    assert (plain.tools, plain.calls, plain.results) == (False, None, False)
    joined = tokenizer_with(HERMES.replace("message.content or ''", "message.content + ''"), [])
    assert find_abilities(joined).calls == CallStyle(objects=True, no_content=False)
    named = byte_level_tokenizer()
    named.chat_template = {"default": "{{ messages[0].content }}", "tool_use": HERMES}
    assert find_abilities(Tokenizer(named)).tools


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["function", "f", "assistant", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "function", "name", "id", "arguments", "strict", "x"]), inner)
    ),
    max_leaves=8,
)
roles = st.sampled_from(["user", "assistant", "tool"])
calls = st.fixed_dictionaries({"id": st.text(max_size=3), "type": st.just("function"), "function": json_values})


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries({}, optional={"tools": json_values, "tool_choice": json_values}),
    st.lists(
        st.fixed_dictionaries(
            {"role": roles, "content": st.none() | st.text(max_size=4)},
            optional={"tool_calls": json_values | st.lists(calls, max_size=2), "tool_call_id": st.text(max_size=3)},
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_any_tools_and_turns_are_taken_or_refused(fields: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    tokenizer = TOKENIZERS["hermes"]
    can = find_abilities(tokenizer)
    with contextlib.suppress(BadRequest):
        body = parse(ChatBody, json.dumps({**fields, "messages": messages}).encode())
        turns = chat_turns(body.messages, can)
        tokenizer.render(turns, tools=tool_use(body).tools or None)


async def test_tokenize_renders_tools(serve: Any) -> None:
    async with serve() as served:
        asked = {"messages": ASK["messages"], "tools": TOOLS, "chat_template_kwargs": {"thinking": True}}
        tokens = (await served.client.post("/tokenize", json=asked)).json()["tokens"]
        await served.ask("Hi", chat_template_kwargs={"thinking": True})
        assert tuple(tokens) == served.world.dispatcher.requests[-1].prompt
