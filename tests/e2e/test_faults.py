"""Eight cells of `docs/faults.md`, played on loopback: no worker's end is seen by a client, and nothing leaks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI

from benchmarks.abort_storm import STAYING, pinned, play_round
from benchmarks.fault_cells import Cell, Outcome
from benchmarks.faults import play, running_cluster
from tandem.obs import REQUESTS_MOVED_TOTAL
from tandem.testing.cluster import Cluster

CELLS = (
    Cell("prefill", "SIGKILL", "mid-prefill"),
    Cell("prefill", "restart", "mid-transfer"),
    Cell("prefill", "SIGTERM", "mid-transfer"),
    Cell("decode", "SIGKILL", "mid-transfer"),
    Cell("decode", "SIGKILL", "mid-decode"),
    Cell("decode", "restart", "idle"),
    Cell("decode", "SIGTERM", "mid-decode"),
    Cell("router", "SIGKILL", "mid-decode"),
)

BLOWS = 6


def check(outcome: Outcome) -> None:
    assert outcome.lost == 0 and not outcome.leaked and not outcome.besides, outcome
    assert outcome.reached, f"the fault did not meet its phase: {outcome}"
    if outcome.cell.role == "router":
        assert outcome.errors, "its streams end with an error, never cleanly"
    else:
        assert not outcome.errors, outcome


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_eight_cells_and_a_storm(tmp_path: Path) -> None:
    """One cluster for all: starting it takes longer than what is done to it."""
    with running_cluster(tmp_path, namespaces=False) as (running, _):
        outcomes = await play(running, "on loopback", CELLS)
        for outcome in outcomes:
            check(outcome)
        await stop_strings_hold_across_a_move(running)
        await an_abort_storm_pins_nothing(running)


async def stop_strings_hold_across_a_move(running: Cluster) -> None:
    """What was withheld as a stop string's possible beginning when the worker died is told apart behind it."""
    async with AsyncOpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0, timeout=90) as openai:

        async def one(seed: int, stop: str | None) -> tuple[str, str | None]:
            text = ""
            finish: str | None = None
            stream = await openai.completions.create(
                model="llama", prompt=[(seed * 31 + at * 17) % 250 for at in range(64)], max_tokens=400, temperature=0,
                stop=stop, stream=True, extra_body={"ignore_eos": True},
            )  # fmt: skip
            async for chunk in stream:
                for choice in chunk.choices:
                    text += choice.text
                    if choice.finish_reason is not None:
                        finish = choice.finish_reason
            return text, finish

        whole = [text for text, _ in await asyncio.gather(*(one(seed, None) for seed in range(4)))]
        stops = [text[len(text) * 4 // 5 :][:12] for text in whole]
        expected = [text[: text.index(stop)] for text, stop in zip(whole, stops, strict=True)]
        # Whoever answers may have ended before the blow falls: then it is struck again.
        moved = running.metric(REQUESTS_MOVED_TOTAL)
        for _ in range(BLOWS):
            streams = [asyncio.create_task(one(seed, stop)) for seed, stop in enumerate(stops)]
            await strike_a_busy_worker(running, streams)
            assert await asyncio.gather(*streams) == [(text, "stop") for text in expected]
            if running.metric(REQUESTS_MOVED_TOTAL) > moved:
                return
    raise AssertionError(f"no stream was moved by {BLOWS} blows")


async def strike_a_busy_worker(running: Cluster, streams: Sequence[asyncio.Task[object]]) -> None:
    """Kills a decode worker that generates, or none when all streams have ended; returns when it serves again."""
    workers = [running.workers["decode-0"], running.workers["decode-1"]]
    while not all(stream.done() for stream in streams):
        held = {worker.name: len(running.audit(worker)) for worker in workers}
        victim = max(workers, key=lambda worker: held[worker.name])
        if any("RUNNING" in line for line in running.audit(victim)):
            victim.kill()
            victim.start()
            await asyncio.to_thread(running.wait_ready)
            return
        await asyncio.sleep(0)


async def an_abort_storm_pins_nothing(running: Cluster) -> None:
    async with httpx.AsyncClient(base_url=running.url, timeout=60) as client:
        stayed, given_up = await play_round(client, 1, "storm", rate=50.0, patience_s=0.5)
        assert len(stayed) == STAYING and given_up > STAYING
        assert await pinned(client, running, 1) < 10
    await asyncio.to_thread(running.check_leaks)
