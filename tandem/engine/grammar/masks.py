"""The masks of one step, filled while the forward pass runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tandem.device import upload
from tandem.engine.sequence import NO_DRAFT, Draft, Seq, TokenConstraint

log = logging.getLogger(__name__)


class Allowed:
    """Which tokens some rows of a batch may take."""

    def __init__(self, rows: Sequence[int], tokens: torch.Tensor) -> None:
        """rows: of the batch. tokens: bool `[len(rows), vocabulary]`."""
        self.rows = torch.tensor(rows, device=tokens.device)
        self.tokens = tokens

    def apply(self, logits: torch.Tensor) -> None:
        """Hides every other token of these rows; in place. logits: `[batch rows, vocabulary]`."""
        rows, tokens = upload(self.rows, logits.device), upload(self.tokens, logits.device)
        logits[rows] = logits[rows].masked_fill_(~tokens, -torch.inf)


class _Bound(NamedTuple):
    """A sequence with an active grammar, its draft, and where its first row is among those that are sampled."""

    seq: Seq
    draft: Draft
    first: int


class MaskFiller:
    """Fills masks on a thread of their own: XGrammar computes outside of Python's lock."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def start(self, seqs: Sequence[Seq], drafts: Sequence[Draft] = ()) -> Future[Allowed] | None:
        """Begins with the masks of those sequences that have an active grammar; None when there is none.

        drafts: of each sequence, already pruned; each node has a row of its own behind that of its sequence.
        """
        bound, at = list[_Bound](), 0
        for seq, draft in zip(seqs, drafts or [NO_DRAFT] * len(seqs), strict=True):
            if seq.constraint is not None and seq.constraint.active:
                bound.append(_Bound(seq, draft, at))
            at += 1 + len(draft)
        if not bound:
            return None
        filled: Future[Allowed] = Future()
        threading.Thread(target=self._run, args=(bound, filled), name="masks", daemon=True).start()
        return filled

    def _run(self, bound: Sequence[_Bound], filled: Future[Allowed]) -> None:
        try:
            filled.set_result(self._fill(bound))
        except BaseException as error:  # noqa: BLE001 - it is raised where the mask is asked for
            filled.set_exception(error)

    def _fill(self, bound: Sequence[_Bound]) -> Allowed:
        rows = [each.first + at for each in bound for at in range(1 + len(each.draft))]
        mask = np.zeros((len(rows), -(-self._vocab_size // 32)), dtype=np.int32)
        at = 0
        for seq, draft, _ in bound:
            _fill_rows(seq, draft, mask[at : at + 1 + len(draft)])
            at += 1 + len(draft)
        allowed = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")[:, : self._vocab_size].view(bool)
        at = 0
        for seq, draft, _ in bound:
            for ahead in (0, *draft.depths()):
                _hide_ends(allowed[at], seq, ahead)
                at += 1
        return Allowed(rows, torch.from_numpy(allowed))


def _fill_rows(seq: Seq, draft: Draft, mask: NDArray[np.int32]) -> None:
    constraint = seq.constraint
    assert constraint is not None
    try:
        constraint.fill(mask, 0)
        if len(draft):
            constraint.fill_draft(draft, mask, 1)
    except Exception:  # its own sequence ends, for want of a token; the others must not notice
        log.exception("the grammar of %s failed; it ends", seq.seq_id)
        mask[:], constraint.stuck = 0, True


def _hide_ends(allowed: NDArray[np.bool_], seq: Seq, ahead: int) -> None:
    """Before `min_tokens` a text goes on where it can; where it can only end, it ends. ahead: drafted tokens before."""
    ends = [token for token in seq.eos_ids if token < len(allowed)]
    if seq.output_len + ahead < seq.sampling.min_tokens and allowed.sum() > allowed[ends].sum():
        allowed[ends] = False


def fits(constraint: TokenConstraint, vocab_size: int) -> bool:
    """Whether some token can begin the text at all."""
    mask = np.zeros((1, -(-vocab_size // 32)), dtype=np.int32)
    constraint.fill(mask, 0)
    return bool(mask.any())
