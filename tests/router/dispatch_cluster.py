"""A dispatcher and its fleet in front of scripted workers on real gRPC servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from router.control import ControlPlane
from router.dispatch import Accepted, Dispatcher
from tandem.cluster import Role, new_id
from tandem.config import RouterConfig
from tandem.testing.polling import eventually
from tandem.testing.router import Deltas
from tandem.testing.workers import FakeWorker
from tandem.types import Delta, FinishReason, GenerateRequest, SamplingParams


class Cluster:
    def __init__(self, control: ControlPlane, decode: list[FakeWorker], prefill: list[FakeWorker]) -> None:
        self.control = control
        self.decode = decode
        self.prefill = prefill

    @property
    def dispatcher(self) -> Dispatcher:
        return self.control.dispatcher

    async def submit(self, request: GenerateRequest) -> tuple[Accepted, FakeWorker]:
        accepted = await self.dispatcher.submit(request)
        return accepted, next(w for w in self.decode if w.info.incarnation == accepted.plan.decode)

    def decoders_known(self) -> int:
        return len(self.control.fleet.snapshot().decode)


@asynccontextmanager
async def cluster(decode: int = 1, prefill: int = 0, **settings: Any) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        decoders = [await stack.enter_async_context(FakeWorker(Role.DECODE)) for _ in range(decode)]
        prefillers = [await stack.enter_async_context(FakeWorker(Role.PREFILL)) for _ in range(prefill)]
        addresses = tuple(worker.info.address for worker in (*decoders, *prefillers))
        settings = {"control_port": 0, "lease_s": 5.0, "workers": addresses, **settings}
        control = await stack.enter_async_context(ControlPlane(RouterConfig(**settings)))
        made = Cluster(control, decoders, prefillers)
        await eventually(lambda: made.decoders_known() == decode and len(control.fleet.prefill_workers()) == prefill)
        yield made
        await eventually(lambda: made.dispatcher.leaks() == [])
        control.index.check_integrity()


def request(prompt_tokens: int = 5, **fields: Any) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=fields.pop("max_tokens", 16))
    return GenerateRequest(new_id(), "fake", tuple(range(1, prompt_tokens + 1)), sampling, **fields)


async def read(accepted: Accepted) -> list[Delta]:
    async with asyncio.timeout(10):
        return [delta async for delta in Deltas(accepted.follow)]


STOP: dict[str, Any] = {"finish": FinishReason.STOP}
