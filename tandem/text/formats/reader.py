"""Reading text of which the rest has not come yet: grammars are generators that yield while they need more."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

from tandem.text.formats.json_scanner import JsonScanner

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A part of a grammar. It yields when all text that there is was read, and is resumed when there is more."""

SPACES = " \t\r\n"


class Malformed(Exception):
    """The text does not follow the format; the reader stands at the first character that does not belong."""


class Reader:
    """Text with a position. Positions hold until `forget`.

    What a grammar reads depends on the text alone and never on how it came in parts: every method decides only when
    the characters that decide are there, or the text has ended.
    """

    def __init__(self) -> None:
        self.text = ""
        """What is kept of the text; at least everything after `at`."""
        self.at = 0
        """What was read of `text`."""
        self.ended = False
        """Nothing comes after `text`."""

    def forget(self) -> None:
        """Drops what was read; positions start anew."""
        self.text, self.at = self.text[self.at :], 0

    def peek(self) -> Steps[str]:
        """The next character, not read yet; empty at the end."""
        while self.at == len(self.text) and not self.ended:
            yield
        return self.text[self.at : self.at + 1]

    def spaces(self) -> Steps[None]:
        """Reads whitespace, if there is any."""
        while (char := (yield from self.peek())) and char in SPACES:
            self.at += 1

    def literal(self, wanted: str) -> Steps[bool]:
        """Reads exactly `wanted` and returns True, or reads nothing."""
        while not self.text.startswith(wanted, self.at):
            if self.ended or not wanted.startswith(self.text[self.at : self.at + len(wanted)]):
                return False
            yield
        self.at += len(wanted)
        return True

    def expect(self, wanted: str) -> Steps[None]:
        """Reads `wanted`. Raises Malformed when something else stands there."""
        if not (yield from self.literal(wanted)):
            raise Malformed

    def while_in(self, allowed: Callable[[str], bool], limit: int) -> Steps[str]:
        """Reads characters that are `allowed`. Raises Malformed when there are more than `limit`."""
        start = self.at
        while (char := (yield from self.peek())) and allowed(char):
            self.at += 1
            if self.at - start > limit:
                raise Malformed
        return self.text[start : self.at]

    def json(self, give: Callable[[str], None] | None = None) -> Steps[str]:
        """Reads one JSON value and returns its text; or gives the text out as it comes, and returns nothing.

        Raises Malformed at the first character that cannot go on as JSON, and when the text ends inside the value.
        """
        scanner, kept = JsonScanner(), ""
        while True:
            start = self.at
            self.at = scanner.feed(self.text, start)
            if give is None:
                kept += self.text[start : self.at]
            elif self.at > start:
                give(self.text[start : self.at])
            if scanner.done:
                return kept
            if scanner.failed or self.ended:
                raise Malformed
            yield
