"""A drafter that guesses well or badly, as it is told."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tandem.engine.sequence import ROOT, Draft, Row, Seq


class GuessingDrafter:
    """Drafts a known continuation with errors in it, as chains or as trees."""

    name = "guess"
    free = False
    branches = 1

    def __init__(self, answer: Callable[[Seq], Sequence[int]], vocab_size: int, trees: bool, seed: int = 0) -> None:
        """answer: a sequence's whole output, as far as it is known."""
        self.committed_rows: list[tuple[str, int, tuple[int, ...]]] = []
        """(seq_id, drafted, accepted nodes) of every row."""
        self.forgotten: list[str] = []
        self._answer = answer
        self._vocab_size = vocab_size
        self._trees = trees
        self._random = random.Random(seed)

    def propose(self, seqs: Sequence[Seq], limits: Sequence[int]) -> list[Draft]:
        """See `Drafter`."""
        return [self._one(seq, limit) for seq, limit in zip(seqs, limits, strict=True)]

    def _one(self, seq: Seq, limit: int) -> Draft:
        """Of a tree, the true path is anywhere among its nodes."""
        true = list(self._answer(seq))[seq.output_len :][: self._random.randint(0, limit)]
        chain = [token if self._random.random() < 0.8 else self._random.randrange(self._vocab_size) for token in true]
        if not self._trees:
            return Draft(tuple(chain))
        tokens, parents, at = list[int](), list[int](), ROOT
        for token in chain:
            for _ in range(self._random.choice([0, 0, 1, 2])):
                parent = self._random.randint(ROOT, len(tokens) - 1)
                pair = (parent, self._random.randrange(self._vocab_size))
                if pair not in zip(parents, tokens, strict=True) and pair != (at, token):
                    parents.append(parent)
                    tokens.append(pair[1])
            if (at, token) in zip(parents, tokens, strict=True):
                break
            parents.append(at)
            tokens.append(token)
            at = len(tokens) - 1
        whole = Draft(tuple(tokens), tuple(parents))
        return whole.keep(range(min(len(whole), limit)))

    def committed(self, row: Row, accepted: Sequence[int]) -> None:
        """See `Drafter`."""
        self.committed_rows.append((row.seq.seq_id, len(row.draft), tuple(accepted)))

    def forget(self, seq: Seq) -> None:
        """See `Drafter`."""
        self.forgotten.append(seq.seq_id)
