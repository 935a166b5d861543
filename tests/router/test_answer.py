"""One HTTP request at work: prompts that are taken together, or not at all, and what is counted of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

import router.http.api as routes
from router.answers.answer import Answer
from router.answers.stream import ChoiceStream, Piece
from router.requests.defaults import GenerationDefaults
from router.requests.formats import ModelFormats
from router.requests.job import Endpoint, Job, completion_job
from router.requests.openai import CompletionBody, parse
from tandem.cluster import new_id
from tandem.errors import Overloaded
from tandem.types import FinishReason, GenerateRequest


async def job_of(world: Any, **fields: Any) -> Job:
    endpoint = Endpoint(new_id(), world.dispatcher.info, "tiny", world.text, GenerationDefaults(), ModelFormats())
    return await completion_job(parse(CompletionBody, json.dumps(fields).encode()), endpoint)


class Full:
    """Takes what it is sent but the last of `prompts`; workers answer a Cancel when `answer` is set."""

    def __init__(self, world: Any, prompts: int) -> None:
        self.world = world
        self.left = prompts
        self.answer = asyncio.Event()
        self.asked = 0
        self.cancelled = 0

    async def submit(self, request: GenerateRequest) -> Any:
        self.left -= 1
        if not self.left:
            raise Overloaded("full")
        accepted = await self.world.dispatcher.submit(request)
        accepted.cancel = self.cancel
        return accepted

    async def cancel(self) -> None:
        self.asked += 1
        await self.answer.wait()
        self.cancelled += 1


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_refused_prompt_cancels_the_others_at_once_whoever_waits(world: Any, leaves: bool) -> None:
    full: Any = Full(world, 5)
    job = await job_of(world, prompt=["x"] * 5)
    starting = asyncio.ensure_future(Answer.start(job, full, world.text, world.metrics.start("completion")))
    async with asyncio.timeout(5):
        while full.asked < 4:
            await asyncio.sleep(0)
    if leaves:
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    full.answer.set()
    if not leaves:
        with pytest.raises(Overloaded):
            await starting
    await asyncio.sleep(0)
    assert full.cancelled == 4


def test_text_of_a_whole_answer_is_kept_together() -> None:
    collected, end = routes._Collected(2), Piece(0, "!", finish=FinishReason.STOP)
    for text in ("a", "b", "c"):
        collected.text(0, text)
    collected.text(1, "x")
    collected.piece(end)
    collected.text(0, "d")
    collected.piece(end)
    assert collected.pieces == [[Piece(0, "abc"), end, Piece(0, "d"), end], []]


@pytest.mark.parametrize(("most", "fields"), [(500, {}), (50, {"stop": ["never"]})])
async def test_a_whole_answer_that_is_much_work_is_written_in_a_thread(
    client: httpx.AsyncClient, world: Any, monkeypatch: pytest.MonkeyPatch, most: int, fields: dict[str, Any]
) -> None:
    written = 0
    to_thread = asyncio.to_thread

    async def counted(made: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal written
        written += 1
        return await to_thread(made, *arguments)

    world.answers[:] = ["word " * 100]
    asked = {"prompt": "x", "max_tokens": 500, **fields}
    monkeypatch.setattr(asyncio, "to_thread", counted)
    before = (await client.post("/v1/completions", json=asked)).json()["choices"]
    assert written == 0
    monkeypatch.setattr(routes, "TEXT_WORK", 1)
    monkeypatch.setattr(routes, "MANY", most)
    assert (await client.post("/v1/completions", json=asked)).json()["choices"] == before
    assert (written, before[0]["text"]) == (1, world.answers[0])


class Unread(list[ChoiceStream]):
    """Choices that are not all looked at."""

    def __iter__(self) -> Iterator[ChoiceStream]:
        raise AssertionError("a thousand choices would be read for each of their tokens")


class Checks:
    """Is given an answer's pieces, and looks at its usage for each."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.streams, answer.choices = answer.choices, Unread(answer.choices)
        self.cached: list[int] = []

    def piece(self, piece: Piece) -> None:
        usage = self.answer.usage()
        assert usage.completion_tokens == sum(len(stream.tokens) for stream in self.streams) > 0
        assert usage.reasoning_tokens is None
        self.cached.append(usage.cached_tokens)

    def text(self, choice: int, text: str) -> None:
        raise AssertionError("text alone does not count")


async def test_usage_is_right_at_every_piece_and_reads_no_other_choice(world: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    job = await job_of(world, prompt=["Hello", "Hi"], n=3, stream=True, stream_options=options)
    world.answers[:] = ["one", "two and 🙂", "three three three"]
    world.dispatcher.cached_tokens = 1
    answer = await Answer.start(job, world.dispatcher, world.text, world.metrics.start("completion"))
    world.dispatcher.cached_tokens = 100  # told at a choice's end
    checks = Checks(answer)
    await answer.run(checks)
    lengths = [len(request.prompt) for request in job.requests]
    assert (checks.cached[0], checks.cached[-1]) == (2, sum(lengths) - 2)
    assert answer.usage().prompt_tokens == sum(lengths)
