"""`Probing`: bytes really go from one worker to another, one probe at a time, and nothing is left of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from kvtransfer.backends.inproc import InprocBackend
from kvtransfer.backends.tcp import TcpBackend
from kvtransfer.base import Backend
from kvtransfer.pairs import PROBE_SLAB_MIB, PROBE_WRITES
from tandem.errors import Fenced, Overloaded, TandemError, Unavailable
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.pair import Pair, pair
from tandem.types import SamplingParams
from tandem.wire.failures import error_of_rpc
from tandem.wire.v1 import probing_pb2, probing_pb2_grpc
from tandem.worker.process import WorkerProcess
from tandem.worker.transfer_probe.service import ProbingService

MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = CheckpointSpec(layers=1, hidden=32, heads=2, kv_heads=1, vocab=300, max_positions=512)
    return make_checkpoint(tmp_path_factory.mktemp("models") / "small", spec)


@asynccontextmanager
async def stub_of(worker: WorkerProcess) -> AsyncIterator[probing_pb2_grpc.ProbingAsyncStub]:
    async with grpc.aio.insecure_channel(worker.info.address) as channel:
        yield probing_pb2_grpc.ProbingStub(channel)


async def probe(to: WorkerProcess, by: WorkerProcess | None, **wrong: str) -> probing_pb2.ProbeReply:
    """Raises what the worker refused with."""
    asked = {"incarnation": to.info.incarnation}
    if by is not None:
        asked |= {"sender": by.info.incarnation, "sender_address": by.info.address}
    async with stub_of(to) as stub:
        try:
            reply: probing_pb2.ProbeReply = await stub.Probe(probing_pb2.ProbeRequest(**(asked | wrong)), timeout=20)
            return reply
        except grpc.aio.AioRpcError as failure:
            raise error_of_rpc(failure) from None


async def asks(workers: Pair) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    (answer,) = await workers.generate(tuple(range(10, 100)), sampling)
    assert answer.usage is not None and answer.usage.moved_tokens > 0


@pytest.mark.parametrize("backend", [InprocBackend, TcpBackend])
async def test_bytes_travel_and_the_pair_of_requests_is_not_touched(
    backend: type[Backend], model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvtransfer")
    async with pair(model, backend=backend()) as workers:
        (prefill,) = workers.prefill
        await asks(workers)
        reply = await probe(workers.decode, prefill)
        assert (reply.transport, reply.write_bytes) == (backend().name, int(PROBE_SLAB_MIB * MIB))
        assert len(reply.write_s) == PROBE_WRITES
        assert all(seconds > 0 for seconds in reply.write_s)
        await workers.check_leaks()
        closed = [record.getMessage() for record in caplog.records if "is closed" in record.getMessage()]
        assert closed  # the probe's own
        assert not [line for line in closed if f"to {workers.decode.info.incarnation}" in line]
        assert not workers.decode.services.report().moves[0].failures
        backwards = await probe(prefill, workers.decode)
        assert backwards.write_bytes == int(PROBE_SLAB_MIB * MIB)


async def test_without_a_sender_it_tells_its_hash_root_alone(model: Path) -> None:
    async with pair(model, decode_settings={"cluster_key": "other"}) as workers:
        (prefill,) = workers.prefill
        one, other = await probe(workers.decode, None), await probe(prefill, None)
        assert len(one.hash_root) == 64
        assert one.hash_root != other.hash_root
        assert (one.transport, one.write_bytes, list(one.write_s)) == ("", 0, [])


async def test_what_cannot_be_probed_is_refused_and_leaves_nothing(model: Path) -> None:
    async with pair(model, handshake_deadline_s=2.0) as workers:
        (prefill,) = workers.prefill
        with pytest.raises(Fenced, match="this worker is"):
            await probe(workers.decode, prefill, incarnation="0" * 32)
        with pytest.raises(Fenced, match="sender is"):
            await probe(workers.decode, prefill, sender="0" * 32)
        with pytest.raises(Unavailable, match=r"hand-over from 127\.0\.0\.1:9"):
            await probe(workers.decode, prefill, sender_address="127.0.0.1:9")
        await workers.check_leaks()
        workers.decode.services.drain()
        with pytest.raises(Unavailable, match="draining"):
            await probe(workers.decode, prefill)


class Held:
    """A pair that connects when told."""

    transport, warm_bytes, warm_s = "held", 1, (0.5,)

    def __init__(self) -> None:
        self.go, self.closed, self.started = asyncio.Event(), 0, asyncio.Event()

    async def connect(self) -> None:
        self.started.set()
        await self.go.wait()

    async def close(self) -> None:
        self.closed += 1


async def test_one_at_a_time_and_a_cancelled_one_is_closed() -> None:
    held = Held()
    service = ProbingService("a" * 32, b"root", lambda sender, address: held, lambda: False)
    server = grpc.aio.server()
    service.attach(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    asked = probing_pb2.ProbeRequest(incarnation="a" * 32, sender="b" * 32, sender_address="127.0.0.1:9")
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = probing_pb2_grpc.ProbingStub(channel)
            first = asyncio.ensure_future(_call(stub, asked))
            await held.started.wait()
            assert service.leaks() == ["a probe is under way"]
            with pytest.raises(Overloaded, match="one at a time"):
                await _call(stub, asked)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            async with asyncio.timeout(5):
                while service.leaks():
                    await asyncio.sleep(0.01)
            assert held.closed == 1
            held.go.set()
            assert (await _call(stub, asked)).transport == "held"
    finally:
        await server.stop(0)


async def _call(stub: probing_pb2_grpc.ProbingAsyncStub, asked: probing_pb2.ProbeRequest) -> probing_pb2.ProbeReply:
    try:
        reply: probing_pb2.ProbeReply = await stub.Probe(asked, timeout=20)
        return reply
    except grpc.aio.AioRpcError as failure:
        error: TandemError = error_of_rpc(failure)
        raise error from None
