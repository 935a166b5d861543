"""JSON checked while it comes (RFC 8259): how far a text can still become one JSON value."""

from __future__ import annotations

import re

MAX_DEPTH = 100
"""Objects and lists inside one another; deeper text counts as no JSON."""

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_WORDS = {"t": "rue", "f": "alse", "n": "ull"}
_DIGITS = "0123456789"

# A number as a finite automaton: state -> characters -> next state.
_NUMBER = {
    "-": {"0": "0", "123456789": "integer"},
    "0": {".": ".", "eE": "e"},
    "integer": {_DIGITS: "integer", ".": ".", "eE": "e"},
    ".": {_DIGITS: "fraction"},
    "fraction": {_DIGITS: "fraction", "eE": "e"},
    "e": {"+-": "sign", _DIGITS: "exponent"},
    "sign": {_DIGITS: "exponent"},
    "exponent": {_DIGITS: "exponent"},
}
_WHOLE_NUMBERS = ("0", "integer", "fraction", "exponent")


class JsonScanner:
    """A pushdown automaton over the characters of one JSON value; whitespace may precede it, and nothing follows it."""

    def __init__(self) -> None:
        self.done = False
        """The value is complete. A number is when another character follows it."""
        self.failed = False
        """The next character cannot stand where it stands."""
        self._state = "value"
        self._open: list[str] = []
        self._is_key = False
        self._word = ""
        self._hex = 0

    def feed(self, text: str, at: int = 0) -> int:
        """Reads `text` from `at`; returns where the value ended, or failed, or the text did."""
        while at < len(text) and not self.done and not self.failed:
            at = self._step(text, at)
        return at

    def _step(self, text: str, at: int) -> int:
        if self._state == "string":
            return self._string(text, at)
        char = text[at]
        if self._state in _NUMBER:
            return self._number(char, at)
        match self._state:
            case "escape":
                self._hex = 4 if char == "u" else 0
                return self._take(at, char in '"\\/bfnrtu', "hex" if self._hex else "string")
            case "hex":
                self._hex -= 1
                return self._take(at, char in "0123456789abcdefABCDEF", "hex" if self._hex else "string")
            case "word":
                fits, self._word = char == self._word[0], self._word[1:]
                if fits and not self._word:
                    self._value_done()
                    return at + 1
                return self._take(at, fits, "word")
        if char in " \t\r\n":
            return at + 1
        return self._token(char, at)

    def _token(self, char: str, at: int) -> int:
        """A character between values."""
        state = self._state
        if state == "colon":
            return self._take(at, char == ":", "value")
        if char == "," and state == "next":
            return self._take(at, True, "key" if self._open[-1] == "{" else "value")
        if char in "}]" and state in ("next", "first key", "first value"):
            if self._open.pop() != ("{" if char == "}" else "["):
                return self._take(at, False, state)
            self._value_done()
            return at + 1
        if state in ("key", "first key"):
            self._is_key = True
            return self._take(at, char == '"', "string")
        if state in ("value", "first value"):
            return self._value(char, at)
        return self._take(at, False, state)

    def _value(self, char: str, at: int) -> int:
        self._is_key = False
        if char == '"':
            return self._take(at, True, "string")
        if char in "{[":
            self._open.append(char)
            return self._take(at, len(self._open) <= MAX_DEPTH, "first key" if char == "{" else "first value")
        if char in _WORDS:
            self._word = _WORDS[char]
            return self._take(at, True, "word")
        number = "-" if char == "-" else "0" if char == "0" else "integer"
        return self._take(at, char == "-" or char in _DIGITS, number)

    def _string(self, text: str, at: int) -> int:
        plain = _PLAIN.match(text, at)
        assert plain is not None
        at = plain.end()
        if at == len(text):
            return at
        if text[at] == '"':
            if self._is_key:
                self._state = "colon"
            else:
                self._value_done()
            return at + 1
        return self._take(at, text[at] == "\\", "escape")

    def _number(self, char: str, at: int) -> int:
        for chars, state in _NUMBER[self._state].items():
            if char in chars:
                return self._take(at, True, state)
        self.failed = self._state not in _WHOLE_NUMBERS
        if not self.failed:
            self._value_done()
        return at

    def _take(self, at: int, fits: bool, state: str) -> int:
        self.failed = not fits
        self._state = state
        return at + 1 if fits else at

    def _value_done(self) -> None:
        self.done = not self._open
        self._state = "next"
