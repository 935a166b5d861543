"""What the abort storm asks, and what it says when something stays held."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks import abort_storm
from benchmarks.abort_storm import (
    KINDS,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    Asked,
    Storm,
    ask,
    pinned,
    play_round,
    until_free,
)
from tandem.testing.cluster import Cluster, Process


class Holding(Cluster):
    """A cluster of which a router says that some requests run."""

    def __init__(self, reads: int) -> None:
        """reads: after so many of the metrics, none does."""
        super().__init__(Process("router", [], 9, Path("log")))
        self.reads = reads

    def metric(self, name: str) -> float:
        """See `Cluster`."""
        self.reads -= 1
        return float(self.reads >= 0)


async def test_what_is_still_held_has_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 <= await until_free(Holding(reads=2)) < math.inf
    monkeypatch.setattr(abort_storm, "HELD_S", 0.0)
    assert await until_free(Holding(reads=1000)) == math.inf


@pytest.mark.parametrize("held", [False, True])
def test_it_fails_when_something_stays_held(
    held: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def play(*_: object) -> tuple[list[abort_storm.Asked], int]:
        return [abort_storm.Asked(True, 0.1, 0.5)], 0

    async def pinned(*_: object) -> float:
        return math.inf if held else 0.1

    async def free(_: object) -> float:
        return math.inf if held else 0.0

    monkeypatch.setattr(abort_storm, "play_round", play)
    monkeypatch.setattr(abort_storm, "pinned", pinned)
    monkeypatch.setattr(abort_storm, "until_free", free)
    monkeypatch.setattr(abort_storm, "make_checkpoint", lambda *_: Path())
    monkeypatch.setattr(abort_storm, "cluster", lambda *_: nullcontext(Holding(reads=0)))
    monkeypatch.setattr("sys.argv", ["abort_storm", "--rounds", "1"])
    assert abort_storm.main() == int(held)
    told = capsys.readouterr().out
    assert (f"still held after 30 s: {len(KINDS) + 1} times" in told) == held
    assert ("longest inf s" in told) == held


class Endpoint:
    """Answers at once, and keeps the prompts."""

    def __init__(self, cached: int = 0) -> None:
        self.prompts: list[list[int]] = []
        self._cached = cached

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body: dict[str, Any] = json.loads(request.content)
        self.prompts.append(body["prompt"])
        usage = {"prompt_tokens": PROMPT_TOKENS, "prompt_tokens_details": {"cached_tokens": self._cached}}
        events: list[dict[str, Any]] = [{"choices": [{"text": "a"}], "usage": None}]
        events += [{"choices": [], "usage": usage}] if body["stream_options"] == {"include_usage": True} else []
        text = "".join(f"data: {json.dumps(each)}\n\n" for each in events)
        return httpx.Response(200, text=text + "data: [DONE]\n\n")

    def client(self) -> httpx.AsyncClient:
        """One that asks it."""
        return httpx.AsyncClient(base_url="http://router", transport=httpx.MockTransport(self))


async def test_no_two_prompts_begin_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache would have more of the rounds that repeat others, whatever their kind."""
    monkeypatch.setattr(abort_storm, "PINNED_SPREAD_S", 0.0)
    asked = Endpoint()
    async with asked.client() as client:
        for number in range(3):
            for kind in KINDS:
                await play_round(client, number, kind, 1e6, 0.0 if kind == "storm" else 9.0)
            monkeypatch.setattr(abort_storm, "_held", lambda _, reads=iter((True, False)): next(reads))
            await pinned(client, Holding(reads=0), number)
    assert len(asked.prompts) > 3 * 211
    assert all(len(prompt) == PROMPT_TOKENS and max(prompt) < 250 for prompt in asked.prompts)
    assert len({tuple(prompt[:5]) for prompt in asked.prompts}) == len(asked.prompts)


async def test_an_answer_says_what_was_cached_and_a_storm_each_kinds_share() -> None:
    async with Endpoint(cached=50).client() as client:
        answer = await ask(client, 1, 0.0, None)
    assert answer.answered and answer.cached_tokens == 50
    storm = Storm(pinned_s=[0.1])
    storm.add("storm", [answer] * 11, 80)
    storm.add("stay", [Asked(True, 0.1, 0.5, 100)] * 11, 0)
    storm.add("alone", [Asked(True, 0.1, 0.5)] * 11, 0)
    lines = storm.text().splitlines()
    shares = [f"{share} of the prompts cached" for share in ("25.0%", "50.0%", "0.0%")]
    assert [line.split("), ")[1] for line in lines[:3]] == shares
    assert lines[3].endswith("; 80 given up of 89 that drew a moment to")
    assert storm.throughput("stay") == OUTPUT_TOKENS / 0.5


def test_a_storm_that_held_nothing_does_not_speak_of_it() -> None:
    storm = Storm({kind: [1.0] for kind in KINDS}, {kind: [0.1] for kind in KINDS}, given_up=3, pinned_s=[0.2])
    assert "still held" not in storm.text()
