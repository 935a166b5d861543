"""One sequence's way through its grammar."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xgrammar
from numpy.typing import NDArray

from tandem.engine.sequence import ROOT, Draft
from tandem.types import TokenIds

Bitmask = NDArray[np.int32]
"""`[rows, ceil(vocabulary / 32)]`: bit t % 32 of word t // 32 says whether token t is allowed."""
FORCED_CHARS = 512
"""Of a forced text, tokenised at once: the rest of a long one is not tokenised again for every token."""
UNDECIDED = 8
"""Tokens before such a cut that may be others in the whole text."""


class Vocabulary:
    """What a forced text needs to become tokens."""

    def __init__(self, info: xgrammar.TokenizerInfo, encode: Callable[[str], Sequence[int]]) -> None:
        """encode: a text's token ids, without any special ones."""
        self.encode = encode
        self.texts: list[bytes] = list(info.decoded_vocab)
        self.lengths = np.array([len(text) for text in self.texts], dtype=np.int64)


class GrammarConstraint:
    """A `TokenConstraint` by XGrammar's matcher. Used by one thread at a time."""

    def __init__(
        self, compiled: xgrammar.CompiledGrammar, vocabulary: Vocabulary | None = None, after: TokenIds = ()
    ) -> None:
        """vocabulary: None forces no text. after: see `Grammar.after`."""
        self.active = not after
        self.stuck = False
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self.ends = frozenset(self._matcher.stop_token_ids)
        self._vocabulary = vocabulary
        self._after = after
        self._recent: list[int] = []

    @property
    def finished(self) -> bool:
        """See `TokenConstraint`."""
        return bool(self._matcher.is_terminated())

    def fill(self, mask: Bitmask, row: int) -> None:
        """See `TokenConstraint`."""
        if not self._matcher.fill_next_token_bitmask(mask, row):
            mask[row] = -1

    def accept(self, token: int) -> None:
        """See `TokenConstraint`."""
        if self.active:
            if not self._matcher.accept_token(token):
                raise ValueError(f"token {token} is not allowed by the grammar")
            return
        self._recent = [*self._recent, token][-len(self._after) :]
        self.active = tuple(self._recent) == self._after

    def force(self, limit: int) -> list[int]:
        """See `TokenConstraint`.

        The text is tokenised as a whole. Its last token is left to the model where a longer one may stand in its place:
        what would follow decides that, and a model is used to the longer one. Of a long text a part is taken at a time.
        """
        if self._vocabulary is None or not self.active or self.finished:
            return []
        whole = self._forced_text()
        text = whole[:FORCED_CHARS]
        rest = text.encode()
        tokens = self._vocabulary.encode(text) if rest else ()
        if text != whole:  # what follows decides the last ones
            tokens = tokens[:-UNDECIDED]
        taken: list[int] = []
        for token in tokens[:limit]:
            spelled = self._vocabulary.texts[token] if token < len(self._vocabulary.texts) else b""
            if not spelled or not rest.startswith(spelled) or (spelled == rest and self._reaches_beyond(rest)):
                break
            if not self._matcher.accept_token(token):  # it ends texts, though it spells a part of this one
                break
            taken.append(token)
            rest = rest[len(spelled) :]
        return taken

    def prune(self, draft: Draft) -> Draft:
        """See `TokenConstraint`. Nor does a draft reach beyond the end of the text, or the token that ends thinking."""
        kept: list[int] = []
        if self.active:
            self._walk(draft, ROOT, kept.append)
        else:
            for node, token in enumerate(draft.tokens):
                if token != self._after[-1] and (draft.parent(node) == ROOT or draft.parent(node) in kept):
                    kept.append(node)
        return draft if len(kept) == len(draft) else draft.keep(sorted(kept))

    def fill_draft(self, draft: Draft, mask: Bitmask, row: int) -> None:
        """See `TokenConstraint`. Behind the end of a text nothing is hidden: what is sampled there is never taken."""

        def fill(node: int) -> None:
            if self.finished or not self._matcher.fill_next_token_bitmask(mask, row + node):
                mask[row + node] = -1

        self._walk(draft, ROOT, fill)

    def _walk(self, draft: Draft, node: int, visit: Callable[[int], None]) -> None:
        """Calls `visit` with every node behind `node` that is allowed, the matcher being where the node leads."""
        if self.finished:
            return
        for after in draft.children(node):
            if not self._matcher.accept_token(draft.tokens[after]):
                continue
            visit(after)
            self._walk(draft, after, visit)
            self._matcher.rollback(1)

    def _forced_text(self) -> str:
        """What the grammar leaves no choice about, up to where it ends within a character; none from within one on."""
        try:
            return str(self._matcher.find_jump_forward_string())
        except UnicodeDecodeError as cut:
            return bytes(cut.object[: cut.start]).decode()

    def _reaches_beyond(self, rest: bytes) -> bool:
        """Whether some allowed token is longer than the text that is forced."""
        assert self._vocabulary is not None
        lengths = self._vocabulary.lengths
        mask: Bitmask = np.zeros((1, -(-len(lengths) // 32)), dtype=np.int32)
        self._matcher.fill_next_token_bitmask(mask, 0)
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(lengths)]
        return bool((lengths[allowed.nonzero()[0]] > len(rest)).any())
