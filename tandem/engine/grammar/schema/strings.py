"""What a string may be: patterns that XGrammar reads as they are meant, and formats whose texts end."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

from tandem.engine.grammar.schema.document import Unfit

_DAY = "(0[1-9]|1[0-9]|2[0-8])"
_DATE = (
    rf"([0-9]{{4}}-(((0[13578]|1[02])-({_DAY}|29|30|31))|((0[469]|11)-({_DAY}|29|30))|(02-{_DAY}))"
    r"|([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29)"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "email": rf"^[A-Za-z0-9_+-]{{1,20}}(\.[A-Za-z0-9_+-]{{1,20}}){{0,2}}@{_LABEL}(\.{_LABEL}){{1,2}}$",
    "ipv4": rf"^{_BYTE}(\.{_BYTE}){{3}}$",
    "hostname": rf"^{_LABEL}(\.{_LABEL}){{0,3}}$",
}
"""Formats as patterns that say less than RFC 3339, 5321 and 1123 allow, but no more, and that end: a small model writes
digits of a second's fraction for ever."""
BOUNDED_URI = (
    rf"^[a-z][a-z0-9+.-]{{0,15}}://{_LABEL}(\.{_LABEL}){{0,3}}(:[0-9]{{1,5}})?(/[A-Za-z0-9._~-]{{0,60}}){{0,8}}$"
)
"""Those with a host, where a length is asked for."""
ENFORCED = frozenset(
    {
        "duration",
        "ipv6",
        "uuid",
        "uri",
        "uri-reference",
        "uri-template",
        "json-pointer",
        "relative-json-pointer",
    }
)
"""Formats that XGrammar knows; of others it takes no notice, as JSON Schema asks for."""

_PARTS = re.compile(
    r"\\(?:u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|c[A-Za-z]|.)|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[:=!<P]?|[()|^$]|.", re.S
)
_NAMED = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
"""Characters that escapes in a regular expression name."""


def string_schema(flat: dict[str, Any], path: str) -> dict[str, Any] | None:
    """The schema of strings for merged keywords; None when there is no such string. Raises Unfit."""
    least, most = flat.get("minLength", 0), flat.get("maxLength")
    if most is not None and least > most:
        return None
    patterns, formats = flat.get("pattern", []), flat.get("format", [])
    known = [each for each in formats if each in FORMATS or each in ENFORCED]
    if len(patterns) + len(known) > 1:
        raise Unfit(path, "several of pattern and format cannot hold at the same time; use one")
    bounded = least > 1 or most is not None
    if known == ["uri"] and bounded:
        known, patterns = [], [BOUNDED_URI]
    if known and known[0] in ENFORCED:
        if bounded:
            raise Unfit(path, f"minLength and maxLength beside format {known[0]} are not supported")
        return {"type": "string", "format": known[0]}
    if not patterns and not known:
        return {"type": "string", "minLength": least} | ({} if most is None else {"maxLength": most})
    pattern = patterns[0] if patterns else FORMATS[known[0]]
    if (least or most is not None) and not _within(pattern, least, most):
        name = "pattern" if patterns else f"format {known[0]}"
        why = f"minLength and maxLength beside {name} are not supported where they are narrower"
        raise Unfit(path, f"{why}; write them into the pattern")
    return {"type": "string", "pattern": said(pattern, path)}


def said(pattern: str, path: str) -> str:
    """A regular expression for how JSON writes the texts that are wholly matched. Raises Unfit."""
    parts = _PARTS.findall(pattern)
    if any(part.startswith("(?") and part != "(?:" for part in parts):
        raise Unfit(path, "pattern: only groups '(...)' and '(?:...)' are supported, no lookaround")
    if not _at_edge(parts, "^", "(") or not _at_edge(parts[::-1], "$", ")"):
        raise Unfit(path, "pattern: '^' is only supported at the beginning and '$' at the end")
    for part in parts:
        if part.startswith("[") and _only_escaped(part):
            raise Unfit(path, f"pattern: {part} allows only characters that JSON escapes, which is not supported")
    return "".join(_spelled(part) for part in parts)


def _only_escaped(part: str) -> bool:
    """Whether a class holds characters that JSON escapes, and none of the first hundreds that it does not."""
    try:
        member = re.compile(part)
    except re.error:
        return False
    escaped = {char for char in map(chr, range(0x250)) if json.dumps(char, ensure_ascii=False)[1:-1] != char}
    plain = (char for char in map(chr, range(0x250)) if char not in escaped)
    return any(map(member.fullmatch, escaped)) and not any(map(member.fullmatch, plain))


def _spelled(part: str) -> str:
    """A part that is one character as JSON spells it, where that is not the character itself."""
    char = part
    if len(part) > 2 and part[:2] in (r"\x", r"\u"):
        char = chr(int(part[2:], 16))
    elif len(part) == 3 and part.startswith(r"\c"):
        char = chr(ord(part[2]) % 32)
    elif len(part) == 2 and part[0] == "\\":
        char = _NAMED.get(part[1], "" if part[1].isalnum() else part[1])
    spelling = json.dumps(char, ensure_ascii=False)[1:-1]
    if len(char) != 1 or spelling == char:
        return part
    return "(?:" + spelling.replace("\\", r"\\") + ")"


def _at_edge(parts: list[str], anchor: str, opening: str) -> bool:
    """Whether nothing but openings of groups ever comes before the anchor."""
    edges = [True]
    edge = True
    for part in parts:
        if part == "|":
            edge = edges[-1]
        elif part in ("(", ")", "(?:"):
            if (part == ")") == (opening == ")"):
                edges.append(edge)
            elif len(edges) > 1:
                edges.pop()
                edge = False
        elif part == anchor:
            if not edge:
                return False
        else:
            edge = False
    return True


def matches(pattern: str, text: str, path: str) -> bool:
    """Whether a pattern is found in a text that the schema names. Raises Unfit."""
    try:
        return re.search(pattern, text) is not None
    except (re.error, OverflowError) as error:
        raise Unfit(path, f"pattern: {error}") from None


def literal_start(pattern: str) -> str:
    """The text with which all begins that a pattern matches wholly; empty where that is not known."""
    if not pattern.startswith("^") or "|" in pattern:
        return ""
    start = ""
    for part, following in pairwise([*_PARTS.findall(pattern)[1:], "$"]):
        text = part[1:] if len(part) == 2 and part[0] == "\\" and not part[1].isalnum() else part
        if len(text) != 1 or (text == part and text in ".[](){}*+?$^\\") or following in ("*", "?", "{"):
            break
        start += text
    return start


def _within(pattern: str, least: int, most: int | None) -> bool:
    """Whether whatever the pattern matches wholly has a length in these bounds."""
    try:
        low, high = re._parser.parse(pattern).getwidth()  # type: ignore[attr-defined]
    except (re.error, OverflowError):
        return False
    return bool(least <= low and (most is None or high <= most))
