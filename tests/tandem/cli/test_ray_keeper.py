"""What becomes of a process on Ray that is lost, refused, slow or told to end, with actors that follow a script."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

import tandem
from tandem.cli import warm_up
from tandem.cli.on_ray import keeper as module
from tandem.cli.on_ray.keeper import MAX_DELAY_S, Keeper, delay
from tandem.cli.on_ray.processes import Commands, Unit
from tandem.cli.options import build
from tandem.cli.up import MAX_RESTARTS
from tandem.cluster import Role, WorkerInfo
from tandem.config import UpConfig
from tandem.errors import ConfigError
from tandem.testing.workers import fake_info

LIMIT_S = 20.0
PLACE = {"host": "10.0.0.2", "version": tandem.__version__, "port": 7, "http_port": 8000, "refusal": ""}
LOST = RayActorError(error_msg="The actor died\nOSError: no")
REFUSED = {**PLACE, "refusal": "no free port"}
OLDER = {"host": "10.0.0.3", "version": "0.0.1"}
"""What another version answers may have other fields."""


def remote(call: Callable[..., Awaitable[Any]]) -> Any:
    return SimpleNamespace(remote=call)


class Actor:
    """place: what it answers. end: how its process ends; None where it runs until the test ends it by `ended`."""

    def __init__(self, place: dict[str, Any] | Exception = PLACE, end: int | Exception | None = None) -> None:
        self._place, self._end = place, end
        self.ended = asyncio.Event()
        self.place, self.run = remote(self._answer), remote(self._work)
        self.ready, self.pid = remote(self._ready), remote(self._pid)

    async def _answer(self, *_: Any) -> dict[str, Any]:
        if isinstance(self._place, Exception):
            raise self._place
        return self._place

    async def _work(self, *_: Any) -> tuple[int, str]:
        if self._end is None:
            await self.ended.wait()
            raise LOST
        if isinstance(self._end, Exception):
            raise self._end
        return self._end, "tandem: its last line"

    async def _ready(self, _: str) -> bool:
        return True

    async def _pid(self) -> int:
        return 5


@dataclass
class Cluster:
    """Stands in for Ray, its scheduling and the launcher."""

    actors: deque[Actor] = field(default_factory=deque)
    said: list[str] = field(default_factory=list)
    failed: list[tuple[str, int]] = field(default_factory=list)
    killed: list[Actor] = field(default_factory=list)
    local: bool = False

    @property
    def ray(self) -> Any:
        return self

    def kill(self, actor: Actor, *, no_restart: bool) -> None:
        assert no_restart
        self.killed.append(actor)

    async def worker(self, _: Unit) -> Actor:
        return self.actors.popleft()

    router = worker

    def say(self, text: str) -> None:
        self.said.append(text)

    def fail(self, reason: str, status: int = 1) -> None:
        self.failed.append((reason, status))

    def task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(repr(error))


async def met(*_: Any) -> WorkerInfo:
    return fake_info(Role.DECODE, address="10.0.0.2:7", pid=9, metrics_port=6)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESTART_DELAY_S", 0.0)
    monkeypatch.setattr(warm_up, "POLL_S", 0.0)
    monkeypatch.setattr(module, "describe", met)


def kept(cluster: Cluster, actors: Sequence[Actor], *, stands: bool = True, **given: Any) -> tuple[Keeper, Unit]:
    """A keeper of one decode worker, which gets these actors one after the other."""
    config = build(UpConfig, {"model": "demo", "on": "ray", "token": "a-secret-of-sixteen-characters", **given})
    commands = Commands(config, {"prefill": {"CPU": 1.0}, "decode": {"CPU": 1.0}})
    connection: Any = cluster
    found = Keeper(config, connection, cluster, commands, cluster)
    found.workers, found.stands = [Unit("decode-0", "decode", 0)], stands
    cluster.actors.extend(actors)
    return found, found.workers[0]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0)


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_list_that_cannot_be_written_is_said_once_and_ends_nothing(tmp_path: Path) -> None:
    cluster, folder = Cluster(), tmp_path / "lists"
    folder.mkdir()
    file = folder / "targets.json"
    first, second, third = Actor(), Actor(), Actor()
    keeper, unit = kept(cluster, [first, second, third], stands=False, ray_targets=file)
    folder.rmdir()
    task = asyncio.create_task(keeper.keep(unit))
    async with asyncio.timeout(LIMIT_S):
        await keeper.all_stand(lambda _: None)
    keeper.stands = True
    first.ended.set()
    await until(lambda: unit.actor is second and unit.lost_at is None)
    said = f"--ray-targets: {file} cannot be written and is out of date: No such file or directory"
    assert [line for line in cluster.said if "targets" in line] == [said]
    folder.mkdir()
    second.ended.set()
    await until(lambda: unit.actor is third and unit.lost_at is None)
    assert len(json.loads(file.read_text())) == 1
    file.unlink()
    folder.rmdir()
    third.ended.set()
    await until(lambda: not cluster.actors and unit.actor is None)
    assert [line for line in cluster.said if "targets" in line] == [said, said]
    assert cluster.failed == []
    await end(task)


@pytest.mark.parametrize("forget_s", [0.0, 600.0])
async def test_restarts_are_forgotten_by_a_process_that_has_lived_long(
    forget_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FORGET_S", forget_s)
    cluster = Cluster()
    deaths = MAX_RESTARTS + 2
    keeper, unit = kept(cluster, [*(Actor(end=1) for _ in range(deaths)), Actor()])
    task = asyncio.create_task(keeper.keep(unit))
    await until(lambda: (not cluster.actors and unit.pid) or task.done())
    if forget_s:
        assert cluster.failed == [("decode-0 ended with status 1", 1)]
    else:
        assert (cluster.failed, unit.restarts) == ([], 1)
    await end(task)


async def test_what_refuses_a_replacement_is_said_and_tried_again() -> None:
    cluster = Cluster()
    bad = [Actor(end=LOST), Actor(REFUSED), Actor(REFUSED), Actor(OLDER), Actor(LOST)]
    keeper, unit = kept(cluster, [*bad, Actor()])
    task = asyncio.create_task(keeper.keep(unit))
    await until(lambda: unit.pid or task.done())
    assert cluster.failed == [] and cluster.killed == bad and unit.restarts == 0
    assert cluster.said[:-1] == [
        "decode-0 was lost with its actor: OSError: no; starting it again",
        "decode-0 on 10.0.0.2: no free port; starting it again",
        f"decode-0 on 10.0.0.3: Tandem 0.0.1 is installed there, {tandem.__version__} here; starting it again",
        "decode-0 was lost with its actor: OSError: no; starting it again",
    ]
    assert cluster.said[-1].startswith("decode-0 stands again, at 10.0.0.2:7, ")
    await end(task)


@pytest.mark.parametrize("refusal", [REFUSED, OLDER])
async def test_a_start_ends_with_what_refuses_it(refusal: dict[str, Any]) -> None:
    keeper, unit = kept(Cluster(), [Actor(refusal)], stands=False)
    with pytest.raises(ConfigError, match=r"^decode-0 on 10\.0\.0\.\d: "):
        await keeper.keep(unit)


@pytest.mark.parametrize("stands", [True, False])
async def test_a_slow_replacement_is_waited_for(monkeypatch: pytest.MonkeyPatch, stands: bool) -> None:
    silent = deque([None, None, None])

    async def slow(*_: Any) -> Any:
        return silent.popleft() if silent else await met()

    monkeypatch.setattr(module, "describe", slow)
    monkeypatch.setattr(warm_up, "START_LIMIT_S", 0.0)
    cluster = Cluster()
    keeper, unit = kept(cluster, [Actor()], stands=stands)
    task = asyncio.create_task(keeper.keep(unit))
    if stands:
        await until(lambda: unit.pid or cluster.failed)
        assert cluster.said == ["decode-0: did not answer within 0 s; waiting on"]
        assert (unit.pid, cluster.failed) == (9, [])
    else:
        await until(lambda: cluster.failed)
        assert cluster.failed == [("decode-0: did not answer within 0 s", 1)]
    await end(task)


async def test_a_worker_that_was_told_to_end_is_not_started_again(tmp_path: Path) -> None:
    cluster, file = Cluster(), tmp_path / "targets.json"
    told = Actor(end=0)
    keeper, unit = kept(cluster, [told, Actor()], ray_targets=file)
    unit.pid, unit.info = 9, await met()
    keeper.list_targets()
    assert len(json.loads(file.read_text())) == 1
    async with asyncio.timeout(LIMIT_S):
        await keeper.keep(unit)
    assert cluster.said == ["decode-0 was told to end; it is not started again"]
    assert (cluster.failed, cluster.killed, unit.restarts, len(cluster.actors)) == ([], [told], 0, 1)
    assert json.loads(file.read_text()) == []


async def test_status_0_of_a_router_or_before_the_cluster_stands_is_no_drain() -> None:
    cluster = Cluster()
    keeper, unit = kept(cluster, [Actor(end=0)], stands=False)
    await keeper.keep(unit)
    assert cluster.failed == [("decode-0 ended with status 0", 1)]
    cluster = Cluster()
    keeper, _ = kept(cluster, [Actor(end=0), Actor()])
    router = Unit("router", "router", 0)
    task = asyncio.create_task(keeper.keep(router))
    await until(lambda: router.pid or task.done())
    assert cluster.said[0] == "router ended with status 0; starting it again" and cluster.failed == []
    await end(task)


async def test_actors_that_are_lost_in_a_row_are_made_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def recorded(losses: int) -> float:
        asked.append(losses)
        return 0.0

    monkeypatch.setattr(module, "delay", recorded)
    cluster, standing = Cluster(), Actor()
    keeper, unit = kept(
        cluster, [*(Actor(LOST) for _ in range(4)), standing, *(Actor(LOST) for _ in range(3)), Actor()]
    )
    task = asyncio.create_task(keeper.keep(unit))
    await until(lambda: unit.actor is standing and unit.pid)
    standing.ended.set()
    await until(lambda: len(cluster.said) == 4)
    assert asked == [0, 1, 2, 3, 0, 1, 2, 3]
    again = "decode-0 was lost with its actor: OSError: no; starting it again"
    assert [line.partition(", at")[0] for line in cluster.said] == [again, "decode-0 stands again"] * 2
    await end(task)


def test_delays_double_up_to_a_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESTART_DELAY_S", 0.5)
    assert [delay(losses) for losses in range(8)] == [0.5, 1, 2, 4, 8, 16, MAX_DELAY_S, MAX_DELAY_S]
    assert delay(100_000) == MAX_DELAY_S
