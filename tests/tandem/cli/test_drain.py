"""`tandem drain`: which worker is meant, who may say so, and what is said when it cannot be done."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from aiohttp import web
from pydantic import SecretStr
from rich.console import Console

from tandem.cli import drain
from tandem.cli.drain import REFUSALS, drained
from tandem.cluster import Role, WorkerInfo
from tandem.config import DrainConfig
from tandem.errors import BadRequest, ConfigError, Fenced, Unavailable
from tandem.ports import free_ports
from tandem.testing.workers import FakeWorker, fake_info
from tandem.trust import Trust
from tandem.wire import probe

SECRET = "secret-of-sixteen"
READERS = "of-metrics-readers"


@dataclass
class Fleet:
    """A router's fleet page, and the workers on it."""

    router: str
    first: FakeWorker
    second: FakeWorker
    listed: list[dict[str, str]]


@asynccontextmanager
async def fleet() -> AsyncIterator[Fleet]:
    async with (
        FakeWorker(Role.DECODE, incarnation="abcd1111") as first,
        FakeWorker(Role.PREFILL, incarnation="abcd2222") as second,
    ):
        listed = [
            {"incarnation": each.info.incarnation, "role": each.info.role.value, "address": each.info.address}
            for each in (first, second)
        ]

        async def page(request: web.Request) -> web.Response:
            if request.headers.get("authorization") not in (f"Bearer {SECRET}", f"Bearer {READERS}"):
                return web.Response(status=401)
            return web.json_response({"object": "tandem.fleet", "workers": listed})

        async def other(_: web.Request) -> web.Response:
            return web.Response(text="<html>", content_type="text/html")

        app = web.Application()
        app.router.add_get("/metrics/fleet", page)
        app.router.add_get("/other/metrics/fleet", other)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield Fleet(f"127.0.0.1:{runner.addresses[0][1]}", first, second, listed)
        finally:
            await runner.cleanup()


async def told(worker: str, router: str = "127.0.0.1:1", token: str | None = SECRET, readers: str | None = None) -> str:
    """What the command says."""
    out = io.StringIO()
    secret, reading = (None if each is None else SecretStr(each) for each in (token, readers))
    config = DrainConfig(worker=worker, router=router, token=secret, metrics_token=reading)
    await drained(config, Console(file=out, soft_wrap=True, highlight=False))
    return out.getvalue()


async def test_a_worker_is_named_by_its_address_without_any_router() -> None:
    async with fleet() as made:
        address = made.first.info.address
        assert await told(address) == (
            f"decode worker abcd1111 at {address} takes nothing more; what is under way gets 1 s\nit has ended\n"
        )
        assert (made.first.drained, made.second.drained) == (["abcd1111"], [])


@pytest.mark.parametrize("scheme", ["", "http://"])
async def test_a_worker_is_named_by_its_incarnation(scheme: str) -> None:
    async with fleet() as made:
        assert "prefill worker abcd2222" in await told("abcd2", scheme + made.router)
        assert (made.first.drained, made.second.drained) == ([], ["abcd2222"])


@pytest.mark.parametrize("last", ["another", "nobody"])
async def test_one_that_is_slow_or_missed_for_a_moment_has_not_ended(
    last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, slow, refused = fake_info(Role.DECODE), probe.Silent("late"), Unavailable("refused")
    ends = [fake_info(Role.DECODE)] if last == "another" else [refused] * REFUSALS
    some = [refused] * (REFUSALS - 1)
    answers: list[WorkerInfo | Unavailable] = [here, slow, here, *some, slow, *some, here, *some, here, *ends]

    async def identify(address: str, trust: Trust) -> WorkerInfo:
        answer = answers.pop(0)
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    async def told_to(worker: WorkerInfo, trust: Trust) -> float:
        return 1.0

    monkeypatch.setattr(probe, "identify", identify)
    monkeypatch.setattr(probe, "drain", told_to)
    monkeypatch.setattr(drain, "POLL_S", 0.0)
    assert (await told(here.address)).endswith("it has ended\n")
    assert answers == []


async def test_a_worker_that_does_not_answer_in_time_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def late(self: FakeWorker, request: object, context: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(FakeWorker, "Describe", late)
    monkeypatch.setattr(probe, "ANSWER_S", 0.2)
    async with FakeWorker(Role.DECODE) as worker:
        with pytest.raises(probe.Silent, match=r"^no worker answers at "):
            await probe.identify(worker.info.address)


async def test_what_names_no_worker_or_several_ends_none() -> None:
    async with fleet() as made:
        for name, fault in (("abcd", "more than one incarnation"), ("ffff", "no worker's incarnation")):
            said = f"^WORKER is {name}; {fault} begins so: abcd1111 .decode .*, abcd2222 .prefill "
            with pytest.raises(BadRequest, match=said):
                await told(name, made.router)
        with pytest.raises(ConfigError, match=r"^WORKER is 'abc'; give host:port, or at least 4 characters"):
            await told("abc", made.router)
        assert made.first.drained == made.second.drained == []


async def test_who_cannot_be_asked_is_named() -> None:
    (port,) = free_ports(1)
    with pytest.raises(Unavailable, match=f"^no worker answers at 127.0.0.1:{port}: "):
        await told(f"127.0.0.1:{port}")
    with pytest.raises(Unavailable, match=f"^--router: no router answers at http://127.0.0.1:{port}: "):
        await told("abcd", f"127.0.0.1:{port}")
    async with fleet() as made:
        with pytest.raises(ConfigError, match="needs a key: set TANDEM_API_KEY"):
            await told("abcd", made.router, token=None)
        with pytest.raises(BadRequest, match="/other/metrics/fleet is no JSON; is it a Tandem router"):
            await told("abcd", f"{made.router}/other")


async def test_who_may_read_metrics_may_ask_a_router() -> None:
    async with fleet() as made:
        assert "prefill worker abcd2222" in await told("abcd2", made.router, token=None, readers=READERS)
        assert made.second.drained == ["abcd2222"]


async def test_a_worker_that_was_started_again_meanwhile_is_left_alone() -> None:
    async with fleet() as made:
        made.listed[0]["incarnation"] = "eeee9999"
        with pytest.raises(Fenced, match=f"^eeee9999 is no more; abcd1111 answers at {made.first.info.address}$"):
            await told("eeee", made.router)
        assert made.first.drained == []


async def test_a_wrong_token_is_named() -> None:
    server = Trust(SECRET).server()
    address = f"127.0.0.1:{Trust().listen(server, '127.0.0.1:0')}"
    await server.start()
    try:
        with pytest.raises(ConfigError, match=f"^TANDEM_TOKEN: {address} knows another one; give its cluster's$"):
            await told(address, token="another-of-sixteen")
    finally:
        await server.stop(None)
