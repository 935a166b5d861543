"""Fakes of the two ends of a hand-over: a source whose KV is a function of the tokens, and a sink that keeps it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tandem.errors import Overloaded, Unavailable
from tandem.kv import KvLayout, LayerGroup, Plane, Span
from tandem.types import TokenIds

Buffer = npt.NDArray[np.uint8]


def small_layout(layers: int = 2, heads: int = 2, head_dim: int = 8, windows: Sequence[int | None] = ()) -> KvLayout:
    """K and V in bfloat16; 128 bytes a token by default. windows: of layer groups that share the layers in turn."""
    planes = (Plane("k", heads, head_dim, "bfloat16"), Plane("v", heads, head_dim, "bfloat16"))
    count = max(len(windows), 1)
    spans = windows or (None,)
    return KvLayout(planes, tuple(LayerGroup(tuple(range(n, layers, count)), span) for n, span in enumerate(spans)))


def span_kv(layout: KvLayout, tokens: TokenIds, span: Span) -> Buffer:
    """What moves of a span of `tokens`, in canonical order: bytes of plane, layer, position and token id."""
    shares = layout.shares(span, len(tokens))
    parts = []
    for number, plane in enumerate(layout.planes):
        for layer, group in enumerate(layout.layer_groups):
            if plane not in layout.planes_of(layout.groups[group]):
                continue
            share = shares[group]
            ids = np.array(tokens[share.start : share.end], dtype=np.uint32)
            positions = np.arange(share.start, share.end, dtype=np.uint32)
            row = ids * 2654435761 + positions * 40503 + np.uint32(number * 7919 + layer * 104729)
            inner = np.arange(plane.token_bytes, dtype=np.uint32) * 193
            parts.append((((row[:, None] + inner[None, :]) >> 7) & 255).astype(np.uint8).reshape(-1))
    return np.concatenate(parts)


@dataclass(slots=True)
class _Prompt:
    tokens: TokenIds
    on_progress: Callable[[int], None]
    cached: int


@dataclass
class FakeSource:
    """A `KvSource`: `cached` tokens are there at once, `advance` computes more, exports wait for `gate`."""

    layout: KvLayout
    cached: int = 1 << 40
    """Tokens of every prompt that are cached."""
    refuse: str = ""
    """Refuse every prompt with this text."""
    tamper: Callable[[Span, Buffer], None] | None = None
    """Changes an exported span."""
    prompts: dict[str, _Prompt] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)
    exported: list[tuple[str, Span]] = field(default_factory=list)
    given_up: set[str] = field(default_factory=set)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    async def open(
        self,
        ticket_id: str,
        tokens: TokenIds,
        salt: str,
        adapter: str,
        priority: int,
        on_progress: Callable[[int], None],
        tenant: str = "",
        cached_only: bool = False,
    ) -> int:
        """Accepts the prompt, or raises Overloaded, or Unavailable when only cached ones are wanted."""
        cached = min(self.cached, len(tokens))
        self.prompts[ticket_id] = _Prompt(tokens, on_progress, cached)
        if self.refuse:
            raise Overloaded(self.refuse)
        if cached_only and cached < len(tokens):
            raise Unavailable(f"only {cached} tokens are cached")
        return cached

    async def export(self, ticket_id: str, span: Span, out: Buffer) -> None:
        """Writes `span_kv` into `out`."""
        await self.gate.wait()
        if ticket_id in self.given_up:
            raise Unavailable("given up")
        out[:] = span_kv(self.layout, self.prompts[ticket_id].tokens, span)
        if self.tamper is not None:
            self.tamper(span, out)
        self.exported.append((ticket_id, span))

    def give_up(self, ticket_id: str) -> None:
        """Lets exports go on, and fail."""
        self.given_up.add(ticket_id)
        self.gate.set()

    async def close(self, ticket_id: str) -> None:
        """Forgets the prompt."""
        del self.prompts[ticket_id]
        self.closed.append(ticket_id)

    def advance(self, ticket_id: str, computed: int) -> None:
        """Tokens up to `computed` are there now."""
        self.prompts[ticket_id].on_progress(computed)


@dataclass
class FakeSink:
    """A `SpanSink` that keeps what lands. `first` None gives up; `room` holds `reserve` back while clear."""

    first: int | None = 0
    spans: dict[Span, Buffer] = field(default_factory=dict)
    room: asyncio.Event = field(default_factory=asyncio.Event)
    landing: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at the first span."""
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Holds `land` back while clear."""

    def __post_init__(self) -> None:
        self.room.set()
        self.gate.set()

    async def reserve(self) -> int | None:
        """Waits for `room`."""
        await self.room.wait()
        return self.first

    async def land(self, span: Span, data: Buffer) -> None:
        """Keeps the span; one that lands twice is a defect."""
        self.landing.set()
        await self.gate.wait()
        if span in self.spans:
            raise ValueError(f"{span} landed twice")
        self.spans[span] = data.copy()

    def holds(self, layout: KvLayout, tokens: TokenIds, start: int, end: int) -> bool:
        """Whether exactly `[start, end)` has landed, with the right bytes."""
        spans = sorted(self.spans, key=lambda span: span.start)
        covered = [token for span in spans for token in range(span.start, span.end)]
        right = all(np.array_equal(self.spans[span], span_kv(layout, tokens, span)) for span in spans)
        return right and covered == list(range(start, end))
