"""OpenAI's own client with tools and reasoning, against the router on a real port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest_asyncio
import uvicorn

from router.http.http_limits import LimitedHttp
from tandem.testing.tokenizer import byte_level_tokenizer
from tandem.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}<tool_call><think>{% for message in messages %}"
    "{{ '<|user|>' if message.role != 'assistant' else '<|assistant|>' }}{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}"
    "{% endfor %}<|end|>{% endfor %}<|assistant|>"
)
TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
MESSAGES: list[Any] = [{"role": "user", "content": "1 + 2?"}]
ARGUMENTS = '{"a": 1, "b": [2, "é"]}'
ANSWER = (
    "<think>\nEasy.\n</think>\n\nLet me add.\n"
    f'<tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
)


@pytest_asyncio.fixture
async def sdk(make_world: Callable[..., Any]) -> AsyncIterator[openai.AsyncOpenAI]:
    wrapped = byte_level_tokenizer()
    wrapped.chat_template = TEMPLATE
    world = make_world(Tokenizer(wrapped), 2048)
    world.answers[:] = [ANSWER]
    config = uvicorn.Config(world.app, port=0, log_config=None, lifespan="off", http=LimitedHttp, ws="none")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0)
    base = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:
        yield client
    server.should_exit = True
    await serving


async def test_whole_answers(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me add."
    assert choice.message.model_extra == {"reasoning_content": "Easy."}
    calls: list[Any] = choice.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == [("add", ARGUMENTS), ("add", "{}")]
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    assert (answer.usage.completion_tokens_details.reasoning_tokens or 0) > 5
    results: list[Any] = [{"role": "tool", "tool_call_id": call.id, "content": "3"} for call in calls]
    history = [*MESSAGES, choice.message.model_dump(exclude_none=True), *results]
    again = await sdk.chat.completions.create(model="tiny", messages=history, tools=TOOLS, tool_choice="none")
    assert again.choices[0].finish_reason == "stop"


async def test_the_streaming_helper_adds_deltas_up(sdk: openai.AsyncOpenAI) -> None:
    arguments = ""
    async with sdk.chat.completions.stream(model="tiny", messages=MESSAGES, tools=TOOLS) as stream:
        async for event in stream:
            if event.type == "tool_calls.function.arguments.delta" and event.index == 0:
                arguments += event.arguments_delta
        final = await stream.get_final_completion()
    assert arguments == ARGUMENTS
    message = final.choices[0].message
    assert final.choices[0].finish_reason == "tool_calls"
    assert message.content == "Let me add."
    calls: list[Any] = message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == [("add", ARGUMENTS), ("add", "{}")]
    assert len({call.id for call in calls}) == 2
    assert {call.type for call in calls} == {"function"}
