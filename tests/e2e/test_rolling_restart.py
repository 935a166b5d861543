"""Every worker is replaced in its turn while clients stream: nobody notices."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from openai import APIConnectionError, AsyncOpenAI

from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.cluster import Cluster, Process, cluster

CLIENTS = 3
OUTPUT_TOKENS = 60


async def replace(running: Cluster, process: Process) -> None:
    """SIGTERM, the orderly end, and a new incarnation on the same port."""
    assert process.popen is not None
    process.signal(signal.SIGTERM)
    assert await asyncio.to_thread(process.popen.wait, 30) == 0
    process.start()
    await asyncio.to_thread(running.wait_ready)


async def test_a_rolling_restart_costs_no_request(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "llama", CheckpointSpec(family="llama", seed=1))
    with cluster(model, tmp_path, prefill=2, decode=2, worker_args=["--kv-mib", "16"]) as running:
        asked = finished = 0
        over = asyncio.Event()
        async with AsyncOpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0, timeout=60) as openai:

            async def ask() -> None:
                nonlocal asked, finished
                while not over.is_set():
                    asked += 1
                    prompt = [(asked * 31 + position * 17) % 250 for position in range(300)]
                    stream = await openai.completions.create(
                        model="llama",
                        prompt=prompt,
                        max_tokens=OUTPUT_TOKENS,
                        stream=True,
                        stream_options={"include_usage": True},
                        extra_body={"ignore_eos": True},
                    )
                    usages = [chunk.usage async for chunk in stream if chunk.usage is not None]
                    assert [usage.completion_tokens for usage in usages] == [OUTPUT_TOKENS]
                    finished += 1

            async with asyncio.TaskGroup() as clients:
                for _ in range(CLIENTS):
                    clients.create_task(ask())
                for process in running.workers.values():
                    already = finished
                    await replace(running, process)
                    while finished < already + CLIENTS:
                        await asyncio.sleep(0.05)
                over.set()
        assert asked == finished


async def test_a_router_that_is_told_to_end_finishes_its_answers(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "llama", CheckpointSpec(family="llama", seed=1))
    with cluster(model, tmp_path, prefill=0, decode=1, worker_args=["--kv-mib", "16"]) as running:
        async with AsyncOpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0, timeout=60) as openai:
            stream = await openai.completions.create(
                model="llama", prompt=[5, 6, 7], max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
            )
            chunks = aiter(stream)
            await anext(chunks)
            running.router.signal(signal.SIGTERM)
            assert [chunk async for chunk in chunks][-1].choices[0].finish_reason == "length"
            with pytest.raises(APIConnectionError):
                await openai.models.list()
        assert running.router.popen is not None
        assert await asyncio.to_thread(running.router.popen.wait, 30) == 0
        running.router.start()
        await asyncio.to_thread(running.wait_ready)
