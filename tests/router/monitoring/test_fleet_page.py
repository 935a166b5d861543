"""`/metrics/fleet`: what a router tells of every worker it knows."""

from __future__ import annotations

import json

from router.cache.prefix_index import PrefixIndex
from router.monitoring.fleet_page import fleet_page
from router.workers.fleet import Fleet
from router.workers.fleet_link import Worker
from tandem.cluster import MoveStat, Role, Status, WorkerUpdate
from tandem.config import RouterConfig
from tandem.testing.workers import fake_info
from tandem.trust import Trust


def a_fleet() -> tuple[Fleet, dict[Role, Worker]]:
    fleet = Fleet("r" * 32, PrefixIndex(1000, 60.0, lambda: 0.0), 10.0, lambda: 0.0)
    workers = {}
    for number, role in enumerate(Role, start=1):
        info = fake_info(role, address=f"[::1]:{number}", metrics_port=9)
        workers[role] = fleet.join(info, Trust().channel(info.address))
    return fleet, workers


def page(fleet: Fleet) -> dict[str, object]:
    said: dict[str, object] = json.loads(fleet_page(RouterConfig(), fleet))
    return said


async def test_workers_are_silent_then_ready_then_draining() -> None:
    fleet, workers = a_fleet()
    decode = workers[Role.DECODE]

    def shown() -> dict[str, object]:
        listed = page(fleet)["workers"]
        assert isinstance(listed, list) and len(listed) == 2
        return next(each for each in listed if each["role"] == "decode")

    assert shown()["state"] == "silent"
    status = Status(decode.incarnation, running=3, waiting=2, queued_tokens=70, free_pages=5, total_pages=9)
    fleet.update(decode, WorkerUpdate(decode.incarnation, 0, (), status, snapshot=True))
    assert shown() == {
        "incarnation": decode.incarnation,
        "address": "[::1]:2",
        "role": "decode",
        "state": "ready",
        "model": decode.info.model.name,
        "transport": "tcp",
        "metrics": "[::1]:9",
        "running": 3,
        "waiting": 2,
        "queued_tokens": 70,
        "free_pages": 5,
        "total_pages": 9,
    }
    decode.leaving = True
    assert shown()["state"] == "draining"
    fleet.suspend(decode, "its connection broke")
    assert shown()["state"] == "silent"
    for worker in workers.values():
        await worker.channel.close()


async def test_pairs_and_the_hash_root() -> None:
    fleet, workers = a_fleet()
    prefill, decode = (workers[role].incarnation for role in (Role.PREFILL, Role.DECODE))
    moves = (MoveStat(prefill, decode, "nixl", bytes=7, seconds=0.5, tickets=2, failures=1),)
    status = Status(decode, moves=moves)
    fleet.update(workers[Role.DECODE], WorkerUpdate(decode, 0, (), status, snapshot=True))
    said = page(fleet)
    assert said["pairs"] == [
        {
            "sender": prefill,
            "receiver": decode,
            "transport": "nixl",
            "bytes": 7,
            "seconds": 0.5,
            "tickets": 2,
            "failures": 1,
        }
    ]
    assert len(str(said["hash_root"])) == 64
    other = json.loads(fleet_page(RouterConfig(cluster_key="another"), fleet))
    assert other["hash_root"] != said["hash_root"]
    for worker in workers.values():
        await worker.channel.close()
