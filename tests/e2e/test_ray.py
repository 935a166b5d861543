"""`tandem up --on ray` on three raylets of this machine: it serves over NIXL, loses a raylet under load, and mends.

Ray is told to find out about lost nodes sooner than it would; a raylet that answers slowly is still no lost one.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tandem.config import child_environment
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.polling import wait_for
from tandem.trust import Trust
from tandem.wire.probe import describe

START_S = 200.0
END_S = 60.0
TOKEN = "token-of-this-test"
STREAMS = 6
TOKENS = 600
"""Of each answer: it must still be written when the raylet is lost."""
NODE = {"num_cpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False}
DETECTION = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
FOUR_WORKERS = ("--prefill", "1", "--decode", "3")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@dataclass
class Raylets:
    """A Ray cluster of one head and two more nodes, on one machine."""

    cluster: Any
    nodes: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, **resources: int) -> None:
        more = {} if self.nodes else {"_system_config": DETECTION}
        before = started()
        for last in (False, False, True):
            try:
                self.nodes.append(self.cluster.add_node(resources=resources, **NODE, **more))
                return
            except Exception as error:  # Ray gives a raylet 30 s, and has no error of its own for one that needs more
                if last or "timed out during startup" not in str(error):
                    raise
                for process in started() - before:  # it may still come, as one node too many
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()

    def raylet(self, at: int) -> psutil.Process:
        (info,) = self.nodes[at].all_processes["raylet"]
        return psutil.Process(info.process.pid)

    def above(self, pid: int) -> int:
        """Which node a process of Tandem's is on."""
        parents = {parent.pid for parent in psutil.Process(pid).parents()}
        return next(at for at in range(len(self.nodes)) if self.raylet(at).pid in parents)

    def lose(self, at: int) -> None:
        """kill -9 of a raylet, which nobody waits for: it stays a zombie, as in a container without an init."""
        self.raylet(at).kill()


