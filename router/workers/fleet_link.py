"""The connection to one worker address: who is there, what it reports, and whether it still is the same one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, Protocol

import grpc
import grpc.aio

from router.workers.load import Booking
from router.workers.members import Member
from tandem.cluster import WorkerInfo, WorkerUpdate
from tandem.errors import Fenced, TandemError, WorkerLost
from tandem.trust import Trust
from tandem.wire import codec
from tandem.wire.failures import error_of_rpc
from tandem.wire.v1 import worker_pb2, worker_pb2_grpc

log = logging.getLogger(__name__)

CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A channel made anew must not inherit the back-off of the one before it.
    ("grpc.use_local_subchannel_pool", 1),
)
FIRST_RETRY_S = 0.1
LAST_RETRY_S = 2.0
REFUSED_RETRY_S = 5.0
DESCRIBE_S = 2.0
RESUME_S = 1.0
"""A worker whose connection broke is looked for this long before its requests are given up."""
LOOK_AGAIN_S = 0.05


class Worker(Member):
    """One incarnation of a worker, and the connection to it."""

    def __init__(
        self, info: WorkerInfo, channel: grpc.aio.Channel, on_close: Callable[[Booking], None], now: float
    ) -> None:
        super().__init__(info, on_close, now)
        self.channel = channel
        self.announced = False


class LinkOwner(Protocol):
    """What a link tells: a worker was found, reported, is looked for, is gone."""

    def join(self, info: WorkerInfo, channel: grpc.aio.Channel) -> Worker:
        """A worker answered. Raises Fenced with the reason when it cannot be part of this cluster."""

    def update(self, worker: Worker, update: WorkerUpdate) -> None:
        """The next message of its subscription."""

    def suspend(self, worker: Worker, reason: str, silent: bool = False) -> None:
        """Its connection broke, or it was silent for a lease; it may be back in a moment."""

    def gone(self, worker: Worker, reason: str) -> None:
        """It will not be back."""


class Link:
    """Keeps one address connected: for ever when it is listed, while its lease runs when it registered itself."""

    def __init__(
        self,
        address: str,
        listed: bool,
        owner: LinkOwner,
        router_id: str,
        lease_s: float,
        clock: Callable[[], float],
        trust: Trust,
    ) -> None:
        self.address = address
        self.renewed = clock()
        self.listed = listed
        self._owner = owner
        self._router_id = router_id
        self._lease_s = lease_s
        self._clock = clock
        self._trust = trust
        self._wake = asyncio.Event()
        self._complained = ""

    def renew(self) -> None:
        """The worker registered again: its lease starts anew, and it is looked for at once."""
        self.renewed = self._clock()
        self._wake.set()

    def set_listed(self, listed: bool) -> None:
        """Whether the address is looked at for ever from now on; if not, and without a lease, until its worker ends."""
        self.listed = listed
        self.renewed = self._clock() if listed else float("-inf")
        self._wake.set()

    def give_up(self) -> None:
        """The worker said goodbye: the link ends with its connection, unless the address is listed."""
        self.renewed = float("-inf")

    async def run(self) -> None:
        """Connects, follows, and connects again until cancelled or no longer wanted."""
        delay = FIRST_RETRY_S
        while self.listed or self._clock() - self.renewed <= self._lease_s:
            try:
                await self._session()
            except WorkerLost as error:
                log.warning("worker at %s is gone: %s", self.address, error)
                delay = FIRST_RETRY_S
            except Fenced as error:
                self._complain(str(error))
                delay = REFUSED_RETRY_S
            except (TandemError, ValueError) as error:
                self._complain(str(error))
                delay = min(delay * 2, LAST_RETRY_S)
            await self._pause(delay)

    def _complain(self, text: str) -> None:
        """Logs a reason once, not at every retry."""
        if text != self._complained:
            log.warning("worker at %s cannot be used: %s", self.address, text)
        self._complained = text

    async def _pause(self, seconds: float) -> None:
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    async def _session(self) -> None:
        channel = self._trust.channel(self.address, CHANNEL_OPTIONS)
        try:
            stub = worker_pb2_grpc.WorkerStub(channel)
            worker = self._owner.join(await self._describe(stub, DESCRIBE_S), channel)
            self._complained = ""
            reason = "the router is shutting down"
            try:
                await self._follow(worker, stub)
            except (TandemError, ValueError) as error:
                reason = str(error)
                raise
            finally:
                self._owner.gone(worker, reason)
        finally:
            await channel.close()

    async def _describe(self, stub: worker_pb2_grpc.WorkerAsyncStub, timeout: float) -> WorkerInfo:
        try:
            return codec.worker_info_from_wire(await stub.Describe(worker_pb2.DescribeRequest(), timeout=timeout))
        except grpc.aio.AioRpcError as failure:
            raise error_of_rpc(failure) from None

    async def _follow(self, worker: Worker, stub: worker_pb2_grpc.WorkerAsyncStub) -> None:
        """Subscribes again and again; returns never. Raises WorkerLost when the incarnation is gone."""
        while True:
            try:
                await self._subscribe(worker, stub)
            except TimeoutError:
                self._owner.suspend(worker, f"it was silent for {self._lease_s:g} s", silent=True)
                await self._find_again(worker, stub)
            except grpc.aio.AioRpcError as failure:
                if worker.leaving:
                    raise WorkerLost("it said goodbye and has ended") from None
                self._owner.suspend(worker, f"its connection broke: {failure.code().name}")
                await self._find_again(worker, stub)
            await asyncio.sleep(LOOK_AGAIN_S)

    async def _subscribe(self, worker: Worker, stub: worker_pb2_grpc.WorkerAsyncStub) -> None:
        """One subscription, until it ends or misses a number. Raises AioRpcError; TimeoutError after a silent lease."""
        call = stub.Watch(worker_pb2.WatchRequest(router_id=self._router_id))
        expected = 0
        try:
            while True:
                # Not wait_for: up to Python 3.11 it loses a cancellation that meets a result.
                async with asyncio.timeout(self._lease_s):
                    message = await call.read()
                if message is grpc.aio.EOF:
                    return
                assert isinstance(message, worker_pb2.WorkerUpdate)
                update = codec.worker_update_from_wire(message)
                if update.incarnation != worker.incarnation:
                    raise WorkerLost(f"{update.incarnation} took its place")
                if update.sequence != expected or (expected == 0 and not update.snapshot):
                    log.warning("worker %s: update %d came for %d", self.address, update.sequence, expected)
                    return
                expected += 1
                worker.heard = self._clock()
                self._owner.update(worker, update)
        except TimeoutError:
            if expected:
                # Perhaps it was this process that stood still: a worker that answers gets another subscription.
                worker.heard = self._clock()
            raise
        finally:
            call.cancel()

    async def _find_again(self, worker: Worker, stub: worker_pb2_grpc.WorkerAsyncStub) -> None:
        """Returns when the same incarnation answers. Raises WorkerLost if another one does, or none for RESUME_S."""
        deadline = self._clock() + RESUME_S
        while True:
            try:
                info = await self._describe(stub, RESUME_S)
            except TandemError as error:
                if self._clock() >= deadline:
                    raise WorkerLost(f"it does not answer: {error}") from None
                await asyncio.sleep(LOOK_AGAIN_S)
                continue
            if info.incarnation != worker.incarnation:
                raise WorkerLost(f"it was restarted as {info.incarnation}")
            if self._clock() - worker.heard > self._lease_s + 2 * RESUME_S:
                raise WorkerLost("it answers but reports nothing")
            return
