"""Processes that stand still and come back, and a router that dies: nobody waits for ever and nothing is left behind.

A stopped process keeps its connections open, so that only leases tell. One cluster serves all tests, one after another.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator

import pytest
from openai import APIError, AsyncOpenAI

from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.cluster import Cluster, Process, cluster

PROMPT_TOKENS = 300
LONG = 30_000
"""Output tokens that take far longer than any lease and any wait here."""
LEASE = ["--lease-s", "2"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One router, one prefill and one decode worker with short leases."""
    model = make_checkpoint(
        tmp_path_factory.mktemp("checkpoint") / "llama", CheckpointSpec(seed=1, max_positions=32_768)
    )
    folder = tmp_path_factory.mktemp("cluster")
    with cluster(model, folder, worker_args=["--kv-mib", "32", *LEASE], router_args=LEASE) as made:
        yield made


def client(running: Cluster) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0, timeout=60)


async def complete(openai: AsyncOpenAI, seed: int, tokens: int, started: asyncio.Event | None = None) -> int:
    """Streams a completion; returns the prompt tokens that were cached. Raises APIError."""
    cached = -1
    stream = await openai.completions.create(
        model="llama",
        prompt=[(seed * 31 + position * 17) % 250 for position in range(PROMPT_TOKENS)],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        if started is not None:
            started.set()
        if chunk.usage is not None and chunk.usage.prompt_tokens_details is not None:
            assert chunk.usage.completion_tokens == tokens
            cached = chunk.usage.prompt_tokens_details.cached_tokens or 0
    return cached


async def long_stream(openai: AsyncOpenAI, seed: int) -> asyncio.Task[int]:
    """A stream that has begun and goes on for long."""
    started = asyncio.Event()
    task = asyncio.create_task(complete(openai, seed, LONG, started))
    await started.wait()
    return task


async def holds_nothing(running: Cluster, process: Process) -> None:
    """Waits until a worker holds nothing, less long than `LONG` tokens take."""
    deadline = time.monotonic() + 20
    while leaks := await asyncio.to_thread(running.audit, process):
        assert time.monotonic() < deadline, leaks
        await asyncio.sleep(0.1)


async def test_a_decode_worker_that_stood_still_comes_back_empty(running: Cluster) -> None:
    """Its streams ended with an error; it may not go on computing them, and its load is counted again."""
    decode = running.workers["decode-0"]
    async with client(running) as openai:
        stream = await long_stream(openai, 1)
        decode.signal(signal.SIGSTOP)
        try:
            with pytest.raises(APIError, match="the decode worker was lost"):
                await stream
        finally:
            decode.signal(signal.SIGCONT)
        running.wait_ready()
        await holds_nothing(running, decode)
        await asyncio.gather(*(complete(openai, 10 + seed, 8) for seed in range(4)))
    running.check_leaks()


async def test_a_prefill_worker_that_stands_still_costs_no_client_an_error(running: Cluster) -> None:
    prefill = running.workers["prefill-0"]
    async with client(running) as openai:
        prefill.signal(signal.SIGSTOP)
        try:
            await asyncio.gather(*(complete(openai, 20 + seed, 8) for seed in range(4)))
        finally:
            prefill.signal(signal.SIGCONT)
        running.wait_ready()
        moved = running.metric("tandem_kv_moved_bytes_total")
        seed = 30
        while running.metric("tandem_kv_moved_bytes_total") == moved:
            await asyncio.gather(*(complete(openai, seed + more, 8) for more in range(4)))
            seed += 4
    running.check_leaks()


async def test_a_router_that_stands_still_loses_its_lease(running: Cluster) -> None:
    """Its connection stays open, but nobody reads: the decode worker must not compute for it without end."""
    async with client(running) as openai:
        stream = await long_stream(openai, 2)
        running.router.signal(signal.SIGSTOP)
        try:
            await holds_nothing(running, running.workers["decode-0"])
        finally:
            running.router.signal(signal.SIGCONT)
        with pytest.raises(APIError, match="cancelled by the cluster"):
            await stream
        running.wait_ready()
        await complete(openai, 50, 8)
    running.check_leaks()


async def test_a_router_that_is_killed_leaves_nothing_and_a_new_one_knows_the_caches(running: Cluster) -> None:
    decode = running.workers["decode-0"]
    async with client(running) as openai:
        await complete(openai, 60, 8)
        stream = await long_stream(openai, 3)
        running.router.kill()
        with pytest.raises(Exception, match=r"peer closed connection|Connection error"):
            await stream
        running.router.start()
        running.wait_ready()
        await holds_nothing(running, decode)
        assert await complete(openai, 60, 8) >= PROMPT_TOKENS // 16 * 16
    running.check_leaks()
