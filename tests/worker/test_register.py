"""A worker registers at every router, renews its lease, survives a router's restart, and says goodbye."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from tandem.cluster import Role, WorkerInfo
from tandem.testing.kv import small_layout
from tandem.types import ModelInfo
from tandem.wire.v1 import worker_pb2, worker_pb2_grpc
from tandem.worker.register import Registrar

ME = WorkerInfo(
    "w" * 32, Role.DECODE, "host:1", ModelInfo("m", "/m", "f", 10, 100), small_layout(), "bfloat16", 16, 4, 512, "tcp"
)


@dataclass
class FakeRegistry(worker_pb2_grpc.RegistryServicer):
    """A router's registry that remembers its calls."""

    lease_s: float = 0.02
    calls: list[worker_pb2.RegisterRequest] = field(default_factory=list)
    prefill: list[worker_pb2.WorkerAddress] = field(default_factory=list)

    async def Register(self, request: worker_pb2.RegisterRequest, context: Any) -> worker_pb2.RegisterReply:
        self.calls.append(request)
        return worker_pb2.RegisterReply(router_id="r", lease_s=self.lease_s, prefill=self.prefill)

    async def called(self, times: int) -> None:
        while len(self.calls) < times:
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(registry: FakeRegistry, port: int = 0) -> AsyncIterator[str]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    worker_pb2_grpc.add_RegistryServicer_to_server(registry, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    yield f"127.0.0.1:{bound}"
    await server.stop(None)


@asynccontextmanager
async def registering(*routers: str) -> AsyncIterator[list[tuple[str, str]]]:
    """A registrar that runs; gives the prefill workers it was told of."""
    discovered: list[tuple[str, str]] = []
    running = asyncio.create_task(Registrar(ME, routers, discovered.extend).run())
    try:
        yield discovered
    finally:
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()


async def test_it_registers_renews_and_says_goodbye_everywhere() -> None:
    prefill = [worker_pb2.WorkerAddress(incarnation="p" * 32, address="host:2")]
    one, two = FakeRegistry(prefill=prefill), FakeRegistry()
    async with serving(one) as first, serving(two) as second:
        async with registering(first, second) as discovered:
            await one.called(3)
            await two.called(3)
            assert discovered[0] == ("p" * 32, "host:2")
            assert not any(call.leaving for call in one.calls + two.calls)
        assert [call.leaving for call in (one.calls[-1], two.calls[-1])] == [True, True]
        assert {call.worker.incarnation for call in one.calls} == {ME.incarnation}


async def test_a_router_that_starts_later_is_found(monkeypatch: Any) -> None:
    from tandem.worker import register

    monkeypatch.setattr(register, "RETRY_S", 0.02)
    registry = FakeRegistry()
    async with serving(FakeRegistry()) as free:
        port = int(free.rpartition(":")[2])
    async with registering(f"127.0.0.1:{port}"):
        for _ in range(10):
            await asyncio.sleep(0.005)
        async with serving(registry, port):
            await registry.called(2)


async def test_the_goodbye_to_a_dead_router_is_given_up() -> None:
    registry = FakeRegistry()
    async with serving(registry) as address:
        stack = registering(address)
        await stack.__aenter__()
        await registry.called(1)
    await stack.__aexit__(None, None, None)
