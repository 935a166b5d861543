"""`tandem doctor --cluster`: what is said of a cluster in which something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from tandem.cli.app import run
from tandem.cli.doctor import cluster
from tandem.cli.doctor.cluster import examine_cluster
from tandem.cli.doctor.report import Check, State
from tandem.cluster import Role
from tandem.config import ProcessConfig
from tandem.testing.workers import fake_info
from tandem.wire.probe import Answered, Measured

P, D = "127.0.0.1:1001", "127.0.0.1:1002"
MIB = 1 << 20


class World:
    """A cluster of one router, one prefill and one decode worker, until a test changes it."""

    def __init__(self) -> None:
        infos = {P: fake_info(Role.PREFILL, address=P), D: fake_info(Role.DECODE, address=D)}
        self.answers = {address: Answered(address, info, "root") for address, info in infos.items()}
        self.silent: dict[str, str] = {}
        self.known = [self.entry(info.incarnation, address, info.role.value) for address, info in infos.items()]
        self.fleets = {"http://r": self.fleet()}
        self.measured = [Measured(P, D, "nixl", 8 * MIB, 5, 0.01, 0.5)]
        self.page: Callable[[str], httpx.Response | None] = lambda address: dated(0)

    @staticmethod
    def entry(incarnation: str, address: str, role: str, **more: Any) -> dict[str, Any]:
        named = {"incarnation": incarnation, "address": address, "role": role, "metrics": f"{address}9"}
        return {**named, "state": "ready", "running": 0, "waiting": 0, **more}

    def fleet(self, **more: Any) -> dict[str, Any]:
        return {"workers": self.known, "policy": "cost", "hash_root": "root", **more}

    def change(self, address: str, **fields: Any) -> None:
        self.answers[address] = replace(self.answers[address], info=replace(self.answers[address].info, **fields))


def dated(seconds: float, status: int = 200) -> httpx.Response:
    """An answer of a machine whose clock is ahead by so much."""
    answer = httpx.Response(status, headers={"date": format_datetime(datetime.now(UTC) + timedelta(seconds=seconds))})
    answer.elapsed = timedelta(0)
    return answer


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()

    class Client:
        def __init__(self, router: str, config: ProcessConfig) -> None:
            self.url = f"http://{router}"

        def fleet(self) -> dict[str, Any]:
            return made.fleets[self.url]

        def get(self, path: str) -> httpx.Response:
            return dated(0)

        def worker_page(self, address: str, path: str = "/metrics") -> httpx.Response | None:
            return made.page(address)

    async def ask(addresses: Sequence[str], trust: object) -> tuple[dict[str, Answered], dict[str, str]]:
        return {each: made.answers[each] for each in addresses if each in made.answers}, made.silent

    async def measure(pairs: Sequence[tuple[Answered, Answered]], trust: object) -> list[Measured]:
        assert all((a.info.role, b.info.role) == (Role.PREFILL, Role.DECODE) for a, b in pairs)
        return made.measured

    monkeypatch.setattr(cluster, "FleetClient", Client)
    monkeypatch.setattr(cluster, "ask_workers", ask)
    monkeypatch.setattr(cluster, "measure_pairs", measure)
    return made


def wrong(*routers: str) -> dict[str, Check]:
    """All lines that are not fine."""
    groups = examine_cluster(routers or ("r",), ProcessConfig())
    return {check.name: check for group in groups for check in group.checks if check.state is not State.OK}


def test_a_sound_cluster_has_no_complaint(world: World) -> None:
    assert wrong() == {}


def test_a_silent_and_a_draining_worker(world: World) -> None:
    world.known[0]["state"], world.known[1]["state"] = "silent", "draining"
    found = wrong()
    assert {f"prefill {P}", f"decode {D}"} == set(found)
    assert "its transport lost a page" in found[f"decode {D}"].fix


def test_a_worker_that_is_not_reached(world: World) -> None:
    del world.answers[D]
    world.silent[D] = f"no worker answers at {D}: connection refused"
    world.page = lambda address: None
    found = wrong()
    assert found[f"decode {D}"] == Check(
        f"decode {D}",
        f"no worker answers at {D}: connection refused",
        State.ERROR,
        "is it running, and may this machine reach its gRPC port? TANDEM_TOKEN or --tls-* must be the cluster's"
        "; `tandem up` draws its own: start it with TANDEM_TOKEN set",
    )
    assert found[f"metrics {D}9"].state is State.WARNING


def lines(*names: str) -> dict[str, tuple[State, str]]:
    groups = examine_cluster(("r",), ProcessConfig())
    return {check.name: (check.state, check.found) for group in groups for check in group.checks if check.name in names}


def test_where_no_worker_answers_nothing_of_them_is_said_to_be_fine(world: World) -> None:
    world.silent, world.answers, world.measured = {P: "another token", D: "another token"}, {}, []
    names = ("model", "KV layout", "cluster key", "page size", "transport", "pairs")
    assert lines(*names) == dict.fromkeys(names, (State.WARNING, "not checked: no worker answered"))


@pytest.mark.parametrize(("lost", "role"), [(P, "prefill"), (D, "decode")])
def test_pairs_of_which_one_end_is_silent(lost: str, role: str, world: World) -> None:
    del world.answers[lost]
    world.silent[lost], world.measured = "connection refused", []
    assert lines("pairs") == {"pairs": (State.WARNING, f"not checked: no {role} worker answered")}


def test_a_cluster_without_prefill_workers(world: World) -> None:
    world.fleets["http://r"] = world.fleet(workers=world.known[1:])
    world.measured = []
    assert lines("pairs") == {"pairs": (State.OK, "none: decode workers prefill locally")}
    assert wrong() == {}


def test_a_metrics_port_where_something_else_answers(world: World) -> None:
    world.page = lambda address: dated(0, 404 if address.startswith(D) else 200)
    (check,) = wrong().values()
    assert (check.name, check.found, check.state) == (f"metrics {D}9", "answers 404", State.WARNING)


def test_a_restarted_worker_and_a_stale_address(world: World) -> None:
    world.change(D, incarnation="f" * 32)
    assert "ffffffff answers" in wrong()[f"decode {D}"].found
    world.known.append(World.entry("f" * 32, D, "decode"))
    assert wrong()[D].found == "2 incarnations are known there"


def test_one_worker_under_two_addresses(world: World) -> None:
    other = "127.0.0.2:1002"
    world.answers[other] = replace(world.answers[D], address=other)
    world.known.append(World.entry("e" * 32, other, "decode"))
    name = world.answers[D].info.incarnation[:8]
    assert wrong()[name].found == "answers at 2 addresses"


def test_clocks_that_differ(world: World) -> None:
    world.page = lambda address: dated(60 if address.startswith(D) else 0)
    found = wrong()
    assert list(found) == [f"clock of {D}"]
    assert found[f"clock of {D}"].found in ("59 s ahead of this one", "60 s ahead of this one")


@pytest.mark.parametrize(
    ("line", "fields", "state"),
    [
        ("KV layout", {"kv_dtype": "float16"}, State.ERROR),
        ("page size", {"page_size": 64}, State.WARNING),
        ("model", {"model": replace(fake_info(Role.DECODE).model, fingerprint="other")}, State.ERROR),
    ],
)
def test_workers_that_do_not_agree(line: str, fields: dict[str, Any], state: State, world: World) -> None:
    world.change(D, **fields)
    found = wrong()
    assert (list(found), found[line].state) == ([line], state)
    assert D in found[line].found and P in found[line].found


def test_a_cluster_key_that_differs(world: World) -> None:
    world.fleets["http://r"] = world.fleet(hash_root="another")
    assert wrong()["cluster key"].found == f"differs: another: http://r; root: {P}, {D}"


def test_a_sender_without_the_receivers_transport(world: World) -> None:
    world.change(P, transport="tcp")
    world.change(D, transport="nixl")
    assert "install it there" in wrong()["transport"].fix
    world.change(P, transport="nixl")
    world.change(D, transport="tcp")  # every worker can send over TCP
    assert wrong() == {}


def test_routers_that_know_different_workers(world: World) -> None:
    world.fleets["http://s"] = world.fleet(workers=world.known[1:])
    assert wrong("r", "s")["routers' workers"].fix.startswith("name every router's control port")


def test_a_slow_pair_and_a_broken_one(world: World) -> None:
    fast, slow = Measured(P, D, "nixl", 8 * MIB, 5, 0.01), Measured(P, D + "3", "nixl", 8 * MIB, 5, 0.2)
    world.measured = [fast, fast, slow, Measured(P, "z", error="no handshake")]
    found = wrong()
    assert found[f"{P} -> {D}3"].state is State.WARNING
    assert "others do 800 MiB/s" in found[f"{P} -> {D}3"].fix
    assert (found[f"{P} -> z"].state, found[f"{P} -> z"].found) == (State.ERROR, "no handshake")


def test_a_router_without_decode_workers(world: World) -> None:
    world.fleets["http://r"] = world.fleet(workers=world.known[:1])
    world.measured = []
    assert wrong()["http://r"].state is State.ERROR


def test_no_router_is_one_error_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--cluster", "--json", "--router", "127.0.0.1:9"]) == 1
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    (check,) = group["checks"]
    assert check["fix"] == "start it, or give its HTTP address HOST:PORT"


@pytest.mark.parametrize("arguments", [["--router", "a:1"], ["--cluster", "--model", "demo"]])
def test_flags_that_do_not_go_together(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"tandem: {arguments[-2]}: it is ")
