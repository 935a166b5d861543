"""How a prompt's tokens are cut into spans, and how many spans may be on their way. Pure.

Who writes what: a sender writes every plane and layer of a span's tokens in one piece, in the order of `KvLayout`, but
of layers with a window only what `KvLayout.shares` says; page sizes do not exist here, so the two ends may differ in
theirs.
"""

from __future__ import annotations

from collections.abc import Iterator

from tandem.errors import ConfigError
from tandem.kv import KvLayout, Span

SLAB_SPANS = 8
"""A slab holds at least this many spans, so that some land while others are written."""

AHEAD_SPANS = 4
"""Spans granted ahead of what the sender has computed, at most."""


def cut(start: int, end: int, span_tokens: int) -> Iterator[Span]:
    """Spans that cover `[start, end)`, cut at multiples of `span_tokens`: all cuts of a prompt share their borders."""
    if span_tokens < 1 or start < 0:
        raise ValueError(f"cannot cut from {start} by {span_tokens} tokens")
    while start < end:
        stop = min(end, (start // span_tokens + 1) * span_tokens)
        yield Span(start, stop - start)
        start = stop


def span_limit(layout: KvLayout, span_tokens: int, slab_bytes: int, max_bytes: int = 0) -> int:
    """Tokens in a span: as wished, but `SLAB_SPANS` of them fit the slab and none exceeds `max_bytes` (0: no limit).

    Raises ConfigError when not even a token fits.
    """
    limit = slab_bytes // SLAB_SPANS
    if max_bytes:
        limit = min(limit, max_bytes)
    tokens = min(span_tokens, limit // layout.token_bytes)
    if tokens < 1:
        raise ConfigError(
            f"a token's KV is {layout.token_bytes} bytes; slab and staging leave {limit} bytes for a span"
        )
    return tokens


def ahead(slab_spans: int, tickets: int) -> int:
    """Spans that a ticket may hold grants for beyond what is computed: its share of what all may, but one at least."""
    return max(1, min(AHEAD_SPANS, ahead_together(slab_spans) // max(1, tickets)))


def ahead_together(slab_spans: int) -> int:
    """Such spans of all tickets: half of the slab.

    A grant for a span that is not computed yet is slab space that nobody uses; it must not starve other tickets.
    """
    return max(1, slab_spans // 2)
