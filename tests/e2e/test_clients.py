"""How clients use a real cluster: both of OpenAI's clients and plain HTTP, many at once, slow ones, ones that leave."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, BadRequestError, LengthFinishReasonError, OpenAI

from tandem import obs
from tandem.testing.checkpoints import SPECIAL_TOKENS, CheckpointSpec, make_checkpoint
from tandem.testing.cluster import Cluster, cluster
from tandem.testing.reference import TOLERANCE, Reference

CONTEXT = 4096
STREAMS = 64
PATIENCE_S = 30.0
MESSAGES: list[Any] = [{"role": "user", "content": "tell me about trains"}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>{{ tools | tojson }} Call them by <tool_call>.<|end|>{% endif %}"
    "{% for message in messages %}{{ '<|' + ('user' if message.role == 'tool' else message.role) + '|>' }}"
    "{{ message.content or '' }}{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that is served."""
    spec = CheckpointSpec(layers=2, vocab=600, max_positions=CONTEXT, seed=3)
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", spec)


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One router that cuts slow readers early, one prefill and one decode worker; checked for leaks at its end."""
    folder = tmp_path_factory.mktemp("logs")
    (template := folder / "tools.jinja").write_text(TEMPLATE)
    router_args = ["--stream-queue", "64", "--chat-template", str(template)]
    with cluster(model, folder, worker_args=["--kv-mib", "32"], router_args=router_args) as made:
        yield made


@pytest.fixture
def sync(running: Cluster) -> Iterator[OpenAI]:
    with OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as made:
        yield made


@pytest_asyncio.fixture
async def client(running: Cluster) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as made:
        yield made


def ended(running: Cluster, outcome: str) -> float:
    """Requests that ended so, over both endpoints."""
    pattern = rf'^{obs.REQUESTS_TOTAL}{{endpoint="\w+",outcome="{outcome}"}} (\S+)$'
    return sum(map(float, re.findall(pattern, running.get("/metrics"), flags=re.M)))


def wait_for_end(running: Cluster, outcome: str, count: float) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while ended(running, outcome) < count:
        assert time.monotonic() < deadline, running.get("/metrics")
        time.sleep(0.02)
    running.check_leaks()


def test_the_synchronous_client(sync: OpenAI) -> None:
    assert [model.id for model in sync.models.list()] == ["tiny"]
    whole = sync.chat.completions.create(messages=MESSAGES, max_tokens=24, **GREEDY)
    assert whole.choices[0].finish_reason == "length"
    text = whole.choices[0].message.content
    assert text
    stream = sync.chat.completions.create(messages=MESSAGES, max_tokens=24, stream=True, **GREEDY)
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(parts) == text
    # So few tokens may come as one: what is made while a process does not run is sent at once.
    stream = sync.chat.completions.create(messages=MESSAGES, max_tokens=600, stream=True, **GREEDY)
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len([part for part in parts if part]) > 1, "it comes in parts"
    with pytest.raises(BadRequestError, match=r"temperature is -1\.0"):
        sync.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)


async def test_usage_comes_in_streams_that_ask_for_it(client: AsyncOpenAI) -> None:
    for options in (None, {"include_usage": False}, {"include_usage": True}):
        asked: dict[str, Any] = {} if options is None else {"stream_options": options}
        stream = await client.completions.create(prompt=[5] * 40, max_tokens=8, stream=True, **asked, **GREEDY)
        chunks = [chunk async for chunk in stream]
        usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
        if options is None or not options["include_usage"]:
            assert usages == []
            continue
        assert len(usages) == 1 and chunks[-1].usage is usages[0]
        assert chunks[-1].choices == []
        assert (usages[0].prompt_tokens, usages[0].completion_tokens, usages[0].total_tokens) == (40, 8, 48)


async def test_three_choices_are_told_apart(client: AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16, "n": 3, "seed": 11}
    whole = await client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    streamed, finished = ["", "", ""], set()
    async for chunk in await client.chat.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            if choice.finish_reason is not None:
                finished.add(choice.index)
    assert (streamed, finished) == (texts, {0, 1, 2})


async def test_tools_their_results_and_a_forced_call(client: AsyncOpenAI) -> None:
    """The random model calls nothing by itself: what is looked at is the way there and back."""
    asked: dict[str, Any] = {"max_tokens": 12, **GREEDY}
    plain = await client.chat.completions.create(messages=MESSAGES, **asked)
    told = await client.chat.completions.create(messages=MESSAGES, tools=TOOLS, **asked)
    assert plain.usage and told.usage
    assert told.usage.prompt_tokens > plain.usage.prompt_tokens + 20, "the prompt has the tools"
    choice: Any = {"type": "function", "function": {"name": "add"}}
    forced = (await client.chat.completions.create(messages=MESSAGES, tools=TOOLS, tool_choice=choice, **asked)).choices
    begun = '<tool_call>\n{"name": "add", "arguments":'
    assert forced[0].message.tool_calls or str(forced[0].message.content).startswith(begun)

    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    history: list[Any] = [*MESSAGES, turn, {"role": "tool", "tool_call_id": "call_1", "content": "3"}]
    whole = await client.chat.completions.create(messages=history, tools=TOOLS, **asked)
    async with client.chat.completions.stream(messages=history, tools=TOOLS, **asked) as stream:
        await stream.until_done()
        final = stream.current_completion_snapshot
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason == "length"


async def test_a_seed_repeats_an_answer_whatever_runs_beside_it(client: AsyncOpenAI) -> None:
    async def ask(seed: int, **fields: Any) -> str:
        answer = await client.completions.create(model="tiny", prompt="once upon", max_tokens=32, seed=seed, **fields)
        return str(answer.choices[0].text)

    alone = await ask(5)
    crowd = await asyncio.gather(ask(5), *(ask(seed) for seed in range(100, 115)), ask(5, temperature=1.0, top_p=1.0))
    assert crowd[0] == crowd[-1] == alone
    assert len(set(crowd)) == 16


async def test_stop_strings_end_inside_and_across_tokens(client: AsyncOpenAI) -> None:
    prompt = [9, 8, 7] * 10
    whole = await client.completions.create(prompt=prompt, max_tokens=64, logprobs=0, **GREEDY)
    text, logprobs = whole.choices[0].text, whole.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    starts = [offset for offset in logprobs.text_offset if 10 < offset < len(text) - 10]
    across = [text[offset - 1 : offset + 2] for offset in starts]
    stops = [stop for stop in across if stop.isascii() and text.index(stop) > 5][:3]
    assert stops, text
    for stop in stops:
        expected = text[: text.index(stop)]
        asked: dict[str, Any] = {"prompt": prompt, "max_tokens": 64, "stop": [stop, "never said"], **GREEDY}
        answer = await client.completions.create(**asked)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
        chunks = [chunk async for chunk in await client.completions.create(stream=True, **asked)]
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]


async def test_log_probabilities_on_both_endpoints(client: AsyncOpenAI) -> None:
    completion = await client.completions.create(prompt=[3, 1, 4] * 8, max_tokens=12, logprobs=3, **GREEDY)
    found = completion.choices[0].logprobs
    assert found is not None and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 12
    for chosen, rivals in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert chosen is not None and rivals is not None
        assert 1 <= len(rivals) <= 4
        assert chosen <= 0 and chosen == pytest.approx(max(rivals.values()), abs=1e-5), "greedy takes the likeliest"
    assert found.text_offset == sorted(found.text_offset)

    asked: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 12, "logprobs": True, "top_logprobs": 2, **GREEDY}
    chat = await client.chat.completions.create(**asked)
    assert chat.choices[0].logprobs is not None
    entries = chat.choices[0].logprobs.content
    assert entries is not None and len(entries) == 12
    for entry in entries:
        assert len(entry.top_logprobs) == 2
        assert entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert entry.bytes == entry.top_logprobs[0].bytes
    said = b"".join(bytes(entry.bytes or []) for entry in entries if entry.token not in SPECIAL_TOKENS)
    assert said.decode(errors="replace") == chat.choices[0].message.content
    streamed: list[Any] = []
    async for chunk in await client.chat.completions.create(stream=True, **asked):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


@pytest.mark.parametrize("output", [0, 1])
async def test_echoed_prompts_have_the_log_probabilities_that_transformers_gives(
    output: int, client: AsyncOpenAI, model: Path
) -> None:
    """What evaluation harnesses ask for, as ids and as text, in batches, also of prompts that are cached."""
    reference = Reference.load(model)
    prompts = [[(seed * 37 + at * 11) % 590 + 5 for at in range(length)] for seed, length in enumerate((1, 2, 70, 300))]
    await client.completions.create(prompt=prompts[3], max_tokens=4, **GREEDY)
    asked: dict[str, Any] = {"prompt": prompts, "max_tokens": output, "echo": True, "logprobs": 3, **GREEDY}
    answer = await client.completions.create(**asked)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (373, 4 * output)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        assert choice.finish_reason == "length"
        found = choice.logprobs
        assert found is not None and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
        assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(prompt) + output
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        expected = reference.logits(prompt).log_softmax(-1)
        for position, token in enumerate(prompt[1:], 1):
            row, tops = expected[position - 1], found.top_logprobs[position]
            assert found.token_logprobs[position] == pytest.approx(float(row[token]), abs=TOLERANCE)
            assert max(tops.values()) == pytest.approx(float(row.max()), abs=TOLERANCE)
            assert tops[found.tokens[position]] >= found.token_logprobs[position]
        assert found.text_offset == sorted(found.text_offset)
        for token, offset in zip(found.tokens, found.text_offset, strict=True):
            assert choice.text.startswith(token, offset) or "\ufffd" in token or token in SPECIAL_TOKENS
    streamed: dict[int, list[float | None]] = {}
    async for chunk in await client.completions.create(stream=True, **asked):
        for part in chunk.choices:
            streamed.setdefault(part.index, []).extend((part.logprobs and part.logprobs.token_logprobs) or [])
    assert [streamed[choice.index] for choice in answer.choices] == [
        pytest.approx(choice.logprobs and choice.logprobs.token_logprobs, abs=TOLERANCE) for choice in answer.choices
    ]


async def test_only_scoring_fills_the_context_and_goes_with_choices(client: AsyncOpenAI, running: Cluster) -> None:
    whole = [7] * CONTEXT
    answer = await client.completions.create(prompt=whole, max_tokens=0, n=2, echo=True, logprobs=0, **GREEDY)
    scores = [choice.logprobs and choice.logprobs.token_logprobs for choice in answer.choices]
    assert scores[0] == scores[1] and len(scores[0] or ()) == CONTEXT
    with pytest.raises(BadRequestError, match="prompt is too long") as refused:
        await client.completions.create(prompt=[*whole, 7], max_tokens=0, **GREEDY)
    assert (refused.value.param, refused.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(BadRequestError, match="greater than or equal to 1"):
        await client.chat.completions.create(messages=MESSAGES, max_tokens=0, **GREEDY)
    running.check_leaks()


async def test_the_best_of_several_is_the_likeliest(client: AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "once upon", "max_tokens": 8, "seed": 4, "logprobs": 0}

    def mean(choice: Any) -> float:
        return float(sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs))

    every = sorted((await client.completions.create(n=6, **asked)).choices, key=mean, reverse=True)
    best = await client.completions.create(n=2, best_of=6, **asked)
    assert [choice.text for choice in best.choices] == [choice.text for choice in every[:2]]
    assert best.usage is not None and best.usage.completion_tokens > 16


async def test_the_clients_own_streaming_helper_and_raw_answers(client: AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 12, **GREEDY}
    whole = await client.chat.completions.create(**asked)
    async with client.chat.completions.stream(**asked, logprobs=True, stream_options={"include_usage": True}) as stream:
        kinds = {event.type async for event in stream}
        with pytest.raises(LengthFinishReasonError) as cut:
            await stream.get_final_completion()
    final = cut.value.completion
    assert {"chunk", "content.delta", "content.done", "logprobs.content.done"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.usage is not None and final.usage.completion_tokens == 12
    raw = await client.chat.completions.with_raw_response.create(**asked)
    assert raw.parse().id == f"chatcmpl-{raw.headers['x-request-id']}"
    async with client.chat.completions.with_streaming_response.create(stream=True, **asked) as response:
        lines = [line async for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


async def test_many_streams_at_once_get_each_its_own(client: AsyncOpenAI) -> None:
    def asked(seed: int) -> dict[str, Any]:
        prompt = [(seed * 31 + position * 17) % 590 for position in range(20 + seed)]
        return {"prompt": prompt, "max_tokens": 20, **GREEDY}

    async def stream(seed: int) -> tuple[str, int]:
        text, tokens = "", 0
        options: Any = {"include_usage": True}
        async for chunk in await client.completions.create(stream=True, stream_options=options, **asked(seed)):
            text += "".join(choice.text for choice in chunk.choices)
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        return text, tokens

    results = await asyncio.gather(*map(stream, range(STREAMS)))
    assert [tokens for _, tokens in results] == [20] * STREAMS
    for seed in (0, 31, 63):
        alone = await client.completions.create(**asked(seed))
        assert alone.choices[0].text == results[seed][0]


def test_a_connection_is_kept_also_after_a_refusal(running: Cluster) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", running.router.port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.connect()
        first = connection.sock
        for body, status in (({"prompt": "a"}, 200), ({"prompt": ""}, 400), ({"prompt": "a", "stream": True}, 200)) * 2:
            text = json.dumps(body | {"max_tokens": 2})
            connection.request("POST", "/v1/completions", text, {"content-type": "application/json"})
            answer = connection.getresponse()
            assert (answer.status, bool(answer.read())) == (status, True)
            assert connection.sock is first


def test_pipelined_requests_are_answered_in_their_order(running: Cluster) -> None:
    """The second is sent before the first is answered, its body in pieces."""
    wanted = (3, 1, 2)
    bodies = [json.dumps({"prompt": "a", "max_tokens": count, "ignore_eos": True}).encode() for count in wanted]
    head = "POST /v1/completions HTTP/1.1\r\nhost: tandem\r\ncontent-length: "
    sent = b"".join(f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies)
    with socket.create_connection(("127.0.0.1", running.router.port), timeout=PATIENCE_S) as connection:
        for start in range(0, len(sent), 100):
            connection.sendall(sent[start : start + 100])
        reader = connection.makefile("rb")
        for count in wanted:
            assert reader.readline().startswith(b"HTTP/1.1 200")
            headers = dict(line.rstrip().lower().split(b": ") for line in iter(reader.readline, b"\r\n"))
            answer = json.loads(reader.read(int(headers[b"content-length"])))
            assert answer["usage"]["completion_tokens"] == count


async def test_plain_http_reads_events(running: Cluster) -> None:
    body = {"messages": MESSAGES, "max_tokens": 4, "stream": True, "ignore_eos": True}
    async with (
        httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in answer.aiter_lines()]
    assert lines[1::2] == [""] * (len(lines) // 2), "an empty line ends each event"
    events = [line.removeprefix("data: ") for line in lines[::2]]
    assert events[-1] == "[DONE]"
    assert {json.loads(event)["object"] for event in events[:-1]} == {"chat.completion.chunk"}


def begin(running: Cluster, path: str, receive_bytes: int = 0, **body: Any) -> socket.socket:
    """A connection that has asked and not read anything yet."""
    made = socket.socket()
    made.settimeout(PATIENCE_S)
    if receive_bytes:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    made.connect(("127.0.0.1", running.router.port))
    text = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: tandem\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
    )
    made.sendall(head.encode() + text)
    return made


def drop(connection: socket.socket) -> None:
    """Closes with a reset, as a client that crashed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


