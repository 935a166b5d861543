"""The masks of one step, filled while the forward pass runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import torch

from tandem.device import upload
from tandem.engine.sequence import Seq, TokenConstraint

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


class MaskFiller:
    """Fills masks on a thread of their own: XGrammar computes outside of Python's lock."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def start(self, seqs: Sequence[Seq]) -> Future[Allowed] | None:
        """Begins with the masks of those sequences that have an active grammar; None when there is none."""
        bound = [(row, seq) for row, seq in enumerate(seqs) if seq.constraint is not None and seq.constraint.active]
        if not bound:
            return None
        filled: Future[Allowed] = Future()
        threading.Thread(target=self._run, args=(bound, filled), name="masks", daemon=True).start()
        return filled

    def _run(self, bound: Sequence[tuple[int, Seq]], filled: Future[Allowed]) -> None:
        try:
            filled.set_result(self._fill(bound))
        except BaseException as error:  # noqa: BLE001 - it is raised where the mask is asked for
            filled.set_exception(error)

    def _fill(self, bound: Sequence[tuple[int, Seq]]) -> Allowed:
        words = -(-self._vocab_size // 32)
        mask = np.zeros((len(bound), words), dtype=np.int32)
        for at, (_, seq) in enumerate(bound):
            constraint = seq.constraint
            assert constraint is not None
            try:
                constraint.fill(mask, at)
            except Exception:  # its own sequence ends, for want of a token; the others must not notice
                log.exception("the grammar of %s failed; it ends", seq.seq_id)
                mask[at], constraint.stuck = 0, True
        allowed = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")[:, : self._vocab_size].view(bool)
        for at, (_, seq) in enumerate(bound):
            _hide_ends(allowed[at], seq)
        return Allowed([row for row, _ in bound], torch.from_numpy(allowed))


def _hide_ends(allowed: np.ndarray[tuple[int], np.dtype[np.bool_]], seq: Seq) -> None:
    """Before `min_tokens` a text goes on where it can; where it can only end, it ends."""
    ends = [token for token in seq.eos_ids if token < len(allowed)]
    if seq.output_len < seq.sampling.min_tokens and allowed.sum() > allowed[ends].sum():
        allowed[ends] = False


def fits(constraint: TokenConstraint, vocab_size: int) -> bool:
    """Whether some token can begin the text at all."""
    mask = np.zeros((1, -(-vocab_size // 32)), dtype=np.int32)
    constraint.fill(mask, 0)
    return bool(mask.any())
