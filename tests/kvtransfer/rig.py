"""Two ends of a hand-over in one process, over real gRPC on loopback, and a transport that misbehaves on demand."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

import grpc.aio

from kvtransfer.backends.inproc import InprocBackend
from kvtransfer.base import Backend, Buffer, Hooks, Identity, Link, TransportError
from kvtransfer.inbound import InboundSettings, PairClient
from kvtransfer.manifest import parse
from kvtransfer.service import HandOverService, OutboundSettings
from kvtransfer.slab import SlabBudget
from kvtransfer.transfer_thread import TransferThread
from tandem.cluster import Ticket, new_id
from tandem.kv import KvLayout
from tandem.testing.kv import FakeSource, small_layout
from tandem.testing.polling import eventually
from tandem.types import TokenIds
from tandem.wire.v1 import handover_pb2_grpc as rpc

TOKENS: TokenIds = tuple(range(1000, 2337))
SETTINGS = InboundSettings(slab_mib=0.125, span_tokens=32, lease_s=5.0, handshake_deadline_s=20.0, quiesce_s=5.0)


class FaultyBackend(InprocBackend):
    """In process; writes of spans complete only while `flowing`, and `tamper` may change or multiply what arrives.

    tamper: (sequence, manifest) -> manifests that arrive for the write; `fail` makes the next writes fail.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flowing = threading.Event()
        self.flowing.set()
        self.fail = False
        self.tamper: Callable[[int, bytes], list[bytes]] = lambda sequence, manifest: [manifest]
        self.posted = 0
        self.closed_links = 0

    def link(self, me: str, peer: str, staging: Buffer) -> Link:
        return _FaultyLink(self, super().link(me, peer, staging))


class _FaultyLink:
    def __init__(self, backend: FaultyBackend, inner: Link) -> None:
        self._backend, self._inner, self._held = backend, inner, dict[int, tuple[Buffer, int, bytes]]()

    def connect(self, metadata: bytes) -> None:
        self._inner.connect(metadata)

    def post(self, view: Buffer, offset: int, manifest: bytes) -> int:
        self._backend.posted += 1
        self._held[self._backend.posted] = (view, offset, manifest)
        return self._backend.posted

    def poll(self, handle: int) -> bool:
        view, offset, manifest = self._held[handle]
        span = parse(manifest).count > 0
        if span and not self._backend.flowing.is_set():
            return False
        del self._held[handle]
        if span and self._backend.fail:
            raise TransportError("the wire is cut")
        arriving = self._backend.tamper(parse(manifest).sequence, manifest) if span else [manifest]
        for each in arriving:
            self._inner.post(view, offset, each)
        return True

    def close(self) -> None:
        self._backend.closed_links += 1
        self._inner.close()


@dataclass
class Rig:
    """A sender with a server, and a maker of receivers; every part is closed at the end."""

    backend: Backend
    layout: KvLayout
    source: FakeSource
    service: HandOverService
    sender: Identity
    address: str
    stack: AsyncExitStack
    settings: InboundSettings
    budget: SlabBudget = field(default_factory=lambda: SlabBudget(1 << 24))
    failures: list[str] = field(default_factory=list)
    sender_failures: list[str] = field(default_factory=list)
    gauges: dict[str, int] = field(default_factory=dict)
    moved: list[tuple[str, str, int, float]] = field(default_factory=list)
    receiver: Identity = field(init=False)

    def __post_init__(self) -> None:
        self.receiver = Identity(new_id(), self.layout, self.sender.fingerprint)

    def hooks(self) -> Hooks:
        def gauge(name: str) -> Callable[[int], None]:
            def change(by: int) -> None:
                self.gauges[name] = self.gauges.get(name, 0) + by

            return change

        return Hooks(
            moved=lambda *values: self.moved.append(values),
            failed=self.failures.append,
            open_tickets=gauge("open_tickets"),
            pending_sends=gauge("pending_sends"),
            quarantined=gauge("quarantined"),
        )

    def client(
        self, me: Identity | None = None, peer: str = "", lease_s: float = 0.0, quiesce_s: float = 0.0
    ) -> PairClient:
        """A receiver that is not connected yet."""
        thread = TransferThread("receiving")
        thread.start()
        self.stack.callback(thread.close)
        chosen = replace(
            self.settings,
            lease_s=lease_s or self.settings.lease_s,
            quiesce_s=quiesce_s or self.settings.quiesce_s,
        )
        client = PairClient(
            me or self.receiver, self.address, peer or self.sender.incarnation, self.backend, thread, self.budget,
            chosen, self.hooks(),
        )  # fmt: skip
        self.stack.push_async_callback(client.close)
        return client

    async def connected(self, lease_s: float = 0.0, quiesce_s: float = 0.0) -> PairClient:
        """A receiver that is connected."""
        client = self.client(lease_s=lease_s, quiesce_s=quiesce_s)
        await client.connect()
        return client

    def ticket(self, queue_s: float = 10.0, transfer_s: float = 10.0) -> Ticket:
        """A fresh ticket of this pair."""
        digest = self.layout.digest()
        return Ticket(
            new_id(), new_id(), 0, self.sender.incarnation, self.receiver.incarnation, digest, queue_s, transfer_s
        )

    async def quiet(self, client: PairClient) -> None:
        """Waits until neither end uses anything, and checks that both agree that it is so."""
        await eventually(lambda: not client.leaks() and not self.service.leaks())
        client.check_integrity()
        self.service.check_integrity()
        assert all(value == 0 for value in self.gauges.values()), self.gauges
        assert not self.source.prompts


@asynccontextmanager
async def make_rig(
    backend: Backend,
    settings: InboundSettings = SETTINGS,
    staging_mib: float = 0.25,
    senders: Backend | None = None,
    windows: Sequence[int | None] = (),
) -> AsyncIterator[Rig]:
    """senders: the sender's transport where it differs."""
    async with AsyncExitStack() as stack:
        layout = small_layout(windows=windows)
        source = FakeSource(layout)
        me = Identity(new_id(), layout, "model-fingerprint")
        thread = TransferThread("sending")
        thread.start()
        stack.callback(thread.close)
        refused: list[str] = []
        sent = Hooks(failed=refused.append)
        service = HandOverService(
            me, source, [senders or backend], thread, OutboundSettings(staging_mib, quiesce_s=settings.quiesce_s), sent
        )
        stack.push_async_callback(service.close)
        server = grpc.aio.server()
        rpc.add_HandOverServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, None)
        yield Rig(backend, layout, source, service, me, f"127.0.0.1:{port}", stack, settings, sender_failures=refused)
