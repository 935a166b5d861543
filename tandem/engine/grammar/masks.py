"""The masks of one step: filled at once where that is quick, and else while the forward pass runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from tandem.device import upload
from tandem.engine.grammar.constraint import Bitmask
from tandem.engine.sequence import NO_DRAFT, Draft, Seq, TokenConstraint
from tandem.obs import about

log = logging.getLogger(__name__)

QUICK_S = 3e-4
"""Filling that takes no longer is not worth another thread: handing over costs 50 µs to a millisecond (measured)."""
HIDING = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0.0, -np.inf)
HIDING = HIDING.astype(np.float32)
"""What eight tokens' bits add to their logits."""

ALL = 0xFFFFFFFF
"""A word of which every token is allowed."""


class Allowed:
    """Which tokens some rows of a batch may take."""

    def __init__(self, rows: Sequence[int], bits: Bitmask) -> None:
        """rows: of the batch, in order. bits: `[len(rows), ceil(vocabulary / 32)]`."""
        self.rows = np.array(rows, dtype=np.int64)
        self.bits = bits

    def applied(self, logits: torch.Tensor) -> torch.Tensor:
        """A copy in which every other token of these rows is hidden. logits: `[batch rows, vocabulary]`, float32.

        Eight tokens at a time are looked up in a table: however many are allowed, that takes the same time, which
        branches do not. (XGrammar's own operation for CPUs writes behind the end of a row whose length is no multiple
        of 32.)
        """
        rows, vocab = torch.from_numpy(self.rows), logits.shape[1]
        if logits.device.type == "cpu":
            hiding = torch.from_numpy(HIDING.take(self.bits.view(np.uint8), axis=0).reshape(len(rows), -1)[:, :vocab])
            return logits + hiding if len(rows) == len(logits) else logits.index_add(0, rows, hiding)
        words = upload(torch.from_numpy(self.bits), logits.device)
        bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1
        rows = upload(rows, logits.device)
        hidden = logits[rows].masked_fill_(bits.flatten(1)[:, :vocab] == 0, -torch.inf)
        return logits.index_copy(0, rows, hidden)


class Filled:
    """Masks that are there already, in the place of a `Future` of them."""

    def __init__(self, allowed: Allowed) -> None:
        self._allowed = allowed

    def result(self) -> Allowed:
        """The masks."""
        return self._allowed


class _Bound(NamedTuple):
    """A sequence with an active grammar, its draft, and where its first row is among those that are sampled."""

    seq: Seq
    draft: Draft
    first: int


class MaskFiller:
    """Fills masks at once, or, where the last ones took long, on a thread: XGrammar computes outside Python's lock."""

    def __init__(self, vocab_size: int, quick_s: float = QUICK_S) -> None:
        """quick_s: up to so much processor time, as the last masks let expect, those of a step are filled at once."""
        self._words = -(-vocab_size // 32)
        self._last_word = np.uint32(ALL >> -vocab_size % 32).view(np.int32)
        """Of the last word, the bits that are tokens."""
        self._quick_s = quick_s
        self._row_s = 0.0
        """Processor time of a row, of the last masks."""
        self._thread: ThreadPoolExecutor | None = None

    def start(self, seqs: Sequence[Seq], drafts: Sequence[Draft] = ()) -> Filled | Future[Allowed] | None:
        """Begins with the masks of those sequences that have an active grammar; None when there is none.

        drafts: of each sequence, already pruned; each node has a row of its own behind that of its sequence.
        """
        bound, rows = list[_Bound](), 0
        for seq, draft in zip(seqs, drafts or [NO_DRAFT] * len(seqs), strict=True):
            if seq.constraint is not None and seq.constraint.active:
                bound.append(_Bound(seq, draft, rows))
            rows += 1 + len(draft)
        if not bound:
            return None
        if self._row_s * sum(1 + len(draft) for _, draft, _ in bound) <= self._quick_s:
            return Filled(self._fill(bound))
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "masks")
        return self._thread.submit(self._fill, bound)

    def _fill(self, bound: Sequence[_Bound]) -> Allowed:
        started = time.thread_time()
        rows = [each.first + at for each in bound for at in range(1 + len(each.draft))]
        bits = np.zeros((len(rows), self._words), dtype=np.int32)
        at = 0
        for seq, draft, _ in bound:
            _fill_rows(seq, draft, bits[at : at + 1 + len(draft)])
            at += 1 + len(draft)
        bits[:, -1] &= self._last_word
        some = np.any(bits, axis=1, keepdims=True).ravel().tolist()
        at = 0
        for seq, draft, _ in bound:
            _constraint(seq).stuck = not some[at]
            if seq.sampling.ignore_eos or seq.output_len < seq.sampling.min_tokens:
                for row, ahead in enumerate((0, *draft.depths())):
                    _hide_ends(bits[at + row], seq, ahead)
            at += 1 + len(draft)
        self._row_s = (time.thread_time() - started) / len(rows)
        return Allowed(rows, bits)


def _fill_rows(seq: Seq, draft: Draft, bits: Bitmask) -> None:
    constraint = _constraint(seq)
    try:
        constraint.fill(bits, 0)
        if len(draft):
            constraint.fill_draft(draft, bits, 1)
    except Exception:  # its own sequence ends, for want of a token; the others must not notice
        log.exception("the grammar of %s failed; it ends", seq.seq_id, extra=about(seq.request_id))
        bits[:] = 0


def _constraint(seq: Seq) -> TokenConstraint:
    assert seq.constraint is not None
    return seq.constraint


def _hide_ends(row: Bitmask, seq: Seq, ahead: int) -> None:
    """Before `min_tokens`, or with `ignore_eos`, a text goes on where it can; where it can only end, it ends.

    ahead: drafted tokens before.
    """
    early = seq.output_len + ahead < seq.sampling.min_tokens
    if not early and not seq.sampling.ignore_eos:
        return
    ends = _constraint(seq).ends
    if early:
        ends |= seq.eos_ids
    words = row.view(np.uint32)
    hidden = [token for token in ends if token < len(words) * 32 and words.item(token // 32) >> token % 32 & 1]
    for token in hidden:
        words[token // 32] &= ALL ^ (1 << token % 32)
    if not row.any():
        for token in hidden:
            words[token // 32] |= 1 << token % 32


def fits(constraint: TokenConstraint, vocab_size: int) -> bool:
    """Whether some token can begin the text at all."""
    mask = np.zeros((1, -(-vocab_size // 32)), dtype=np.int32)
    constraint.fill(mask, 0)
    return bool(mask.any())
