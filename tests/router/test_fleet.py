"""Following workers: subscriptions, gaps, silence, restarts, registration, and the load between two statuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import grpc.aio
import pytest

from router.cache.prefix_index import PrefixIndex
from router.workers.fleet import MAX_PAST_PAIRS, Fleet
from router.workers.fleet_link import Worker
from router.workers.registry import serve_registry
from router.workers.snapshot import Load
from tandem.cluster import EARLIER, CacheEvent, EventKind, Incarnation, MoveStat, Role, Status, WorkerInfo
from tandem.errors import BadRequest, ConfigError, Fenced, TandemError
from tandem.kv import KvLayout, LayerGroup, Plane
from tandem.testing.polling import eventually
from tandem.testing.workers import MODEL, FakeWorker, fake_info
from tandem.wire import codec
from tandem.wire.failures import error_of_rpc
from tandem.wire.v1 import worker_pb2, worker_pb2_grpc

BLOCKS = tuple(bytes([n]) * 16 for n in range(4))
STORED = CacheEvent(EventKind.STORED, BLOCKS)


class Listener:
    def __init__(self) -> None:
        self.up: list[Incarnation] = []
        self.gone: list[tuple[Incarnation, str]] = []

    def worker_up(self, worker: Worker) -> None:
        self.up.append(worker.incarnation)

    def worker_gone(self, incarnation: Incarnation, reason: str) -> None:
        self.gone.append((incarnation, reason))

    def worker_reported(self, status: Status) -> None:
        pass


class Setting:
    def __init__(self, *addresses: str, lease_s: float = 5.0) -> None:
        clock = asyncio.get_running_loop().time
        self.index = PrefixIndex(1000, 1e9, clock)
        self.fleet = Fleet("router-1", self.index, lease_s, clock)
        self.addresses = addresses
        self.fleet.listener = self.listener = Listener()

    def matched(self, worker: FakeWorker) -> int:
        return self.index.match(BLOCKS).get(worker.info.incarnation, 0)


@asynccontextmanager
async def following(*addresses: str, lease_s: float = 5.0) -> AsyncIterator[Setting]:
    setting = Setting(*addresses, lease_s=lease_s)
    for address in addresses:
        setting.fleet.follow(address)
    try:
        yield setting
    finally:
        await setting.fleet.close()
    assert setting.fleet.snapshot().decode == setting.fleet.snapshot().prefill == ()


async def test_snapshot_then_events_reach_the_index() -> None:
    async with FakeWorker(Role.PREFILL) as worker:
        worker.snapshot = (STORED,)
        async with following(worker.info.address) as made:
            await eventually(lambda: made.listener.up == [worker.info.incarnation])
            assert made.matched(worker) == 4
            worker.publish(CacheEvent(EventKind.EVICTED, BLOCKS[3:]))
            await eventually(lambda: made.matched(worker) == 3)
            worker.report(running=7)
            await eventually(lambda: made.fleet.snapshot().prefill[0].status.running == 7)
            assert made.fleet.prefill_workers() == [(worker.info.incarnation, worker.info.address)]
        assert made.listener.gone == [(worker.info.incarnation, "the router is shutting down")]


async def test_a_gap_in_the_sequence_asks_for_a_new_snapshot() -> None:
    async with FakeWorker(Role.DECODE) as worker, following(worker.info.address) as made:
        await eventually(lambda: made.listener.up)
        worker.publish(STORED)
        await eventually(lambda: made.matched(worker) == 4)
        worker.snapshot = (CacheEvent(EventKind.STORED, BLOCKS[:1]),)
        worker.publish(skip=1)
        await worker.until(lambda: worker.watches == 2)
        await eventually(lambda: made.matched(worker) == 1)
        assert made.listener.gone == []
        worker.report(running=3)
        await eventually(lambda: made.fleet.snapshot().decode[0].status.running == 3)


async def test_a_dead_worker_vanishes_from_the_index_at_once_and_is_then_gone() -> None:
    async with FakeWorker(Role.DECODE) as worker, following(worker.info.address) as made:
        worker.publish(STORED)
        await eventually(lambda: made.listener.up)
        await worker.stop()
        await eventually(lambda: not made.fleet.snapshot().decode)
        assert made.matched(worker) == 0
        await eventually(lambda: made.listener.gone)
        assert "does not answer" in made.listener.gone[0][1]
        assert made.fleet.worker(worker.info.incarnation) is None


async def all_gone(count: int, moved: Callable[[int, str], tuple[MoveStat, ...]]) -> Setting:
    """After so many decode workers have come and gone. moved: by number and incarnation."""
    made = Setting()
    channel = grpc.aio.insecure_channel("127.0.0.1:1")
    try:
        for index in range(count):
            worker = made.fleet.join(fake_info(Role.DECODE), channel)
            worker.status = replace(worker.status, moves=moved(index, worker.incarnation))
            made.fleet.gone(worker, "test")
    finally:
        await channel.close()
    return made


async def test_what_workers_of_long_ago_moved_is_kept_as_one_pair_by_transport() -> None:
    def moved(index: int, incarnation: str) -> tuple[MoveStat, ...]:
        return tuple(MoveStat(f"sender-{index}", incarnation, over, 10, 0.5, 2, 1) for over in ("tcp", "nixl"))

    made = await all_gone(MAX_PAST_PAIRS + 100, moved)
    told = made.fleet.moves()
    assert len(told) == MAX_PAST_PAIRS + 2
    assert sum(move.bytes for move in told) == (MAX_PAST_PAIRS + 100) * 20
    folded = (MAX_PAST_PAIRS + 200) // 2
    assert {move.transport: move for move in told if move.sender == EARLIER} == {
        over: MoveStat(EARLIER, EARLIER, over, 10 * folded, 0.5 * folded, 2 * folded, folded)
        for over in ("tcp", "nixl")
    }
    first = next(move.sender for move in told if move.sender != EARLIER)
    assert first == f"sender-{folded}", "the oldest go first"


async def test_what_receivers_of_long_ago_did_not_tell_apart_is_kept_as_one_pair_too() -> None:
    made = await all_gone(MAX_PAST_PAIRS + 100, lambda _, incarnation: (MoveStat(EARLIER, incarnation, "tcp", 10),))
    told = made.fleet.moves()
    assert len(told) == MAX_PAST_PAIRS + 1
    assert sum(move.bytes for move in told) == (MAX_PAST_PAIRS + 100) * 10


async def test_a_silent_worker_is_given_up_after_its_lease() -> None:
    async with FakeWorker(Role.DECODE) as worker:
        worker.watchable = False
        async with following(worker.info.address, lease_s=0.2) as made:
            await eventually(lambda: made.listener.gone)
            assert "reports nothing" in made.listener.gone[0][1]
            assert made.listener.up == []
            assert made.fleet.lease_expiries[Role.DECODE] >= 1
            worker.watchable = True
            await eventually(lambda: made.listener.up)


async def test_a_router_that_stood_still_gives_nobody_up() -> None:
    """After a long pause of this process its workers look silent, but they answer, and report when asked again."""
    async with FakeWorker(Role.DECODE) as worker, following(worker.info.address, lease_s=0.2) as made:
        await eventually(lambda: made.listener.up)
        known = made.fleet.worker(worker.info.incarnation)
        assert known is not None
        known.heard -= 1000.0
        await worker.until(lambda: worker.watches == 3)
        assert made.listener.gone == []


async def test_a_restarted_worker_is_another_one() -> None:
    async with FakeWorker(Role.PREFILL) as first, following(first.info.address) as made:
        first.publish(STORED)
        await eventually(lambda: made.listener.up)
        await first.stop()
        async with FakeWorker(Role.PREFILL, port=first.port) as second:
            await eventually(lambda: made.listener.up == [first.info.incarnation, second.info.incarnation])
            assert [incarnation for incarnation, _ in made.listener.gone] == [first.info.incarnation]
            assert made.fleet.ends == {(Role.PREFILL, "lost"): 1}
            assert made.index.match(BLOCKS) == {}


async def test_a_listed_worker_may_come_later() -> None:
    async with FakeWorker(Role.DECODE) as early:
        port = early.port
    async with following(f"127.0.0.1:{port}") as made, FakeWorker(Role.DECODE, port=port) as worker:
        await eventually(lambda: made.listener.up == [worker.info.incarnation])


async def test_two_names_of_one_worker_are_one_worker() -> None:
    async with FakeWorker(Role.DECODE) as worker, following(worker.info.address, f"localhost:{worker.port}") as made:
        await eventually(lambda: made.listener.up)
        assert len(made.fleet.snapshot().decode) == 1


async def test_load_counts_until_the_worker_reports_it() -> None:
    async with FakeWorker(Role.DECODE) as worker, following(worker.info.address) as made:
        await eventually(lambda: made.listener.up)
        fleet, name = made.fleet, worker.info.incarnation
        first = fleet.book(name, Load(1, 100, 200), BLOCKS)
        second = fleet.book(name, Load(2, 10, 20), ())
        assert first is not None
        assert second is not None
        assert (first.number, second.number) == (1, 2)
        assert made.matched(worker) == 4
        view = fleet.snapshot().decode[0]
        assert (view.sequences, view.queued_tokens, view.free_tokens) == (3, 110, 256 * 16 - 220)
        worker.report(running=1, queued_tokens=60, free_pages=250, dispatches={"router-1": 1, "router-2": 9})
        await eventually(lambda: fleet.snapshot().decode[0].status.running == 1)
        view = fleet.snapshot().decode[0]
        assert (view.sequences, view.queued_tokens) == (3, 70)
        assert made.matched(worker) == 0
        fleet.release(second)
        fleet.release(second)
        assert fleet.bookings() == 0
        assert fleet.book("nobody", Load(1), ()) is None


async def test_a_prefill_worker_takes_over_its_load_when_it_promises_the_prompt() -> None:
    async with FakeWorker(Role.PREFILL) as worker, following(worker.info.address) as made:
        await eventually(lambda: made.listener.up)
        made.fleet.book(worker.info.incarnation, Load(1, 256), BLOCKS)
        worker.report(running=1)
        await eventually(lambda: made.fleet.snapshot().prefill[0].status.running == 1)
        assert made.fleet.snapshot().prefill[0].queued_tokens == 256
        worker.publish(CacheEvent(EventKind.PROMISED, BLOCKS))
        worker.report(running=2, queued_tokens=256)
        await eventually(lambda: made.fleet.snapshot().prefill[0].status.running == 2)
        assert made.fleet.snapshot().prefill[0].queued_tokens == 256
        assert made.fleet.bookings() == 0


# Registration ---------------------------------------------------------------------------------------


async def register(port: int, info: WorkerInfo, leaving: bool = False) -> worker_pb2.RegisterReply | TandemError:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        message = worker_pb2.RegisterRequest(worker=codec.worker_info_to_wire(info), leaving=leaving)
        try:
            return await worker_pb2_grpc.RegistryStub(channel).Register(message)
        except grpc.aio.AioRpcError as failure:
            return error_of_rpc(failure)


@asynccontextmanager
async def registry(lease_s: float = 5.0) -> AsyncIterator[tuple[Setting, int]]:
    async with following(lease_s=lease_s) as made:
        server, port = await serve_registry(made.fleet, "127.0.0.1", 0)
        try:
            yield made, port
        finally:
            await server.stop(None)


async def test_registered_workers_are_followed_and_prefill_workers_named() -> None:
    async with registry() as (made, port), FakeWorker(Role.PREFILL) as prefill, FakeWorker(Role.DECODE) as decode:
        reply = await register(port, prefill.info)
        assert isinstance(reply, worker_pb2.RegisterReply)
        assert (reply.router_id, reply.lease_s, len(reply.prefill)) == ("router-1", 5.0, 0)
        await eventually(lambda: made.listener.up == [prefill.info.incarnation])
        reply = await register(port, decode.info)
        assert isinstance(reply, worker_pb2.RegisterReply)
        assert [(p.incarnation, p.address) for p in reply.prefill] == made.fleet.prefill_workers()
        await eventually(lambda: len(made.listener.up) == 2)
        await register(port, decode.info)
        assert decode.watches == 1


async def test_a_goodbye_keeps_new_requests_away_and_ends_the_link() -> None:
    async with registry() as (made, port), FakeWorker(Role.DECODE) as worker:
        await register(port, worker.info)
        await eventually(lambda: made.listener.up)
        await register(port, worker.info, leaving=True)
        assert made.fleet.snapshot().decode[0].draining
        await worker.stop()
        await eventually(lambda: made.listener.gone)
        assert made.listener.gone == [(worker.info.incarnation, "it said goodbye and has ended")]
        assert made.fleet.ends == {(Role.DECODE, "goodbye"): 1}
        async with FakeWorker(Role.DECODE, port=worker.port) as later:
            await register(port, later.info)
            await eventually(lambda: later.info.incarnation in made.listener.up)
            assert not made.fleet.snapshot().decode[0].draining


async def test_a_registered_worker_is_forgotten_after_its_lease() -> None:
    async with registry(lease_s=0.2) as (made, port):
        await register(port, fake_info(Role.DECODE, "127.0.0.1:1"))
        await eventually(lambda: not made.fleet.following())


@pytest.mark.parametrize(
    ("changes", "param", "text"),
    [
        (
            {"model": replace(MODEL, name="other", fingerprint="0bad")},
            "model",
            "model other with fingerprint 0bad; this",
        ),
        ({"kv_dtype": "bfloat16"}, "layout", "of bfloat16; this cluster has"),
        ({"layout": KvLayout((Plane("k", 1, 8, "float32"),), (LayerGroup((0,)),))}, "layout", "KV layout"),
        (
            {"layout": fake_info(Role.DECODE).layout.with_drafter(fake_info(Role.DECODE).layout)},
            "draft_model",
            "127.0.0.1:9 has a draft model and the workers of this cluster have none; --draft-model must be the same",
        ),
    ],
)
async def test_a_worker_that_does_not_fit_is_refused(changes: dict[str, Any], param: str, text: str) -> None:
    async with registry() as (made, port), FakeWorker(Role.DECODE) as worker:
        await register(port, worker.info)
        await eventually(lambda: made.listener.up)
        refused = await register(port, replace(fake_info(Role.PREFILL, "127.0.0.1:9"), **changes))
        assert isinstance(refused, Fenced)
        assert text in str(refused)
        assert refused.param == param
        assert made.fleet.following() == {worker.info.address}


def _left(made: Setting, incarnation: Incarnation) -> bool:
    return made.fleet.worker(incarnation) is None


async def test_workers_may_all_be_exchanged_for_others_of_another_layout() -> None:
    other: dict[str, Any] = {
        "kv_dtype": "bfloat16",
        "layout": KvLayout((Plane("k", 1, 8, "bfloat16"),), (LayerGroup((0,)),)),
    }
    async with registry() as (made, port), FakeWorker(Role.PREFILL) as prefill, FakeWorker(Role.DECODE) as decode:
        for worker in (prefill, decode):
            await register(port, worker.info)
        await eventually(lambda: len(made.listener.up) == 2)
        async with FakeWorker(Role.DECODE, **other) as later:
            for worker in (prefill, decode):
                assert isinstance(await register(port, later.info), Fenced)
                await register(port, worker.info, leaving=True)
                await worker.stop()
                await eventually(partial(_left, made, worker.info.incarnation))
            await register(port, later.info)
            await eventually(lambda: later.info.incarnation in made.listener.up)
            assert isinstance(await register(port, fake_info(Role.PREFILL, "127.0.0.1:9")), Fenced)


async def test_a_malformed_registration_is_refused() -> None:
    async with registry() as (_, port):
        refused = await register(port, replace(fake_info(Role.DECODE), page_size=0))
        assert isinstance(refused, BadRequest)
        assert "worker: page_size is 0" in str(refused)


async def test_a_taken_control_port_is_a_clear_error() -> None:
    async with registry() as (made, port):
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be listened on"):
            await serve_registry(made.fleet, "127.0.0.1", port)
