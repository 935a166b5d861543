"""Addresses that come and go: a list, a file that changes, and what the fleet makes of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from router.control import ControlPlane
from router.discovery.sources import FixedWorkers, WorkersFile
from tandem.cluster import Role
from tandem.config import RouterConfig
from tandem.errors import ConfigError, Fenced
from tandem.ports import free_ports
from tandem.testing.polling import eventually
from tandem.testing.workers import FakeWorker


class Names:
    """A roster that notes."""

    def __init__(self) -> None:
        self.now: set[str] = set()
        self.told: list[str] = []

    def follow(self, address: str, role: Role | None = None) -> None:
        assert address not in self.now
        self.now.add(address)
        self.told.append("+" + address)

    def unfollow(self, address: str) -> None:
        self.now.remove(address)
        self.told.append("-" + address)


async def test_a_list_is_told_once() -> None:
    roster = Names()
    await FixedWorkers(["b:2", "a:1", "b:2", "[::1]:3"], roster).start()
    assert roster.told == ["+b:2", "+a:1", "+[::1]:3"]


@pytest.mark.parametrize("address", ["a", "a:", ":1", "a:0", "a:65536", "a b:1", "http://a:1", "a:1x"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is not host:port"):
        FixedWorkers([address], Names())


async def test_a_file_is_followed(tmp_path: Path) -> None:
    path, roster = tmp_path / "workers.yaml", Names()
    path.write_text("workers: [a:1, b:2]")
    file = WorkersFile(path, roster)
    await file.start()
    for content, expected in (
        ("[a:1, b:2, c:3]", {"a:1", "b:2", "c:3"}),
        ("- c:3\n- d:4\n", {"c:3", "d:4"}),
        ('{"workers": ["broken"]}', {"c:3", "d:4"}),
        ("workers: 7", {"c:3", "d:4"}),
        ("a: [", {"c:3", "d:4"}),
        ("workers:\n", set()),
    ):
        path.write_text(content)
        file.look()
        assert roster.now == expected
    path.write_text("[e:5]")
    file.look()
    path.unlink()
    file.look()
    assert roster.now == {"e:5"}
    assert roster.told == ["+a:1", "+b:2", "+c:3", "+d:4", "-a:1", "-b:2", "-c:3", "-d:4", "+e:5"]


async def test_a_file_that_is_wrong_at_the_start_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "workers.yaml"
    path.write_text("workers: {a: 1}")
    with pytest.raises(ConfigError, match="must be a list of host:port"):
        await WorkersFile(path, Names()).start()


async def test_the_fleet_takes_workers_in_and_gives_those_that_are_unlisted_nothing_more(tmp_path: Path) -> None:
    path = tmp_path / "workers.yaml"
    async with FakeWorker(Role.DECODE) as first, FakeWorker(Role.DECODE) as second:
        path.write_text(f"[{first.info.address}]")
        async with ControlPlane(RouterConfig(control_port=0, workers_file=path)) as control:

            def usable() -> set[str]:
                return {view.incarnation for view in control.fleet.snapshot().decode if not view.draining}

            await eventually(lambda: usable() == {first.info.incarnation})
            path.write_text(f"[{second.info.address}]")
            await eventually(lambda: usable() == {second.info.incarnation})
            path.write_text(f"[{first.info.address}, {second.info.address}]")
            await eventually(lambda: usable() == {first.info.incarnation, second.info.incarnation})
            path.write_text(f"[{second.info.address}]")
            await eventually(lambda: usable() == {second.info.incarnation})
            await first.stop()
            await eventually(lambda: control.fleet.following() == {second.info.address})


async def test_a_worker_that_registers_is_held_back_where_a_source_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeWorker(Role.DECODE) as worker, ControlPlane(RouterConfig(control_port=0)) as control:
        fleet, address = control.fleet, worker.info.address

        def draining() -> list[bool]:
            return [view.draining for view in fleet.snapshot().decode]

        fleet.unfollow(address)
        fleet.register(worker.info, leaving=False)
        await eventually(draining)
        assert draining() == [True]
        fleet.follow(address, Role.DECODE)
        assert draining() == [False]
        fleet.unfollow(address)
        fleet.register(worker.info, leaving=False)
        assert draining() == [True]
        fleet.follow(address, Role.PREFILL)
        assert draining() == [True]
        mistake = "it is listed as a prefill worker and says that it is a decode worker"
        assert f"worker at {address} cannot be used: {mistake}" in caplog.messages
        with pytest.raises(Fenced, match=mistake):
            fleet.register(worker.info, leaving=False)


async def test_a_worker_of_another_role_than_listed_is_not_taken_in(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeWorker(Role.DECODE) as worker, ControlPlane(RouterConfig(control_port=0)) as control:
        control.fleet.follow(worker.info.address, Role.PREFILL)
        await eventually(lambda: "it is listed as a prefill worker" in caplog.text)
        assert control.fleet.snapshot().decode == control.fleet.snapshot().prefill == ()
        control.fleet.follow(worker.info.address, Role.DECODE)
        await eventually(lambda: control.fleet.snapshot().decode)


async def test_an_address_that_is_listed_again_while_its_link_ends_is_looked_at() -> None:
    (port,) = free_ports(1)
    async with ControlPlane(RouterConfig(control_port=0)) as control:
        fleet, address = control.fleet, f"127.0.0.1:{port}"
        fleet.follow(address)
        task = fleet._tasks[address]
        fleet.unfollow(address)
        while not task.done():
            await asyncio.sleep(0)
        fleet.follow(address)
        async with FakeWorker(Role.DECODE, port) as worker:
            await eventually(
                lambda: [view.info.incarnation for view in fleet.snapshot().decode] == [worker.info.incarnation]
            )
