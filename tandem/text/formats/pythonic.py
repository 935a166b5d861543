"""Tool calls as a list of Python calls, `[name(key="value"), other()]`: Llama 4, and smaller Llamas on request."""

from __future__ import annotations

import json
import re
from typing import Any

from tandem.text.formats.calls import NAME, Calls, ToolFormat
from tandem.text.formats.held import CallSpelling
from tandem.text.formats.json_scanner import MAX_DEPTH
from tandem.text.formats.reader import Malformed, Reader, Steps

MAX_NAME = 64
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,300})(\.[0-9]{1,300})?([eE][+-]?[0-9]{1,3})?")
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0"}
_CODES = {"x": 2, "u": 4, "U": 8}
_ARGUMENTS = r"""
root ::= "" | argument (", " argument)*
argument ::= [a-zA-Z_] [a-zA-Z0-9_]{0,62} "=" value
value ::= string | number | "True" | "False" | "None" | list | dict
string ::= "\"" ([^"\\\0-\x1f] | "\\" ["\\nt])* "\""
number ::= "-"? ("0" | [1-9] [0-9]{0,14}) ("." [0-9]{1,15})?
list ::= "[" (value (", " value)*)? "]"
dict ::= "{" (string ": " value (", " string ": " value)*)? "}"
"""


class Pythonic(ToolFormat):
    """The whole answer is a list of calls with keyword arguments of literals.

    Each call is given out when it is complete, since its arguments become JSON only then. Nothing but the names of
    declared functions tells it from other lists.
    """

    name = "pythonic"
    bare = "["
    tokens = ("<|python_start|>", "<|python_end|>")
    openings = ("<|python_start|>",)

    def fits(self, template: str) -> bool:
        """See `ToolFormat`."""
        return "<|python_start|>" in template or "[func_name1(params_name1=params_value1" in template

    def block(self, reader: Reader, calls: Calls) -> Steps[None]:
        """See `ToolFormat`."""
        tagged = yield from reader.literal("<|python_start|>")
        yield from reader.expect("[")
        while True:
            yield from reader.spaces()
            start = reader.at
            try:
                name, given = yield from _call(reader)
                if name not in calls.declared:
                    raise Malformed
            except Malformed:
                reader.at = start
                raise
            calls.start(name)
            calls.arguments(json.dumps(given, ensure_ascii=False))
            yield from reader.spaces()
            if (yield from reader.literal("]")):
                break
            yield from reader.expect(",")
        if tagged:
            yield from reader.literal("<|python_end|>")

    def prefill(self, template: str, name: str | None) -> str:
        """See `ToolFormat`."""
        return "[" if name is None else f"[{name}("

    def spelling(self, template: str) -> CallSpelling:
        """See `ToolFormat`."""
        return CallSpelling("", "(", ")", begin="[", separator=", ", end="]", arguments=_ARGUMENTS)


def _call(reader: Reader) -> Steps[tuple[str, dict[str, Any]]]:
    name = yield from _identifier(reader)
    yield from reader.expect("(")
    given: dict[str, Any] = {}
    yield from reader.spaces()
    while not (yield from reader.literal(")")):
        key = yield from _identifier(reader)
        yield from reader.spaces()
        yield from reader.expect("=")
        given[key] = yield from _value(reader, 0)
        yield from _separator(reader, ")")
    return name, given


def _separator(reader: Reader, end: str) -> Steps[None]:
    """A comma, or what comes before `end`, which is not read."""
    yield from reader.spaces()
    if (yield from reader.peek()) != end:
        yield from reader.expect(",")
        yield from reader.spaces()


def _identifier(reader: Reader) -> Steps[str]:
    name = yield from reader.while_in(lambda char: NAME.fullmatch(char) is not None, MAX_NAME)
    if not name:
        raise Malformed
    return name


def _value(reader: Reader, depth: int) -> Steps[Any]:
    if depth > MAX_DEPTH:
        raise Malformed
    yield from reader.spaces()
    match (yield from reader.peek()):
        case "'" | '"' as quote:
            return (yield from _string(reader, quote))
        case "[":
            return (yield from _list(reader, depth))
        case "{":
            return (yield from _dict(reader, depth))
        case _:
            return (yield from _scalar(reader))


def _scalar(reader: Reader) -> Steps[Any]:
    word = yield from reader.while_in(lambda char: char.isascii() and (char.isalnum() or char in "+-."), 1000)
    if word in _WORDS:
        return _WORDS[word]
    number = _NUMBER.fullmatch(word)
    if number is None:
        raise Malformed
    value = float(word) if number[2] or number[3] else int(word)
    if value in (float("inf"), float("-inf")):
        raise Malformed
    return value


def _list(reader: Reader, depth: int) -> Steps[list[Any]]:
    yield from reader.expect("[")
    values: list[Any] = []
    yield from reader.spaces()
    while not (yield from reader.literal("]")):
        values.append((yield from _value(reader, depth + 1)))
        yield from _separator(reader, "]")
    return values


def _dict(reader: Reader, depth: int) -> Steps[dict[str, Any]]:
    yield from reader.expect("{")
    values: dict[str, Any] = {}
    yield from reader.spaces()
    while not (yield from reader.literal("}")):
        key = yield from _value(reader, depth + 1)
        if not isinstance(key, str):
            raise Malformed
        yield from reader.spaces()
        yield from reader.expect(":")
        values[key] = yield from _value(reader, depth + 1)
        yield from _separator(reader, "}")
    return values


def _string(reader: Reader, quote: str) -> Steps[str]:
    yield from reader.expect(quote)
    out: list[str] = []
    while (char := (yield from reader.peek())) != quote:
        if not char or char == "\n":
            raise Malformed
        reader.at += 1
        if char == "\\":
            char = yield from _escape(reader)
        out.append(char)
    reader.at += 1
    return "".join(out)


def _escape(reader: Reader) -> Steps[str]:
    char = yield from reader.peek()
    if not char:
        raise Malformed
    reader.at += 1
    if char not in _CODES:
        return _ESCAPES.get(char, char if char in "'\"\\" else "\\" + char)
    code = ""
    while len(code) < _CODES[char] and (digit := (yield from reader.peek())) and digit in "0123456789abcdefABCDEF":
        code += digit
        reader.at += 1
    value = int(code, 16) if len(code) == _CODES[char] else 0xD800
    if 0xD800 <= value <= 0xDFFF or value > 0x10FFFF:
        raise Malformed
    return chr(value)
