"""Two ends of a hand-over in one process, over real gRPC on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio
import pytest

from kvtransfer.base import Backend, Hooks, Identity
from kvtransfer.inbound import InboundSettings, PairClient
from kvtransfer.service import HandOverService, OutboundSettings
from kvtransfer.slab import SlabBudget
from kvtransfer.transfer_thread import TransferThread
from tandem.cluster import Ticket, new_id
from tandem.kv import KvLayout
from tandem.testing.kv import FakeSource, small_layout
from tandem.wire.v1 import handover_pb2_grpc as rpc


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
    budget: SlabBudget
    failures: list[str] = field(default_factory=list)
    receiver: Identity = field(init=False)

    def __post_init__(self) -> None:
        self.receiver = Identity(new_id(), self.layout, self.sender.fingerprint)

    async def client(self, **changes: object) -> PairClient:
        """A receiver that is not connected yet."""
        thread = TransferThread("receiving")
        thread.start()
        self.stack.callback(thread.close)
        arguments: dict[str, object] = {
            "me": self.receiver, "address": self.address, "peer": self.sender.incarnation, "backend": self.backend,
            "thread": thread, "budget": self.budget, "settings": self.settings,
            "hooks": Hooks(failed=self.failures.append),
        }  # fmt: skip
        client = PairClient(**{**arguments, **changes})  # type: ignore[arg-type]
        self.stack.push_async_callback(client.close)
        return client

    def ticket(self, **changes: object) -> Ticket:
        """A ticket of this pair."""
        values: dict[str, object] = {
            "ticket_id": new_id(), "request_id": new_id(), "attempt": 0, "sender": self.sender.incarnation,
            "receiver": self.receiver.incarnation, "layout_digest": self.layout.digest(),
            "queue_deadline_s": 10.0, "transfer_deadline_s": 10.0,
        }  # fmt: skip
        return Ticket(**{**values, **changes})  # type: ignore[arg-type]


@asynccontextmanager
async def make_rig(
    backend: Backend, settings: InboundSettings | None = None, staging_mib: float = 0.25, sending: Backend | None = None
) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        layout = small_layout()
        source = FakeSource(layout)
        me = Identity(new_id(), layout, "model-fingerprint")
        thread = TransferThread("sending")
        thread.start()
        stack.callback(thread.close)
        service = HandOverService(me, source, [sending or backend], thread, OutboundSettings(staging_mib=staging_mib))
        stack.push_async_callback(service.close)
        server = grpc.aio.server()
        rpc.add_HandOverServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, None)
        chosen = settings or InboundSettings(slab_mib=0.125, span_tokens=32, lease_s=5.0, handshake_deadline_s=20.0)
        yield Rig(backend, layout, source, service, me, f"127.0.0.1:{port}", stack, chosen, SlabBudget(1 << 24))


RigMaker = Callable[..., "AsyncIterator[Rig]"]


@pytest.fixture
def rig_maker() -> RigMaker:
    return make_rig  # type: ignore[return-value]
