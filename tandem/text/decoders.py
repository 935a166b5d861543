"""Decoders of the `tokenizers` library as streams: a token goes in, the text that is certain by then comes out.

A decoder there is a list of steps, each a function from a list of strings to a list of strings; the text is their
concatenation. Each step is here a small state machine which, fed the same strings one after the other, gives the same
strings; what it withholds is what a later token can still change, and it is bounded:

- `Replace`, `WordPiece`, `Metaspace` and no decoder at all: nothing.
- `ByteLevel`: an incomplete character, at most 3 bytes.
- `ByteFallback`: a run of byte tokens that is valid UTF-8 so far, at most `LONGEST_RUN` bytes and a character, because
  one bad byte makes U+FFFD of each byte of the run.
- `Strip`: the characters at the end that it would take away, at most its `stop`.
- `BPEDecoder`: the last token from its first end-of-word mark on, which is no space at the text's end.
- clean-up, and `Replace` behind `Fuse`: what may start its pattern, which is at most a character less than the pattern.
  All of clean-up's patterns together withhold at most 19 characters, some spaces of them without need: a step does
  not know what the steps before it withhold.

`decoder_parser` makes them from what a tokeniser says.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from tandem.text.byte_tokens import BYTE_TOKEN, byte_level_bytes

LONGEST_RUN = 64
"""Bytes of a run of byte tokens after which its complete characters are given out, whatever follows.

Only from there on can a text differ from the one that is decoded at once, which has U+FFFD for the characters before
an invalid byte, too: a bound on the wait is worth more than a character less."""

CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
"""What transformers' `clean_up_tokenization` replaces, one after the other."""
WORDPIECE_CLEAN_UP = (*CLEAN_UP[:7], (" do not", " don't"), *CLEAN_UP[7:])
"""What the `WordPiece` decoder replaces in each token."""


def strip(token: str, content: str, start: int, stop: int) -> str:
    """`token` without up to `start` characters `content` at its start and up to `stop` at its end."""
    begin = 0
    while begin < min(start, len(token)) and token[begin] == content:
        begin += 1
    end = len(token)
    while end > max(begin, len(token) - stop) and token[end - 1] == content:
        end -= 1
    return token[begin:end]


class Step:
    """A step that changes nothing, and what every step has."""

    def feed(self, token: str) -> list[str]:
        """The strings that are certain once `token` has come."""
        return [token]

    def finish(self) -> list[str]:
        """The strings that are left when no token follows."""
        return []

    @property
    def held(self) -> int:
        """Characters withheld that will be given out if nothing objects."""
        return 0

    def spell(self, token: str, first: bool) -> str:
        """What `token` becomes inside a text. first: it is the text's first token."""
        return token


class Map(Step):
    """Changes each token by itself."""

    def __init__(self, change: Callable[[str], str]) -> None:
        self._change = change

    def feed(self, token: str) -> list[str]:
        """See `Step`."""
        return [self._change(token)]

    def spell(self, token: str, first: bool) -> str:
        """See `Step`."""
        return self._change(token)


class FirstDiffers(Step):
    """Changes each token by itself, and the first one in another way."""

    def __init__(self, first: Callable[[str], str], other: Callable[[str], str]) -> None:
        self._change = first
        self._first = first
        self._other = other

    def feed(self, token: str) -> list[str]:
        """See `Step`."""
        change, self._change = self._change, self._other
        return [change(token)]

    def spell(self, token: str, first: bool) -> str:
        """See `Step`."""
        return self._first(token) if first else self._other(token)


