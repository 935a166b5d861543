"""One worker from its settings to its exit, in this process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import urllib.request
from pathlib import Path
from typing import Any, cast

import grpc.aio
import pytest

from decode_worker.services import build as build_decode
from kvtransfer.backends import Chosen
from kvtransfer.backends.inproc import InprocBackend
from tandem.cluster import Role, Status
from tandem.config import DecodeConfig
from tandem.errors import ConfigError
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.pair import pair
from tandem.types import FinishReason, SamplingParams
from tandem.wire import codec
from tandem.wire.v1 import worker_pb2, worker_pb2_grpc
from tandem.worker.process import WorkerProcess, serve

PROMPT = tuple(range(10, 210))
SHORT = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = CheckpointSpec(layers=1, hidden=32, heads=2, kv_heads=1, vocab=300, max_positions=2048)
    return make_checkpoint(tmp_path_factory.mktemp("models") / "small", spec)


def decode_worker(model: Path, **settings: Any) -> WorkerProcess:
    config = DecodeConfig(model=str(model), kv_mib=1, threads=1, **settings)
    backend = InprocBackend()
    return WorkerProcess(config, Role.DECODE, backend.name, build_decode(config, Chosen(backend, (backend,), "as set")))


async def started(worker: WorkerProcess) -> None:
    """Waits until the worker serves."""
    while not hasattr(worker, "services") or not worker._tasks:
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_serves_until_it_is_told_to_stop(number: signal.Signals, small_model: Path) -> None:
    worker = decode_worker(small_model)
    serving = asyncio.create_task(serve(worker))
    await started(worker)
    os.kill(os.getpid(), number)
    assert await serving == 0


async def test_an_engine_that_fails_ends_the_process_with_an_error(small_model: Path) -> None:
    """The requests end with an error, and the stop waits for nothing that only the engine could do."""
    async with pair(small_model) as workers:
        name = await workers.submit(PROMPT, SamplingParams(max_tokens=1500, ignore_eos=True))
        await workers.tokens(name, 1)

        def fail(batch: Any, after: Any = None) -> Any:
            raise MemoryError("no room")

        workers.decode.engine._runner.launch = fail  # type: ignore[method-assign]
        await workers.decode.stopping.wait()
        assert workers.decode.failed
        await workers.decode.services.finish()
        (answer,) = await workers.answer(name)
        assert answer.finish is FinishReason.ERROR
        await workers.stop(workers.decode)


async def test_a_prefill_worker_whose_engine_fails_is_made_up_for(small_model: Path) -> None:
    async with pair(small_model) as workers:

        def fail(batch: Any, after: Any = None) -> Any:
            raise MemoryError("no room")

        workers.prefill[0].engine._runner.launch = fail  # type: ignore[method-assign]
        name = await workers.submit(PROMPT, SHORT)
        await workers.prefill[0].stopping.wait()
        assert workers.prefill[0].failed
        await workers.stop(workers.prefill[0])
        (answer,) = await workers.answer(name)
        assert (answer.finish, answer.error) == (FinishReason.LENGTH, "")


@pytest.mark.parametrize("setting", ["port", "metrics_port"])
async def test_a_taken_port_is_named(setting: str, small_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        worker = decode_worker(small_model, **{setting: port})
        with pytest.raises(ConfigError, match=f"--{setting.replace('_', '-')}: .*:{port} cannot be listened on"):
            await worker.start()


async def test_it_says_what_it_is_and_what_it_holds(small_model: Path) -> None:
    async with pair(small_model, prefill=0, page_size=4, max_context=500) as workers:
        info = workers.decode.info
        async with grpc.aio.insecure_channel(info.address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            assert codec.worker_info_from_wire(await stub.Describe(worker_pb2.DescribeRequest())) == info
            assert list((await stub.Audit(worker_pb2.AuditRequest())).leaks) == []
            name = await workers.submit(PROMPT, SamplingParams(max_tokens=250, ignore_eos=True))
            assert f"request {name} is open" in (await stub.Audit(worker_pb2.AuditRequest())).leaks
            await workers.cancel(name)
            await workers.answer(name)
            call = stub.Watch(worker_pb2.WatchRequest(router_id="r"))
            update = codec.worker_update_from_wire(cast(worker_pb2.WorkerUpdate, await call.read()))
            assert update.snapshot
            assert isinstance(update.status, Status)
            assert update.status.total_pages == info.total_pages
            call.cancel()
        assert (info.role, info.page_size, info.model.max_context) == (Role.DECODE, 4, 500)


async def test_the_context_is_at_most_what_the_pages_hold(small_model: Path) -> None:
    async with pair(small_model, prefill=0, pages=10) as workers:
        assert workers.decode.info.model.max_context == 160


async def test_the_metrics_page_shows_what_happened(small_model: Path) -> None:
    async with pair(small_model) as workers:
        await workers.generate(PROMPT, SHORT)
        await workers.generate(PROMPT, SHORT)
        info = workers.decode.info
        page = await asyncio.to_thread(fetch, f"http://127.0.0.1:{info.metrics_port}/metrics")
        moved = f'receiver="{info.incarnation}",sender="{workers.prefill[0].info.incarnation}",transport="inproc"'
        series = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        assert float(series["tandem_worker_prompt_tokens_total"]) == 400
        assert float(series['tandem_worker_requests_total{outcome="length"}']) == 2
        assert float(series['tandem_worker_prefix_hit_tokens_total{place="decode"}']) >= 192
        assert float(series["tandem_kv_moved_bytes_total{" + moved + "}"]) >= info.layout.token_bytes * 199
        assert float(series["tandem_worker_time_to_first_token_seconds_count"]) == 2
        assert float(series["tandem_worker_inter_token_seconds_count"]) == 6


def fetch(address: str) -> str:
    with urllib.request.urlopen(address, timeout=5) as reply:
        return str(reply.read().decode())