LONG: dict[str, Any] = {"prompt": [7] * 300, "max_tokens": CONTEXT - 300, "ignore_eos": True}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("leave", [drop, socket.socket.close])
def test_work_ends_when_the_client_leaves(running: Cluster, stream: bool, leave: Any) -> None:
    before = ended(running, "cancelled")
    connection = begin(running, "/v1/completions", stream=stream, n=4, **LONG)
    if stream:
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
    else:
        while running.metric(obs.REQUESTS_RUNNING) == 0:
            time.sleep(0.02)
    leave(connection)
    wait_for_end(running, "cancelled", before + 1)


async def test_a_slow_reader_is_cut_and_nobody_else_waits(running: Cluster, client: AsyncOpenAI) -> None:
    before = ended(running, "slow_client")
    slow = begin(running, "/v1/completions", receive_bytes=4096, stream=True, n=8, logprobs=20, **LONG)
    answers = [await client.completions.create(prompt="meanwhile", max_tokens=8, **GREEDY) for _ in range(5)]
    assert len({answer.choices[0].text for answer in answers}) == 1
    await asyncio.to_thread(wait_for_end, running, "slow_client", before + 1)
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := slow.recv(1 << 16):
            received += part
    slow.close()
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert b"[DONE]" not in received
    assert not received.endswith(b"0\r\n\r\n"), "the client must see that the answer is not whole"
