"""Prompts that begin alike and come together are computed once: who is second waits for what the first computes."""

from __future__ import annotations

from tandem.engine.memory import match_limit
from tandem.engine.radix import TOKEN_BYTES, common_bytes
from tandem.engine.sequence import Seq, SeqState

LEAST_TOKENS = 16
"""Less than so many common tokens are computed twice: that costs less than a step's wait."""


class Twins:
    """The prompts that are being computed, and who waits for one of them.

    Every step brings a running sequence on, and shares its whole pages with the cache: nobody waits for ever. Who waits
    has the common part when it is computed, which it would not have sooner by computing it, too, in the same steps.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._computing: dict[str, tuple[Seq, bytes]] = {}
        self._awaited: dict[str, tuple[Seq, int]] = {}
        """By who waits: for whom, until so many tokens are computed."""

    def started(self, seq: Seq, packed: bytes) -> None:
        """A sequence runs. packed: its tokens."""
        self._awaited.pop(seq.seq_id, None)
        self._computing[seq.seq_id] = seq, packed

    def forget(self, seq: Seq) -> None:
        """A sequence neither runs nor waits any more."""
        self._computing.pop(seq.seq_id, None)
        self._awaited.pop(seq.seq_id, None)

    def waits(self, seq: Seq, packed: bytes, ready: int) -> bool:
        """Whether a queued sequence, of which `ready` tokens need no computing, should wait for one that runs."""
        known = self._awaited.pop(seq.seq_id, None)
        if known is None or not _goes_on(*known):
            known = self._find(seq, packed, ready)
        if known is not None:
            self._awaited[seq.seq_id] = known
        return known is not None

    def _find(self, seq: Seq, packed: bytes, ready: int) -> tuple[Seq, int] | None:
        first = self._page_size * TOKEN_BYTES
        limit = match_limit(seq)
        for name, (other, tokens) in list(self._computing.items()):
            if other.state is not SeqState.RUNNING or other.due <= 1:
                del self._computing[name]
            elif other.root == seq.root and tokens[:first] == packed[:first]:
                pages = common_bytes(tokens, packed) // first
                until = pages * self._page_size
                if min(until, limit) - ready >= LEAST_TOKENS and _goes_on(other, until):
                    return other, until
        return None


def _goes_on(other: Seq, until: int) -> bool:
    return other.state is SeqState.RUNNING and other.computed < until
