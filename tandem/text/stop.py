"""Stop strings: text goes through until one of them appears, wherever token boundaries fall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class _Pattern:
    """One stop string and how much of it the text read so far ends with (Knuth, Morris, Pratt 1977)."""

    text: str
    failure: list[int]
    matched: int = 0

    def advance(self, char: str) -> bool:
        """Reads one character; True when the whole string has just been read."""
        while self.matched and self.text[self.matched] != char:
            self.matched = self.failure[self.matched - 1]
        if self.text[self.matched] == char:
            self.matched += 1
        return self.matched == len(self.text)


class StopStrings:
    """Finds the first stop string to be completed (the longest, if several end together).

    Text that may turn out to be the start of a stop string is held back; the stop string itself is never given out.
    Linear in the text for each string, whatever the strings are.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: non-empty strings."""
        self._patterns = [_Pattern(stop, _failure(stop)) for stop in stops]
        self._held = ""
        self.hit: str | None = None
        """The stop string that was found."""

    def feed(self, piece: str) -> str:
        """The text that can be given out now. After a hit it is always empty."""
        if self.hit is not None:
            return ""
        if not self._patterns:
            return piece
        text = self._held + piece
        for end in range(len(self._held), len(text)):
            done = [pattern.text for pattern in self._patterns if pattern.advance(text[end])]
            if done:
                self.hit = max(done, key=len)
                self._held = ""
                return text[: end + 1 - len(self.hit)]
        keep = max(pattern.matched for pattern in self._patterns)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back; the text ends here."""
        held, self._held = self._held, ""
        return held


def _failure(text: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is also a prefix."""
    table = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = table[length - 1]
        if text[index] == text[length]:
            length += 1
        table[index] = length
    return table
