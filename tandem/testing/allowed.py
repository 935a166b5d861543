"""Which tokens a pattern leaves open after a text, by matching texts alone: what masks are checked against."""

from __future__ import annotations

from collections.abc import Sequence

import regex
import torch


class Pattern:
    """A regular expression over ASCII and the texts of a vocabulary."""

    def __init__(self, source: str, texts: Sequence[bytes]) -> None:
        """texts: of each token; an empty one is never allowed."""
        self.source = source
        self._pattern = regex.compile(source)
        self._texts = [text.decode("ascii") if text.isascii() else "" for text in texts]
        self._known: dict[str, torch.Tensor] = {}

    def allowed(self, tokens: Sequence[int]) -> torch.Tensor:
        """`[len(tokens), vocabulary]`, bool: which tokens could stand in the place of each.

        Only itself where the pattern left no choice about a token's text: that may be cut in any way. Raises
        ValueError where a token is not allowed.
        """
        before, rows = "", list[torch.Tensor]()
        for token in tokens:
            row, text = self._row(before), self._texts[token]
            if not row[token]:
                raise ValueError(f"token {token}, {text!r}, is not allowed after {before!r}")
            rows.append(row if not self._forced(before, text) else torch.arange(len(row)) == token)
            before += text
        return torch.stack(rows)

    def _may_follow(self, text: str) -> bool:
        return self._pattern.fullmatch(text, partial=True) is not None

    def _row(self, before: str) -> torch.Tensor:
        if before not in self._known:
            found = [bool(text) and self._may_follow(before + text) for text in self._texts]
            self._known[before] = torch.tensor(found)
        return self._known[before]

    def _forced(self, before: str, text: str) -> bool:
        """Whether each character of `text` is the only one that may stand in its place."""
        ascii_only = [chr(code) for code in range(128)]
        for at in range(len(text)):
            if sum(self._may_follow(before + text[:at] + other) for other in ascii_only) > 1:
                return False
        return True
