"""Settings of the router that no other test here changes: each must change what the router does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from router.control import ControlPlane
from tandem.cluster import CacheEvent, EventKind, Role, new_id
from tandem.config import RouterConfig
from tandem.kv import BLOCK_TOKENS, HashRoot, block_hashes
from tandem.testing.polling import eventually
from tandem.testing.workers import MODEL, FakeWorker, fake_info
from tandem.types import GenerateRequest, SamplingParams
from tandem.wire import codec
from tandem.wire.v1 import worker_pb2, worker_pb2_grpc

PROMPT = tuple(range(1, 4 * BLOCK_TOKENS + 2))
HASHES = tuple(block_hashes(HashRoot("tandem", MODEL.fingerprint, "float32").digest(), PROMPT))


@asynccontextmanager
async def followed(**settings: Any) -> AsyncIterator[tuple[ControlPlane, FakeWorker]]:
    """A control plane and one decode worker that has `PROMPT` cached."""
    async with FakeWorker(Role.DECODE) as worker:
        worker.snapshot = (CacheEvent(EventKind.STORED, HASHES),)
        config = RouterConfig(control_port=0, workers=(worker.info.address,), **settings)
        async with ControlPlane(config) as control:
            await eventually(control.dispatcher.ready)
            yield control, worker


@pytest.mark.parametrize(("key", "cached"), [("tandem", 4 * BLOCK_TOKENS), ("another cluster", 0)])
async def test_the_cluster_key_is_in_every_hash(key: str, cached: int) -> None:
    asked = GenerateRequest(new_id(), "fake", PROMPT, SamplingParams())
    async with followed(cluster_key=key) as (control, _), await control.dispatcher.submit(asked) as accepted:
        assert accepted.plan.expected_cached == cached


@pytest.mark.parametrize(("most", "known"), [(4, 4), (2, 2)])
async def test_the_index_keeps_no_more_blocks_than_told(most: int, known: int) -> None:
    async with followed(index_max_blocks=most) as (control, worker):
        assert control.index.match(HASHES).get(worker.info.incarnation, 0) == known
        assert len(control.index) <= most


async def test_the_index_forgets_after_the_age_it_is_told() -> None:
    async with followed(index_max_age_s=0.05) as (control, _):
        # A match makes it look for what is too old; the default age is hours.
        await eventually(lambda: control.index.match(()) == {} and len(control.index) == 0)


@pytest.mark.parametrize(("name", "shown"), [(None, "fake"), ("chat", "chat")])
async def test_clients_know_the_model_by_the_name_it_is_served_under(name: str | None, shown: str) -> None:
    async with followed(served_model_name=name) as (control, _):
        assert control.dispatcher.model is not None
        assert control.dispatcher.model.name == shown


async def test_workers_register_at_the_address_that_is_set() -> None:
    message = worker_pb2.RegisterRequest(worker=codec.worker_info_to_wire(fake_info(Role.DECODE)))
    async with ControlPlane(RouterConfig(control_host="127.0.0.2", control_port=0)) as control:
        async with grpc.aio.insecure_channel(f"127.0.0.2:{control.port}") as channel:
            await worker_pb2_grpc.RegistryStub(channel).Register(message, timeout=5.0)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{control.port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await worker_pb2_grpc.RegistryStub(channel).Register(message, timeout=5.0)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
