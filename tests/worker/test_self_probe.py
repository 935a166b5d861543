"""A worker is ready only while a page really travels over its transport."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from decode_worker.services import build
from kvtransfer.backends import Chosen
from kvtransfer.backends.inproc import InprocBackend
from kvtransfer.backends.nixl import NixlBackend
from kvtransfer.backends.tcp import TcpBackend
from tandem.cluster import Role
from tandem.config import DecodeConfig
from tandem.errors import Unavailable
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.wire.probe import describe
from tandem.worker import self_probe
from tandem.worker.process import WorkerProcess
from tandem.worker.self_probe import LAST, SelfProbe, send_page

KINDS: list[Callable[[], Any]] = [InprocBackend, TcpBackend]
if importlib.util.find_spec("nixl_cu12") is not None:
    KINDS.append(NixlBackend)


class Faulty(InprocBackend):
    """Loses, changes, holds up or refuses what it is given, when told."""

    def __init__(self) -> None:
        super().__init__()
        self.fault = ""
        self.sent = 0
        self.released = threading.Event()

    def link(self, me: str, peer: str, staging: Any) -> Any:
        if self.fault == "refuse":
            raise OSError("no such device")
        made: Any = super().link(me, peer, staging)
        post = made.post

        def faulty(view: Any, offset: int, manifest: bytes) -> Any:
            self.sent += 1
            if self.fault == "lose":
                return None
            if self.fault == "hang":
                self.released.wait(20)
            if self.fault == "change":
                view = view.copy()
                view[100] ^= 1
            if self.fault == "tear":
                view = view[:100]
            return post(view, offset, b"other" if self.fault == "mislabel" else manifest)

        made.post = faulty
        if self.fault == "lose":
            made.poll = lambda handle: True
        return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_travels_over_each_transport(kind: Callable[[], Any]) -> None:
    send_page(kind())


@pytest.mark.parametrize("fault", ["refuse", "lose", "change", "tear", "mislabel"])
async def test_a_page_that_does_not_arrive_is_told(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_probe.send_page, "__defaults__", (0.05,))
    transport = Faulty()
    transport.fault = fault
    probe = SelfProbe(transport, 60.0, lambda: None, lambda reason: None)
    with pytest.raises(Unavailable, match="the KV transport inproc moves no page: "):
        await probe.check()
    assert not probe.ready
    transport.fault = ""
    await probe.check()
    assert probe.ready


async def test_a_transport_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_probe, "LIMIT_S", 0.02)
    transport = Faulty()
    transport.fault = "hang"
    probe = SelfProbe(transport, 60.0, lambda: None, lambda reason: None)
    with pytest.raises(Unavailable, match="TimeoutError"):
        await probe.check()
    transport.released.set()
    while any(thread.name == "transfer-probe" for thread in threading.enumerate()):
        await asyncio.sleep(0.01)


async def test_it_is_not_ready_meanwhile_and_gives_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    transport, told, given_up = Faulty(), asyncio.Queue[bool](), asyncio.Queue[str]()
    counted = Counter("probes", "Probes", ["outcome"], registry=CollectorRegistry())
    probe = SelfProbe(
        transport,
        0.001,
        lambda: told.put_nowait(probe.ready),
        given_up.put_nowait,
        retry_s=0.001,
        counted=counted,
    )
    await probe.check()
    running = asyncio.create_task(probe.run())
    transport.fault = "change"
    assert await told.get() is False
    transport.fault = ""
    assert await told.get() is True
    transport.fault = "refuse"
    assert await told.get() is False
    assert await given_up.get() == f"{LAST} pages in a row did not arrive over the KV transport inproc"
    assert given_up.empty() and not probe.ready
    lost, arrived = (counted.labels(outcome)._value.get() for outcome in ("lost", "arrived"))
    assert lost >= LAST + 1 and arrived >= 2
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = CheckpointSpec(layers=1, hidden=32, heads=2, kv_heads=1, vocab=300, max_positions=256)
    return make_checkpoint(tmp_path_factory.mktemp("models") / "small", spec)


async def drains(made: WorkerProcess) -> bool:
    """What a router would be told."""
    updates = made.publisher.watch()
    status = (await anext(updates)).status
    await updates.aclose()  # type: ignore[attr-defined]
    assert status is not None
    return status.draining


def worker(model: Path, transport: Faulty, **settings: Any) -> WorkerProcess:
    config = DecodeConfig(model=str(model), kv_mib=8, threads=1, **settings)
    made = build(config, Chosen(transport, (transport,), "as set"))
    return WorkerProcess(config, Role.DECODE, transport.name, made, transport)


async def test_the_worker_says_so_and_recovers(small_model: Path) -> None:
    transport = Faulty()
    made = worker(small_model, transport, probe_s=0.01)
    await made.start()
    try:
        assert await describe(made.info.address) is not None
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{made.info.metrics_port}") as client:

            async def until(ready: bool) -> None:
                while await drains(made) is ready or not await says(ready):
                    await asyncio.sleep(0.01)

            async def says(ready: bool) -> bool:
                return (await client.get("/ready")).status_code == (200 if ready else 503)

            await until(ready=True)
            transport.fault = "lose"
            await until(ready=False)
            assert (await client.get("/health")).status_code == 200
            transport.fault = ""
            await until(ready=True)
    finally:
        await made.stop()


@pytest.mark.parametrize("every_s", [60.0, 0.0])
async def test_a_worker_whose_transport_is_broken_does_not_start(every_s: float, small_model: Path) -> None:
    transport = Faulty()
    transport.fault = "refuse"
    made = worker(small_model, transport, probe_s=every_s)
    if every_s:
        with pytest.raises(Unavailable, match="moves no page: no such device"):
            await made.start()
        assert not made.metrics.ready()
        await made.services.close()
        await made.thread.stop()
        await made.server.stop(0)
        made.metrics.close()
    else:
        await made.start()
        assert made.metrics.ready() and transport.sent == 0
        await made.stop()
