"""Holding tool calls to what was declared: a format's spelling of calls as one of XGrammar's structural tags."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Piece = dict[str, Any]
"""A format of XGrammar's structural tags, as JSON."""

TAG_START = '{"type":"structural_tag","field":"tools",'
"""What the source of a grammar for tool calls starts with."""


@dataclass(frozen=True, slots=True)
class CallSpelling:
    """A block of calls is `begin`, calls with `separator` between them, `end`.

    A call is `head`, its name, `middle`, its arguments and `tail`.
    """

    head: str
    middle: str
    tail: str
    begin: str = ""
    separator: str = ""
    end: str = ""
    several: bool = True
    """Whether a block holds several calls; else each is a block, and `separator` stands between blocks."""
    arguments: str = ""
    """EBNF of any arguments, where they are not JSON; a schema cannot be held to then."""

    @property
    def start(self) -> str:
        """All that comes before the first name."""
        return self.begin + self.head


@dataclass(frozen=True, slots=True)
class Function:
    """A declared function."""

    name: str
    field: str
    """Where the schema stands in the request, for complaints about it."""
    schema: Mapping[str, Any] | None = None
    """What the arguments are held to; None: to being a JSON object."""


NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
"""The schema of a strict function that declares no parameters."""


def functions_of(tools: Sequence[Mapping[str, Any]], strict: frozenset[str]) -> list[Function]:
    """The functions of a request's tools. strict: names of those whose schemas hold."""
    made = []
    for index, tool in enumerate(tools):
        name, schema = tool["function"]["name"], tool["function"].get("parameters") or NO_ARGUMENTS
        made.append(Function(name, f"tools.{index}.function.parameters", schema if name in strict else None))
    return made


class CallGrammar:
    """Makes the structural tags of one request."""

    def __init__(self, spelling: CallSpelling, functions: Sequence[Function], special: Mapping[str, int]) -> None:
        """special: ids of those texts of the format that are special tokens, which no text of a grammar spells."""
        self._spelling = spelling
        self._functions = functions
        self._special = special
        self._texts = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")

    def unheld(self) -> str:
        """The field of the first schema that calls of this form cannot be held to; empty when there is none."""
        strict = [each.field for each in self._functions if each.schema is not None and self._spelling.arguments]
        return strict[0] if strict else ""

    def forced(self, prefill: str, name: str | None, one_call: bool) -> str:
        """The source of a grammar for what follows `prefill`, the beginning of a call.

        name: of the function that the prefill names, if it does. one_call: no other call follows.
        """
        form = self._spelling
        begun = form.start if name is None else form.start + name + form.middle
        assert begun.startswith(prefill), "a prefill is what a call starts with"
        if name is not None:
            function = next(each for each in self._functions if each.name == name)
            rest = [*self._text(begun[len(prefill) :]), self._arguments(function), *self._text(form.tail + form.end)]
            return _source(_sequence(rest))
        pieces = [self._call(form.start[len(prefill) :])]
        if not one_call:
            pieces.append(_star(self._call(form.separator + form.start[len(form.begin) :])))
        return _source(_sequence([*pieces, *self._text(form.end)]))

    def free(self, openings: Sequence[str], bare: str, one_call: bool) -> str:
        """The source of a grammar for text in which every block of calls is held to the functions.

        openings, bare: as in `ToolFormat`. A special token's bytes end with its name, so that one text triggers on
        an opening whether it is special or not. Where calls need no opening, an answer that begins as one is one, and
        calls end the answer: text that follows could be read as another call.
        """
        ends = one_call or bool(bare)
        rules = [[each, self._block(self._spelling.start.removeprefix(each), one_call)] for each in openings]
        text: Piece = {"type": "dispatch", "rules": rules, "loop": not ends}
        if not bare:
            return _source(text)
        blanks = r"[ \t\r\n]*"
        first = "".join(sorted({re.escape(each[0]) for each in openings}))
        second = "".join(sorted({re.escape(each[1]) for each in openings}))
        ways = [self._block(self._spelling.start, one_call)]
        ways += [_sequence([*self._text(each), self._block(self._spelling.start, one_call)]) for each in openings]
        ways.append(_sequence([_regex(rf"{blanks}[^ \t\r\n{first}{re.escape(bare)}]"), text]))
        ways.append(_sequence([_regex(rf"{blanks}[{first}][^{first}{second}]"), text]))
        return _source({"type": "optional", "content": _any_of(ways)})

    def _block(self, start: str, one_call: bool) -> Piece:
        form = self._spelling
        pieces = [self._call(start)]
        if form.several and not one_call:
            pieces.append(_star(self._call(form.separator + form.head)))
        return _sequence([*pieces, *self._text(form.end)])

    def _call(self, start: str) -> Piece:
        """A call of any function, of which `start` is what comes before the name."""
        form = self._spelling
        ways = [
            _sequence([*self._text(function.name + form.middle), self._arguments(function), *self._text(form.tail)])
            for function in self._functions
        ]
        return _sequence([*self._text(start), _any_of(ways)])

    def _arguments(self, function: Function) -> Piece:
        if self._spelling.arguments:
            return {"type": "grammar", "grammar": self._spelling.arguments}
        schema = {"type": "object"} if function.schema is None else function.schema
        return {"type": "json_schema", "json_schema": schema, "field": function.field}

    def _text(self, text: str) -> list[Piece]:
        """Constant text, in which special tokens stand by their ids."""
        pieces: list[Piece] = []
        at = 0
        for found in self._texts.finditer(text):
            pieces += _constant(text[at : found.start()])
            pieces.append({"type": "token", "token": self._special[found[0]]})
            at = found.end()
        return pieces + _constant(text[at:])


def _constant(text: str) -> list[Piece]:
    return [{"type": "const_string", "value": text}] if text else []


def _sequence(pieces: list[Piece]) -> Piece:
    return pieces[0] if len(pieces) == 1 else {"type": "sequence", "elements": pieces}


def _any_of(pieces: list[Piece]) -> Piece:
    return pieces[0] if len(pieces) == 1 else {"type": "or", "elements": pieces}


def _star(piece: Piece) -> Piece:
    return {"type": "star", "content": piece}


def _regex(pattern: str) -> Piece:
    return {"type": "regex", "pattern": pattern}


def _source(piece: Piece) -> str:
    return TAG_START + json.dumps({"format": piece}, ensure_ascii=False, separators=(",", ":"))[1:]
