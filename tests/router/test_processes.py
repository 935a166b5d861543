"""Several processes on one port: they share registrations, questions and the port, and are started again."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import psutil
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from pydantic import ValidationError

from router.siblings import Siblings, merged
from tandem.cluster import Role
from tandem.config import RouterConfig, child_environment
from tandem.ports import free_ports
from tandem.testing.workers import FakeWorker
from tandem.wire import codec
from tandem.wire.v1 import worker_pb2, worker_pb2_grpc

MODEL = Path(__file__).resolve().parents[2] / "tandem/demo/model"


@dataclass
class Router:
    process: asyncio.subprocess.Process
    url: str
    control: int

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    async def get(self, path: str) -> httpx.Response:
        """Over a connection of its own, which the kernel gives to any of the processes."""
        async with httpx.AsyncClient(base_url=self.url, timeout=20) as client:
            return await client.get(path)


@asynccontextmanager
async def router(processes: int) -> AsyncIterator[Router]:
    port, control = free_ports(2)
    command = [sys.executable, "-m", "tandem.cli", "router", "--port", str(port), "--control-port", str(control)]
    command += ["--processes", str(processes), "--model", str(MODEL), "--lease-s", "20"]
    environment = child_environment({"PYTHONUNBUFFERED": "1"})
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, env=environment)
    assert process.stderr is not None
    try:
        up = 0
        while up < processes:
            line = (await process.stderr.readline()).decode()
            assert line, "the router ended"
            up += bool(re.search(r"listens on http", line))
        drain = asyncio.create_task(process.stderr.read())
        yield Router(process, f"http://127.0.0.1:{port}", control)
        drain.cancel()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def announce(made: Router, worker: FakeWorker) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{made.control}") as channel:
        request = worker_pb2.RegisterRequest(worker=codec.worker_info_to_wire(worker.info))
        await worker_pb2_grpc.RegistryStub(channel).Register(request)


async def test_processes_share_a_port_and_a_dead_one_is_replaced() -> None:
    async with router(2) as made, FakeWorker(Role.DECODE) as worker, asyncio.timeout(60):
        first, second = made.children()
        await announce(made, worker)
        await worker.until(lambda: worker.watches == 2)
        page = (await made.get("/metrics")).text
        for index in (0, 1):
            assert f'tandem_requests_running{{process="{index}"}} 0.0' in page
        assert page.count("# TYPE tandem_requests_running ") == 1

        second.send_signal(signal.SIGKILL)
        await asyncio.to_thread(second.wait)
        while len(living := [child for child in made.children() if child.status() != psutil.STATUS_ZOMBIE]) < 2:
            await asyncio.sleep(0.05)
        assert first in living
        assert second.pid not in [child.pid for child in living]
        # Its clients wait until it knows the worker, as this one announces itself again.
        answers = [asyncio.create_task(made.get("/ready")) for _ in range(20)]
        while worker.watches < 3:
            await announce(made, worker)
            await asyncio.sleep(0.1)
        assert {answer.status_code for answer in await asyncio.gather(*answers)} == {200}

        made.process.send_signal(signal.SIGTERM)
        assert await made.process.wait() == 0
        assert not any(child.is_running() for child in living)


async def test_processes_end_with_their_supervisor() -> None:
    async with router(2) as made, asyncio.timeout(30):
        children = made.children()
        made.process.kill()
        await made.process.wait()
        gone, alive = await asyncio.to_thread(psutil.wait_procs, children, 15)
        assert (len(gone), alive) == (2, [])


async def test_siblings_answer_each_other_and_a_dead_one_is_left_out(tmp_path: Path) -> None:
    siblings = [Siblings(tmp_path, index, 3) for index in range(3)]

    def answering(index: int) -> Any:
        async def answer(asked: list[str]) -> bytes:
            return f"{index}: {asked}".encode()

        return answer

    servers = [await sibling.serve(answering(index)) for index, sibling in enumerate(siblings[:2])]
    assert await siblings[2].ask("a", "b c") == {0: b"0: ['a', 'b c']", 1: b"1: ['a', 'b c']"}
    assert await siblings[0].ask("a") == {1: b"1: ['a']"}
    for server in servers:
        server.close()


def test_pages_are_merged_by_family() -> None:
    pages = {}
    for index in (0, 1):
        registry = CollectorRegistry()
        Counter("seen", "help", ["kind"], registry=registry).labels('a"b').inc(index + 1)
        Histogram("took_seconds", "help", registry=registry, buckets=(1.0,)).observe(0.5)
        pages[index] = generate_latest(registry)
    lines = merged(pages).decode().splitlines()
    assert lines.count("# TYPE seen_total counter") == 1
    for index in (0, 1):
        assert f'seen_total{{kind="a\\"b",process="{index}"}} {index + 1}.0' in lines
        assert f'took_seconds_bucket{{le="1.0",process="{index}"}} 1.0' in lines


@pytest.mark.parametrize("processes", [0, 65])
def test_a_wrong_number_of_processes_is_refused(processes: int) -> None:
    with pytest.raises(ValidationError, match="processes"):
        RouterConfig(processes=processes)


def test_wrong_settings_that_only_a_process_finds_end_all_at_once(tmp_path: Path) -> None:
    settings = ("--port", "0", "--control-port", "0", "--processes", "2", "--kubernetes-selector", "app=tandem")
    done = subprocess.run(
        [sys.executable, "-m", "tandem.cli", "router", *settings],
        env=child_environment({"KUBECONFIG": str(tmp_path / "none"), "KUBERNETES_SERVICE_HOST": ""}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "--kubernetes-selector is set; that needs a pod's service account" in done.stderr
    assert "Traceback" not in done.stderr
    assert "started again" not in done.stderr