@dataclass
class Up:
    """A running `tandem up --on ray`, and what it has said."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str) -> None:
        def there() -> bool:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.said}"
            return text in self.said

        wait_for(there, lambda: self.said, START_S)

    def fact(self, label: str) -> str:
        found = re.findall(rf"^  {label} +(.*)$", self.said, flags=re.M)
        assert found, f"no {label}:\n{self.said}"
        return str(found[-1])

    @property
    def url(self) -> str:
        return self.fact("listening on").split()[0]


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def started() -> set[psutil.Process]:
    """What this process has started, and they."""
    return set(psutil.Process().children(recursive=True))


def of_tandem(raylets: Raylets) -> list[psutil.Process]:
    """Routers and workers under any raylet."""
    found = []
    for at in range(len(raylets.nodes)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += raylets.raylet(at).children(recursive=True)
    return [process for process in found if "tandem.cli.child" in process.cmdline()]


@pytest.fixture(scope="module")
def raylets() -> Iterator[Raylets]:
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # sockets' paths must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("RAY_AUTH_MODE", "disabled")  # it would write a token into the user's home
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Raylets(importlib.import_module("ray.cluster_utils").Cluster(shutdown_at_exit=False))
        try:
            made.add(prefill=1)
            made.add(decode=1)
            made.add(decode=1)
            yield made
        finally:
            made.cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = CheckpointSpec(seed=1, max_positions=4096)
    return make_checkpoint(tmp_path_factory.mktemp("ray") / "tiny", spec)


@contextlib.contextmanager
def up(folder: Path, raylets: Raylets, model: Path, *arguments: str) -> Iterator[Up]:
    log = folder / "up.log"
    settings = (
        "--on",
        "ray",
        "--ray-address",
        raylets.address,
        "--port",
        "0",
        "--kv-mib",
        "64",
        "--log-level",
        "warning",
        "--transport",
        "nixl",
    )
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tandem.cli", "up", str(model), *settings, *arguments],
            stdout=file,
            stderr=file,
            env=child_environment({"TANDEM_TOKEN": TOKEN, "TANDEM_METRICS_TOKEN": TOKEN}),
        )
    try:
        yield Up(process, log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def prompt(seed: int) -> list[int]:
    return [(seed * 31 + position * 17) % 250 for position in range(300)]


async def complete(
    http: httpx.AsyncClient, seed: int, tokens: int, begun: asyncio.Event | None = None
) -> tuple[str, str]:
    """A streamed answer: its text, and the route that was planned for it. Any error of the stream's fails."""
    body = {"prompt": prompt(seed), "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    text, written = "", 0
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            text += "".join(choice["text"] for choice in event["choices"])
            written = (event.get("usage") or {}).get("completion_tokens", written)
            if begun is not None and text:
                begun.set()
    assert written == tokens
    return text, answer.headers["x-tandem-route"]


def test_what_the_cluster_lacks_is_said_before_anything_starts(raylets: Raylets, model: Path, tmp_path: Path) -> None:
    with up(tmp_path, raylets, model, *FOUR_WORKERS, "--ray-wait-s", "1") as asked:
        assert asked.process.wait(START_S) == 1
        assert asked.said == (
            "tandem: the Ray cluster lacks resources after --ray-wait-s 1: "
            "decode: 3 asked for by --ray-decode-resources, 2 available of 2\n"
        )
    assert of_tandem(raylets) == []


async def test_a_raylet_is_lost_under_load_and_comes_back(raylets: Raylets, model: Path, tmp_path: Path) -> None:
    targets = tmp_path / "targets.json"
    with up(tmp_path, raylets, model, "--decode", "2", "--ray-targets", str(targets)) as cluster:
        cluster.wait_for("Ctrl-C stops everything.")
        assert cluster.fact("topology") == "1 router, 1 prefill, 2 decode (disaggregated)"
        assert cluster.fact("KV transport") == "nixl"
        pids = {name: int(cluster.fact(f"{name} .* pid").split()[0]) for name in ("prefill-0", "decode-0", "decode-1")}
        assert {name: raylets.above(pid) == 0 for name, pid in pids.items()} == {
            "prefill-0": True, "decode-0": False, "decode-1": False,
        }  # fmt: skip
        assert raylets.above(pids["decode-0"]) != raylets.above(pids["decode-1"])
        before = await describe(cluster.fact("decode-1").split()[0], Trust(TOKEN))
        assert before is not None
        async with httpx.AsyncClient(base_url=cluster.url, timeout=END_S, trust_env=False) as http:
            await over_nixl(http)
            lost_at = raylets.above(pids["decode-1"])
            answers = await lose_under_load(raylets, lost_at, http, pids["decode-1"])
            assert any(route.startswith(f"decode={before.incarnation[:8]}") for _, route in answers)
            await asyncio.to_thread(cluster.wait_for, "decode-1 was lost")
            # What was under way is what it would have been; what came after went to the other worker alone.
            again = await asyncio.gather(*(complete(http, seed, TOKENS) for seed in range(STREAMS)))
            assert [text for text, _ in answers] == [text for text, _ in again]
            assert not any(before.incarnation[:8] in route for _, route in again)
            del raylets.nodes[lost_at]
            await asyncio.to_thread(raylets.add, decode=1)
            await asyncio.to_thread(cluster.wait_for, "decode-1 stands again")
            await full_capacity(http, before.incarnation[:8])
        listed = [group["labels"]["component"] for group in json.loads(targets.read_text())]
        assert sorted(listed) == ["decode", "decode", "prefill", "router"]
        children = of_tandem(raylets)
        assert len(children) == 4
        assert not any(TOKEN in " ".join(child.cmdline()) for child in children)
        cluster.process.send_signal(signal.SIGINT)
        assert cluster.process.wait(END_S) == 0
        wait_for(lambda: not any(runs(child.pid) for child in children), lambda: f"{of_tandem(raylets)}", END_S)
        assert "Traceback" not in cluster.said


async def over_nixl(http: httpx.AsyncClient) -> None:
    """Asks until a prompt was computed by the prefill worker."""
    for seed in range(100, 140):
        _, route = await complete(http, seed, 4)
        if "prefill=local" not in route:
            return
    pytest.fail("every prompt was computed locally")


async def lose_under_load(raylets: Raylets, at: int, http: httpx.AsyncClient, worker: int) -> list[tuple[str, str]]:
    """The answers that were being written when a raylet was killed; the worker under it may not outlive it."""
    begun = [asyncio.Event() for _ in range(STREAMS)]
    streams = [asyncio.create_task(complete(http, seed, TOKENS, begun[seed])) for seed in range(STREAMS)]
    await asyncio.gather(*(event.wait() for event in begun))
    raylets.lose(at)
    await asyncio.to_thread(wait_for, lambda: not runs(worker), lambda: "the worker outlives its raylet", END_S)
    return await asyncio.gather(*streams)


async def full_capacity(http: httpx.AsyncClient, gone: str) -> None:
    """Asks until three workers are known and both decode workers answer; the lost incarnation never does."""
    seen: set[str] = set()
    deadline = time.monotonic() + END_S
    seed = 200
    while len(seen) < 2 or (await metrics(http)).count("\ntandem_fleet_pages{") != 3:
        assert time.monotonic() < deadline, (seen, await metrics(http))
        routes = [route for _, route in await asyncio.gather(*(complete(http, seed + more, 8) for more in range(6)))]
        seen |= {route.partition(";")[0] for route in routes}
        seed += 6
    assert f"decode={gone}" not in seen


async def metrics(http: httpx.AsyncClient) -> str:
    return (await http.get("/metrics", headers={"authorization": f"Bearer {TOKEN}"})).text
