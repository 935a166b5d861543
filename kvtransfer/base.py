"""The interfaces of the hand-over, and the small nouns both ends share.

The receiver's end is a `Landing`, the sender's a `Link`; a `Backend` makes both. Bytes go one way only: a link writes
into the slab of the landing it was connected to, and nowhere else. A sender sends from a `KvSource`, a receiver lands
into a `SpanSink`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tandem.cluster import UNWATCHED, Incarnation, TicketWatch, WorkerInfo
from tandem.kv import KvLayout, Span
from tandem.types import TokenIds

Buffer = npt.NDArray[np.uint8]
"""One-dimensional and contiguous."""

MIB = 1 << 20

WARM_BYTES = MIB
"""Bytes of the warm-up write, less where slab or staging is smaller: large enough to take the bulk path."""

WARM_TICKET = "0" * 32
"""The ticket id of the warm-up write."""


class TransportError(Exception):
    """A write, or the way to the peer, failed. Nothing is known about other writes on the same link."""


class Landing(Protocol):
    """The receiver's end of one pair: a slab that exactly one peer incarnation can write."""

    memory: Buffer
    """The slab."""

    def metadata(self) -> bytes:
        """What the peer's `Link.connect` needs."""

    def guard(self, allows: Callable[[int, int], bool]) -> None:
        """Transports that can refuse single writes ask `allows(offset, length)` before each, on any thread."""

    def poll(self) -> list[bytes]:
        """Manifests of writes that have landed since the last call; never blocks. Raises TransportError."""

    def close(self) -> None:
        """Makes it impossible for the peer ever to write here again. May block; afterwards the memory is safe."""


class Link(Protocol):
    """The sender's end of one pair. `post` and `poll` are called on the transfer thread only."""

    def connect(self, metadata: bytes) -> None:
        """Reaches the landing. May block. Raises TransportError."""

    def post(self, view: Buffer, offset: int, manifest: bytes) -> Any:
        """Starts to write `view`, a part of the staging, at the slab's `offset`; the manifest arrives after it."""

    def poll(self, handle: Any) -> bool:
        """Whether the write is complete at the receiver. Raises TransportError."""

    def close(self) -> None:
        """Gives the link up; afterwards the staging is not read any more. May block."""


class Backend(Protocol):
    """A transport. Both makers may block for a second: call them off the event loop. Both raise TransportError."""

    @property
    def name(self) -> str:
        """nixl, tcp or inproc."""

    def landing(self, me: Incarnation, peer: Incarnation, slab_bytes: int) -> Landing:
        """A landing for one peer incarnation."""

    def link(self, me: Incarnation, peer: Incarnation, staging: Buffer) -> Link:
        """A link, not yet connected, that sends from `staging`."""


OnProgress = Callable[[int], None]


class KvSource(Protocol):
    """Where a sender's KV comes from: an engine. All methods are called on the event loop."""

    async def open(
        self,
        ticket_id: str,
        tokens: TokenIds,
        salt: str,
        adapter: str,
        priority: int,
        on_progress: OnProgress,
        tenant: str = "",
        cached_only: bool = False,
    ) -> int:
        """Accepts a prompt and returns how many of its tokens are cached; these can be exported at once.

        cached_only: a prompt that is not cached as a whole is refused, and nothing is computed.
        `on_progress(computed)` may be called from any thread whenever tokens `[0, computed)` can be exported. Raises
        TandemError when the prompt is refused; the text goes to the receiver.
        """

    async def export(self, ticket_id: str, span: Span, out: Buffer) -> None:
        """Gathers what moves of a span in the canonical order into `out`; returns when `out` is complete."""

    def give_up(self, ticket_id: str) -> None:
        """Nobody wants the rest of a ticket: exports that wait for something raise Unavailable. May be called again."""

    async def close(self, ticket_id: str) -> None:
        """Ends a ticket. Called exactly once after each `open`, also when that raised or was cancelled."""


class SpanSink(Protocol):
    """Where a receiver's spans go: an engine's pages. All methods are called on the event loop."""

    async def reserve(self) -> int | None:
        """Waits for room for the whole prompt; returns the first token still wanted, or None to give up.

        Tokens before `KvLayout.moved_from` are not moved, wanted or not.
        """

    async def land(self, span: Span, data: Buffer) -> None:
        """Takes a verified span. Spans come one at a time, not always in order; `data` is used again afterwards."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What both ends compare before any byte moves."""

    incarnation: Incarnation
    layout: KvLayout
    fingerprint: str

    @classmethod
    def of(cls, info: WorkerInfo) -> Identity:
        """The identity of a worker."""
        return cls(info.incarnation, info.layout, info.model.fingerprint)


@dataclass(frozen=True, slots=True)
class FetchResult:
    """How a fetch ended. Whatever `error` says, what moves from the first token wanted to `landed_until` has landed."""

    landed_until: int
    sender_cached: int = 0
    """Prompt tokens the sender had cached when it accepted."""
    bytes: int = 0
    seconds: float = 0.0
    """From the first grant to the end; includes waiting for the sender to compute."""
    error: str = ""
    """Empty when everything wanted has landed, or when the sink gave up."""
    arrived_at: float = 0.0
    """When the last span had come, on the clock of the event loop; 0 if none has."""
    link_failed: bool = False
    """Whether it was the way between the two: a sender that refuses, or computes too late, can be reached."""


def _ignore(*_: object) -> None:
    """A hook nobody listens to."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """Measurements, called on the event loop."""

    moved: Callable[[Incarnation, str, int, float], None] = _ignore
    """(peer, transport, bytes, seconds): at the sender each write, at the receiver each fetch with its whole time."""
    failed: Callable[[str], None] = _ignore
    """The kind of a failure."""
    open_tickets: Callable[[int], None] = _ignore
    """+1 and -1 as tickets are opened and quiesced."""
    pending_sends: Callable[[int], None] = _ignore
    """+1 and -1 as writes are posted and end."""
    quarantined: Callable[[int], None] = _ignore
    """+bytes and -bytes of slabs that a peer that was given up may still write."""
    watch: Callable[[str, str, str], TicketWatch] = lambda *_: UNWATCHED
    """(ticket id, `traceparent`, `tracestate`): who is told of a traced ticket that is being opened."""
