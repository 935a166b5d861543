from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks.load import Endpoint, Load, run
from benchmarks.report import summarize
from benchmarks.serve import main, measure
from benchmarks.workloads import Conversation, Shape, Turn, make

Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


def event(writer: asyncio.StreamWriter, data: str) -> None:
    """One event as one chunk of the body."""
    raw = f"data: {data}\n\n".encode()
    writer.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")


async def good(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """As many tokens as asked for; a chat starts with the role."""
    chat = "messages" in body
    if chat:
        event(writer, json.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
    for number in range(body["max_tokens"]):
        text = f"t{number} "
        choice = {"delta": {"content": text}} if chat else {"text": text}
        event(writer, json.dumps({"choices": [{"index": 0, **choice}]}))
        await writer.drain()
    length = sum(len(m["content"].split()) for m in body["messages"]) if chat else len(body["prompt"])
    usage = {"prompt_tokens": length, "completion_tokens": body["max_tokens"]}
    usage |= {"prompt_tokens_details": {"cached_tokens": length // 2}}
    event(writer, json.dumps({"choices": [], "usage": usage}))
    event(writer, "[DONE]")


async def cut_off(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    event(writer, json.dumps({"choices": [{"index": 0, "text": "a"}]}))


async def broken(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    event(writer, json.dumps({"error": {"message": "no worker", "type": "overloaded"}}))


async def short(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    await good({**body, "max_tokens": body["max_tokens"] - 1}, writer)


@asynccontextmanager
async def server(answer: Answer, status: str = "200 OK") -> AsyncIterator[tuple[str, list[dict[str, Any]], list[int]]]:
    """A fake endpoint: its URL, the bodies it got, and how many connections were made."""
    bodies: list[dict[str, Any]] = []
    connections: list[int] = []
    tasks: list[asyncio.Task[Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        tasks.extend(task for task in [asyncio.current_task()] if task is not None)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next((int(line[15:]) for line in head.split(b"\r\n") if line[:15] == b"Content-Length:"), 0)
                raw = await reader.readexactly(length)
                if head.startswith(b"GET"):
                    data = b'{"data": [{"id": "fake"}]}'
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))
                    continue
                bodies.append(json.loads(raw))
                writer.write(f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
                await answer(bodies[-1], writer)
                writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", bodies, connections
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_closed_loop_asks_everything_over_few_connections() -> None:
    async with server(good) as (url, bodies, connections):
        measured = await run(Endpoint(url, extra=(("top_k", 5),)), make("random", Shape(20, 30, 6), 0), Load(3))
    report = summarize(measured)
    assert (report.requests, report.errors, report.output_tokens, report.prompt_tokens) == (20, {}, 120, 600)
    assert report.cached_share == 0.5
    assert all(len(sample.chunks) == 6 and sample.text.startswith("t0 t1") for sample in measured.samples)
    assert {body["model"] for body in bodies} == {"fake"}
    assert all(body["ignore_eos"] and body["min_tokens"] == 6 and body["top_k"] == 5 for body in bodies)
    assert len(connections) == 4  # one of them asked for the model's name


async def test_a_chat_carries_the_servers_answers_forward() -> None:
    chat = Conversation((Turn("first", 2), Turn("second", 1)), system="be brief")
    async with server(good) as (url, bodies, _):
        measured = await run(Endpoint(url, "named"), [chat], Load(1))
    assert [message["content"] for message in bodies[1]["messages"]] == ["be brief", "first", "t0 t1 ", "second"]
    assert [len(sample.chunks) for sample in measured.samples] == [2, 1]
    assert bodies[0]["model"] == "named"


@pytest.mark.parametrize(
    ("answer", "status", "kind"),
    [
        (cut_off, "200 OK", "cut off"),
        (broken, "200 OK", "stream error overloaded"),
        (short, "200 OK", "short"),
        (broken, "429 Too Many Requests", "http 429"),
    ],
)
async def test_errors_are_counted_by_kind(answer: Answer, status: str, kind: str) -> None:
    async with server(answer, status) as (url, _, _):
        measured = await run(Endpoint(url, "m"), make("random", Shape(3, 5, 2), 0), Load(1))
    assert summarize(measured).errors == {kind: 3}
    assert all(sample.detail for sample in measured.samples)


async def test_a_conversation_ends_with_its_first_error() -> None:
    async with server(short) as (url, bodies, _):
        await run(Endpoint(url, "m"), make("multiturn", Shape(4, 3, 2, turns=4), 0), Load(1))
    assert len(bodies) == 1


async def test_silence_and_absence_are_errors() -> None:
    async def silent(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    asked = make("random", Shape(1, 5, 2), 0)
    async with server(silent) as (url, _, _):
        measured = await run(Endpoint(url, "m"), asked, Load(1, timeout_s=0.05))
        assert summarize(measured).errors == {"timeout": 1}
    measured = await run(Endpoint(url, "m"), asked, Load(1))
    assert summarize(measured).errors == {"no connection": 1}
    with pytest.raises(ConnectionError, match="names no model"):
        await run(Endpoint(url), asked, Load(1))
    with pytest.raises(ValueError, match="http://host:port is needed"):
        await run(Endpoint("localhost:8000", "m"), asked, Load(1))


async def test_serve_measures_after_warming_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with server(good) as (url, bodies, _):
        await asyncio.to_thread(
            main, "shared", url, requests=6, concurrency=2, warmup=2, slo_ttft_ms=60_000, json_file=tmp_path / "a.json",
            input_tokens=20, shared_tokens=8, output_tokens=3, api_key="", extra=None, trace=None, plot=None,
        )  # fmt: skip
    assert len(bodies) == 8
    assert bodies[0]["prompt"][:8] != bodies[2]["prompt"][:8] == bodies[7]["prompt"][:8]
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["goodput_share"] == 1
    assert found["settings"]["workload"] == "shared"
    assert "time to first token" in capsys.readouterr().out


async def test_serve_fails_when_requests_do(capsys: pytest.CaptureFixture[str]) -> None:
    async with server(cut_off) as (url, _, _):
        with pytest.raises(typer.Exit) as ended:
            await asyncio.to_thread(main, "random", url, requests=2, warmup=0)
    assert ended.value.exit_code == 1
    assert "the stream ended without [DONE]" in capsys.readouterr().err
    with pytest.raises(typer.Exit) as ended:
        await asyncio.to_thread(main, "random", url, requests=2, warmup=0)
    assert ended.value.exit_code == 2


async def test_a_load_by_rate_waits_for_its_arrivals() -> None:
    shape = Shape(5, 4, 1)
    async with server(good) as (url, _, _):
        measured = await asyncio.to_thread(measure, Endpoint(url), "random", shape, Load(rate=200.0, seed=2), 0)
    arrivals = Load(rate=200.0, seed=2).arrivals(make("random", shape, 2))
    first = min(sample.started for sample in measured.samples)
    started = sorted(sample.started - first for sample in measured.samples)
    assert all(real >= planned - 0.002 for real, planned in zip(started, arrivals, strict=True))
