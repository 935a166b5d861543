"""A KV transport between simulated processes that behaves as badly as real ones may.

A write reads its staging and fills the slab piece by piece while time passes, and cannot be recalled; writes overtake
one another; a process that stands still goes on in the middle of one; bytes may be changed on the way, notifications
doubled or lost. Every piece is checked against the protocol: it must lie in a grant that is in force, and its staging
must not have changed under it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from kvtransfer.base import Buffer, TransportError
from kvtransfer.manifest import parse
from kvtransfer.slab import allocate_memory
from tandem.cluster import Incarnation
from tests.simulation.loop import NODE, Node, VirtualLoop
from tests.simulation.network import Network


@dataclass
class Mischief:
    """How likely each is, for every write."""

    fail: float = 0.0
    corrupt: float = 0.0
    double: float = 0.0
    lose: float = 0.0


@dataclass
class Fabric:
    """What all processes write through, and what was seen to be wrong."""

    loop: VirtualLoop
    net: Network
    mischief: Mischief = field(default_factory=Mischief)
    landings: dict[bytes, SimLanding] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    write_s: tuple[float, float] = (0.0005, 0.02)
    tampered: int = 0
    """Writes that were made to go wrong."""


class SimLanding:
    """A slab. `giving_up` is set by who owns the pair: then what still lands is nobody's any more."""

    def __init__(self, fabric: Fabric, node: Node, memory: Buffer, reuse: Callable[[Buffer], None]) -> None:
        self.memory, self.node = memory, node
        self._fabric, self._reuse = fabric, reuse
        self._token = len(fabric.landings).to_bytes(8, "big")
        self._manifests: list[bytes] = []
        self._allows: Callable[[int, int], bool] = lambda offset, length: True
        self.closed = False
        self.given_up: Callable[[], bool] = lambda: False
        fabric.landings[self._token] = self

    def metadata(self) -> bytes:
        """What the link connects to."""
        return self._token

    def guard(self, allows: Callable[[int, int], bool]) -> None:
        """Nothing is refused, as NIXL refuses nothing; but it is noted."""
        self._allows = allows

    def fill(self, offset: int, piece: Buffer, whole: tuple[int, int], ticket: str) -> None:
        """A piece of a write arrives."""
        if self.closed:
            return
        if not self._allows(*whole) and not self.given_up():
            where = f"bytes {whole[0]}..{sum(whole)} of {self.node.name}'s slab"
            self._fabric.wrong.append(f"I4: ticket {ticket} is written to {where}, which it no longer holds")
        self.memory[offset : offset + piece.nbytes] = piece

    def notify(self, manifest: bytes) -> None:
        """A write's manifest arrives."""
        if not self.closed:
            self._manifests.append(manifest)

    def poll(self) -> list[bytes]:
        """See `Landing`."""
        arrived, self._manifests = self._manifests, []
        return arrived

    def close(self) -> None:
        """See `Landing`; the memory serves as a slab again."""
        if not self.closed:
            self.closed = True
            self._reuse(self.memory)


class SimLink:
    """Writes that take their time, in the sender's process: they stand still and die with it."""

    def __init__(self, fabric: Fabric, node: Node) -> None:
        self._fabric, self._node = fabric, node
        self._landing: SimLanding | None = None
        self._ended: dict[int, str] = {}
        self._posted = 0
        self._closed = False

    def connect(self, metadata: bytes) -> None:
        """See `Link`."""
        landing = self._fabric.landings.get(metadata)
        if landing is None or landing.closed or landing.node.dead:
            raise TransportError("no such landing")
        self._landing = landing

    def post(self, view: Buffer, offset: int, manifest: bytes) -> int:
        """See `Link`."""
        if self._closed or self._landing is None:
            raise TransportError("the link is closed")
        self._posted += 1
        pieces = self._fabric.loop.random.randint(1, 3)
        cuts = [view.nbytes * number // pieces for number in range(pieces + 1)]
        self._go_on(self._posted, view, view.copy(), offset, manifest, deque(pairwise(cuts)))
        return self._posted

    def _go_on(
        self, number: int, view: Buffer, posted: Buffer, offset: int, manifest: bytes, left: deque[tuple[int, int]]
    ) -> None:
        """Moves the next piece, a while from now; not while the way is cut, and never once the link is closed."""
        fabric, landing = self._fabric, self._landing
        assert landing is not None
        wire = fabric.net.wire(self._node.name, landing.node.name)

        def move() -> None:
            if self._closed:
                return
            if wire.cut:
                fabric.loop.later(0.01, 0.05, move)
                return
            if landing.node.dead or landing.closed:
                self._ended[number] = "the peer is gone"
                return
            if left:
                start, end = left.popleft()
                self._piece(
                    landing, view[start:end], posted[start:end], offset + start, (offset, view.nbytes), manifest
                )
                self._go_on(number, view, posted, offset, manifest, left)
                return
            self._finish(number, landing, manifest)

        seconds = posted.nbytes / wire.bytes_per_s
        fabric.loop.later(fabric.write_s[0] / 3 + seconds, fabric.write_s[1] / 3 + seconds, move)

    def _piece(
        self, landing: SimLanding, view: Buffer, posted: Buffer, at: int, whole: tuple[int, int], manifest: bytes
    ) -> None:
        ticket = parse(manifest).ticket_id
        if not (view == posted).all():
            self._fabric.wrong.append(f"I4: {self._node.name}'s staging of ticket {ticket} changed under a write")
        piece = view.copy()
        if self._drawn(self._fabric.mischief.corrupt) and piece.nbytes:
            piece[self._fabric.loop.random.randrange(piece.nbytes)] ^= 1
        landing.fill(at, piece, whole, ticket)

    def _finish(self, number: int, landing: SimLanding, manifest: bytes) -> None:
        """The write is complete, and the receiver hears of it; or it failed, or seems to have succeeded."""
        mischief, random = self._fabric.mischief, self._fabric.loop.random
        span = parse(manifest).count > 0
        if span and self._drawn(mischief.fail):
            self._ended[number] = "the write failed"
            return
        times = 0 if span and self._drawn(mischief.lose) else 2 if span and self._drawn(mischief.double) else 1
        for _ in range(times):
            self._fabric.loop.later(0.0, self._fabric.write_s[1] / 2, landing.notify, manifest, node=landing.node)
        self._fabric.loop.call_later(random.uniform(0.0, self._fabric.write_s[1]), self._ended.setdefault, number, "")

    def _drawn(self, chance: float) -> bool:
        hit = chance > 0 and self._fabric.loop.random.random() < chance
        self._fabric.tampered += hit
        return hit

    def poll(self, handle: int) -> bool:
        """See `Link`."""
        reason = self._ended.get(handle)
        if reason:
            raise TransportError(reason)
        return reason is not None

    def close(self) -> None:
        """See `Link`: from now on the staging is not read."""
        self._closed = True


class SimBackend:
    """The transport of one process."""

    name = "simulated"

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._slabs: list[Buffer] = []

    def landing(self, me: Incarnation, peer: Incarnation, slab_bytes: int) -> Any:
        """See `Backend`."""
        node = NODE.get()
        assert node is not None
        memory = self._slabs.pop() if self._slabs else allocate_memory(slab_bytes)
        return SimLanding(self._fabric, node, memory, self._slabs.append)

    def link(self, me: Incarnation, peer: Incarnation, staging: Buffer) -> Any:
        """See `Backend`."""
        node = NODE.get()
        assert node is not None
        return SimLink(self._fabric, node)
