"""A popular prefix comes to a second worker by the router's own decision, over the transport that is there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from decode_worker.services import build
from kvtransfer.backends import choose
from router.control import ControlPlane
from router.dispatch import Accepted
from router.explain.story import explanation
from router.metrics import _Called
from router.replication import decide
from tandem.cluster import Role, new_id
from tandem.config import DecodeConfig, RouterConfig
from tandem.kv import HashRoot, block_hashes
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.polling import eventually
from tandem.testing.router import Deltas
from tandem.types import GenerateRequest, SamplingParams
from tandem.worker.process import WorkerProcess

PREFIX = tuple(range(10, 202))
SAMPLING = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@asynccontextmanager
async def two_workers(model: Path) -> AsyncIterator[tuple[ControlPlane, list[WorkerProcess]]]:
    config = DecodeConfig(model=str(model), kv_mib=8, threads=1)
    transports = choose("auto")
    async with AsyncExitStack() as stack:
        workers = []
        for _ in range(2):
            worker = WorkerProcess(config, Role.DECODE, transports.preferred.name, build(config, transports))
            await worker.start()
            stack.push_async_callback(worker.stop)
            workers.append(worker)
        addresses = tuple(worker.info.address for worker in workers)
        settings: dict[str, Any] = {"control_port": 0, "workers": addresses}
        control = await stack.enter_async_context(ControlPlane(RouterConfig(**settings)))
        await eventually(lambda: len(control.fleet.snapshot().decode) == 2)
        yield control, workers
        await eventually(lambda: control.dispatcher.leaks() == [])
        for worker in workers:
            assert await worker.leaks() == []
            await worker.thread.call(worker.engine.check_integrity)


async def ask(control: ControlPlane, *own: int) -> tuple[Accepted, list[int], str]:
    request = GenerateRequest(new_id(), "m", (*PREFIX, *own), SAMPLING)
    accepted = await control.dispatcher.submit(request)
    tokens = [token async for delta in Deltas(accepted.follow) for token in delta.tokens]
    return accepted, tokens, request.request_id


async def test_the_second_worker_serves_what_only_the_first_has_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_checkpoint(tmp_path / "small", CheckpointSpec(layers=2, vocab=400, max_positions=512, seed=5))
    async with two_workers(model) as (control, workers):
        first, expected, _ = await ask(control, 7, 8, 9)
        holder = first.plan.decode
        (other,) = (worker for worker in workers if worker.info.incarnation != holder)
        computed = other.metrics.registry.get_sample_value
        assert computed("tandem_worker_step_tokens_total") == 0

        def wait(self: Any, view: Any, service_ms: float) -> tuple[float, int]:
            return (1000.0, 0) if view.incarnation == holder else (0.0, 0)

        # Whose queue is long is not what is tested here.
        monkeypatch.setattr(decide._Waits, "of", wait)
        replicator, name = control.dispatcher._replicator, ""
        for number in range(20, 30):
            _, _, name = await ask(control, number)
            if replicator.running or replicator.outcomes:
                break
        await eventually(lambda: replicator.outcomes == {"done": 1})
        (story,) = control.recorder.find(name, None)
        (copy,) = explanation(story, control.dispatcher.address_of)["copies"]
        assert (copy["state"], copy["moved_tokens"]) == ("done", 192)
        assert (copy["source"]["id"], copy["target"]["id"]) == (holder, other.info.incarnation)
        registry = CollectorRegistry()
        registry.register(_Called(control.dispatcher.collect))
        assert f"tandem_replica_bytes_total {copy['bytes']}.0" in generate_latest(registry).decode()
        assert computed("tandem_worker_step_tokens_total") == 0

        await eventually(lambda: control.index.match(blocks(workers[0])).get(other.info.incarnation) == 3)
        control.fleet.unfollow(next(w.info.address for w in workers if w is not other))
        accepted, tokens, _ = await ask(control, 7, 8, 9)
        assert (accepted.plan.decode, accepted.reply.cached_tokens) == (other.info.incarnation, 192)
        assert tokens == expected
        assert computed("tandem_worker_step_tokens_total") == 3 + len(tokens) - 1


def blocks(worker: WorkerProcess) -> list[bytes]:
    """Hashes of the prefix."""
    root = HashRoot("tandem", worker.info.model.fingerprint, worker.info.kv_dtype).digest()
    return list(block_hashes(root, PREFIX))
