"""Drafts by prompt lookup: what followed the same tokens before, in this text or in others of the same cache root.

Saxena 2023, "Prompt lookup decoding"; Yang et al. 2023, arXiv:2304.04487 (inference with reference). It costs
microseconds, and is right where texts quote: code that is edited, documents that are summarised, answers given again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from tandem.engine.sequence import NO_DRAFT, Draft, Row, Seq
from tandem.engine.spec.text_index import BREAK, LENGTHS, TextIndex

ROOT_TOKENS = 1 << 16
"""Tokens that are remembered of the texts of one hash root: the last so many, and up to as many before them."""
ROOTS = 16
"""Roots whose texts are remembered; the one that was not used for longest goes."""


class RootTexts:
    """The texts of one hash root that went through the prefix cache: two indices, of which the older one is dropped."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._newer, self._older = TextIndex(), TextIndex()

    def add(self, tokens: Sequence[int]) -> None:
        """Remembers a run of tokens."""
        if len(self._newer) + len(tokens) > self._most:
            self._newer, self._older = TextIndex(), self._newer
        self._newer.extend([*tokens[-self._most :], BREAK])

    def find(self, tail: Sequence[int], limit: int) -> tuple[int, list[int]]:
        """See `TextIndex.find`."""
        newer, older = self._newer.find(tail, limit), self._older.find(tail, limit)
        return newer if newer[0] >= older[0] else older

    def __len__(self) -> int:
        return len(self._newer) + len(self._older)


class NgramDrafter:
    """See `Drafter`. Sequences of different hash roots, which tenants have, never see each other's texts."""

    name = "ngram"
    free = True
    branches = 1

    def __init__(self, caching: bool = True, root_tokens: int = ROOT_TOKENS) -> None:
        """caching: whether texts may be remembered beyond their sequences, as the prefix cache does."""
        self._caching = caching
        self._root_tokens = root_tokens
        self._own: dict[str, TextIndex] = {}
        self._roots: OrderedDict[bytes, RootTexts] = OrderedDict()

    def propose(self, seqs: Sequence[Seq], limits: Sequence[int]) -> list[Draft]:
        """See `Drafter`."""
        return [self._one(seq, limit) for seq, limit in zip(seqs, limits, strict=True)]

    def _one(self, seq: Seq, limit: int) -> Draft:
        index = self._own.get(seq.seq_id)
        if index is None:
            index = self._own[seq.seq_id] = TextIndex(len(seq.tokens) + 64)
        index.extend(seq.tokens[len(index) :])
        tail = seq.tokens[-LENGTHS[-1] :]
        length, found = index.find(tail, limit)
        if length < LENGTHS[-1] and (texts := self._roots.get(seq.root)) is not None:
            length, found = max((length, found), texts.find(tail, limit), key=lambda each: each[0])
        return Draft(tuple(found), kind=length) if found else NO_DRAFT

    def committed(self, row: Row, accepted: Sequence[int]) -> None:
        """See `Drafter`. Nothing to do: the next proposal reads the sequence's tokens."""

    def forget(self, seq: Seq) -> None:
        """See `Drafter`. What the sequence had computed, and did not find in the cache, is remembered for others."""
        self._own.pop(seq.seq_id, None)
        if not self._caching:
            return
        fresh = seq.tokens[max(seq.cached_tokens - LENGTHS[-1], 0) : seq.computed]
        if len(fresh) <= LENGTHS[0]:
            return
        texts = self._roots.pop(seq.root, None) or RootTexts(self._root_tokens)
        self._roots[seq.root] = texts
        texts.add(fresh)
        if len(self._roots) > ROOTS:
            self._roots.popitem(last=False)
