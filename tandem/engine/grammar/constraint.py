"""One sequence's way through its grammar."""

from __future__ import annotations

import numpy as np
import xgrammar
from numpy.typing import NDArray

from tandem.types import TokenIds

Bitmask = NDArray[np.int32]
"""`[rows, ceil(vocabulary / 32)]`: bit t % 32 of word t // 32 says whether token t is allowed."""


class GrammarConstraint:
    """A `TokenConstraint` by XGrammar's matcher. Used by one thread at a time."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, after: TokenIds = ()) -> None:
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._after = after
        self._recent: list[int] = []
        self.active = not after

    @property
    def finished(self) -> bool:
        """Whether the text is complete and was ended by a stop token."""
        return bool(self._matcher.is_terminated())

    def fill(self, mask: Bitmask, row: int) -> None:
        """Writes which tokens may come next."""
        self._matcher.fill_next_token_bitmask(mask, row)

    def accept(self, token: int) -> None:
        """Takes the next token. Raises ValueError when the grammar does not allow it."""
        if self.active:
            if not self._matcher.accept_token(token):
                raise ValueError(f"token {token} is not allowed by the grammar")
            return
        self._recent = [*self._recent, token][-len(self._after) :]
        self.active = tuple(self._recent) == self._after

    def forced_text(self) -> str:
        """The text that must come next, whatever the model says; empty when there is a choice, or an end."""
        if not self.active or self.finished:
            return ""
        return str(self._matcher.find_jump_forward_string())