class ByteLevel(Step):
    """GPT-2's tokens are strings of bytes; invalid ones become U+FFFD, one for each maximal part of a character."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: str) -> list[str]:
        """See `Step`."""
        return [self._utf8.decode(byte_level_bytes(token))]

    def finish(self) -> list[str]:
        """See `Step`."""
        return [self._utf8.decode(b"", final=True)]

    def spell(self, token: str, first: bool) -> str:
        """See `Step`."""
        return byte_level_bytes(token).decode("utf-8", "replace")


class ByteFallback(Step):
    """Runs of `<0x..>` tokens become characters if the whole run is valid UTF-8, else a U+FFFD for each byte."""

    def __init__(self) -> None:
        self._open = False
        """Within a run that is valid so far."""
        self._broken = False
        """Within a run that is not valid."""
        self._start()

    def _start(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="strict")
        self._chars = ""
        self._bytes = 0

    def feed(self, token: str) -> list[str]:
        """See `Step`."""
        match = BYTE_TOKEN.fullmatch(token)
        if match is None:
            return [*self.finish(), token]
        if self._broken:
            return ["\ufffd"]
        self._open = True
        self._bytes += 1
        try:
            self._chars += self._utf8.decode(bytes([int(match[1], 16)]))
        except UnicodeDecodeError:
            return self._break()
        if self._bytes <= LONGEST_RUN or not self._chars:
            return []
        chars, self._chars = self._chars, ""
        self._bytes -= len(chars.encode())
        return [chars]

    def finish(self) -> list[str]:
        """See `Step`."""
        out: list[str] = []
        if self._open:
            try:
                self._utf8.decode(b"", final=True)
                out = [self._chars]
            except UnicodeDecodeError:
                out = self._break()
            self._start()
        self._open = self._broken = False
        return out

    def _break(self) -> list[str]:
        self._open, self._broken = False, True
        count = self._bytes
        self._start()
        return ["\ufffd"] * count

    @property
    def held(self) -> int:
        """See `Step`."""
        return len(self._chars)


class WordEnds(Step):
    """GPT-1's tokens end with a mark where words end; it becomes a space, but nothing at the text's end."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._rest = ""

    def feed(self, token: str) -> list[str]:
        """See `Step`."""
        before = self._rest.replace(self._mark, " ")
        start = token.find(self._mark)
        if start < 0:
            self._rest = ""
            return [before + token]
        self._rest = token[start:]
        return [before + token[:start]]

    def finish(self) -> list[str]:
        """See `Step`."""
        return [self._rest.replace(self._mark, "")]

    @property
    def held(self) -> int:
        """See `Step`."""
        return len(self._rest.replace(self._mark, " "))

    def spell(self, token: str, first: bool) -> str:
        """See `Step`."""
        return token.replace(self._mark, " ")


class StripText(Step):
    """Takes up to `start` characters from the text's start and up to `stop` from its end, if they are `content`."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content = content
        self._at_start = start
        self._start = start
        self._stop = stop
        self._tail = ""

    def feed(self, token: str) -> list[str]:
        """See `Step`."""
        while self._at_start and token:
            if token[0] != self._content:
                self._at_start = 0
                break
            token, self._at_start = token[1:], self._at_start - 1
        text = self._tail + token
        end = len(text)
        while end > max(len(text) - self._stop, 0) and text[end - 1] == self._content:
            end -= 1
        self._tail = text[end:]
        return [text[:end]]

    def spell(self, token: str, first: bool) -> str:
        """See `Step`."""
        return strip(token, self._content, self._start if first else 0, 0)


class ReplaceText(Step):
    """Replaces a string wherever it stands in the text, across tokens."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern = pattern
        self._content = content
        self._rest = ""

    def feed(self, token: str) -> list[str]:
        """See `Step`."""
        *whole, rest = (self._rest + token).split(self._pattern)
        keep = min(len(rest), len(self._pattern) - 1)
        while not self._pattern.startswith(rest[len(rest) - keep :]):
            keep -= 1
        self._rest = rest[len(rest) - keep :]
        return [self._content.join([*whole, rest[: len(rest) - keep]])]

    def finish(self) -> list[str]:
        """See `Step`."""
        return [self._rest]

    @property
    def held(self) -> int:
        """See `Step`."""
        return len(self._rest)

    def spell(self, token: str, first: bool) -> str:
        """See `Step`."""
        return token.replace(self._pattern, self._content)


class Chain(Step):
    """Steps one after the other; the state of one text."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps

    def feed(self, token: str) -> list[str]:
        """See `Step`."""
        return self._through([token], 0)

    def finish(self) -> list[str]:
        """See `Step`."""
        tokens: list[str] = []
        for index, step in enumerate(self._steps):
            tokens += self._through(step.finish(), index + 1)
        return tokens

    def _through(self, tokens: list[str], start: int) -> list[str]:
        for step in self._steps[start:]:
            tokens = [out for token in tokens for out in step.feed(token)]
        return tokens

    @property
    def held(self) -> int:
        """See `Step`."""
        return sum(step.held for step in self._steps)

    def spell(self, token: str, first: bool) -> str:
        """See `Step`."""
        for step in self._steps:
            token = step.spell(token, first)
        return token
