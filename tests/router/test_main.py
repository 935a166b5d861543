"""The router as a process: its exit codes, its first log line, and no torch in it."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import sys
from pathlib import Path

import httpx

from tandem.config import child_environment

COMMAND = (sys.executable, "-m", "tandem.cli", "router", "--control-port", "0", "--log-format", "json", "--port")


def mapped_files(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


async def start(port: int) -> asyncio.subprocess.Process:
    environment = child_environment({"PYTHONUNBUFFERED": "1"})
    return await asyncio.create_subprocess_exec(*COMMAND, str(port), stderr=asyncio.subprocess.PIPE, env=environment)


async def test_the_router_serves_and_stops_in_order() -> None:
    process = await start(0)
    try:
        assert process.stderr is not None
        line = (await process.stderr.readline()).decode()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, line
        async with httpx.AsyncClient(base_url=found[0]) as client:
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/ready")).status_code == 503
            assert "tandem_requests_running 0.0" in (await client.get("/metrics")).text
        assert "libtorch" not in mapped_files(process.pid)
        process.send_signal(signal.SIGTERM)
        rest = (await process.stderr.read()).decode()
        assert await process.wait() == 0, rest
        assert "Traceback" not in rest
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_taken_port_is_a_wrong_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = await start(port)
        assert process.stderr is not None
        said = (await process.stderr.read()).decode()
        assert await process.wait() == 2
        assert str(port) in said
        assert "Traceback" not in said
