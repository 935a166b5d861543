"""What a `tokenizers` decoder is made of, read from its own description, as streaming steps.

A decoder with a step that is not known, or with steps in an order that no known tokeniser has, is not streamed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tandem.text.decoders import (
    CLEAN_UP,
    WORDPIECE_CLEAN_UP,
    ByteFallback,
    ByteLevel,
    Chain,
    FirstDiffers,
    Map,
    ReplaceText,
    Step,
    StripText,
    WordEnds,
    strip,
)


class NotStreamed(ValueError):
    """A decoder whose text is not certain before its end, or that is not known here."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a tokeniser's tokens become text."""

    makers: tuple[Callable[[], Step], ...]
    byte_fallback: bool
    """Tokens spelled `<0x..>` are bytes."""
    byte_level: bool
    """Each token is a string of bytes, and nothing else is done to them."""

    def start(self) -> Chain:
        """The state at the start of a text."""
        return Chain([make() for make in self.makers])


def parse(decoder: Any, clean_up: bool = False) -> Decoding:
    """The steps of a `tokenizers` decoder (None: tokens are joined by spaces). Raises NotStreamed.

    clean_up: transformers cleans the text up, see `CLEAN_UP`.
    """
    makers: list[Callable[[], Step]] = []
    names: list[str] = []
    if decoder is None:
        makers.append(lambda: FirstDiffers(str, lambda token: " " + token))
    else:
        for state in _flat(json.loads(decoder.__getstate__())):
            makers += _maker(state, names)
            names.append(state["type"])
    fused = {"ByteLevel", "Fuse"} & set(names)
    if "BPEDecoder" in names[:-1] or ("ByteLevel" in names[1:] and fused & set(names[: names.index("ByteLevel")])):
        raise NotStreamed(f"the order of its steps is {', '.join(names)}")
    if clean_up:
        makers += [_replace_text(pattern, content) for pattern, content in CLEAN_UP]
    return Decoding(tuple(makers), "ByteFallback" in names, names == ["ByteLevel"] and not clean_up)


def _flat(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    return [step for inner in state["decoders"] for step in _flat(inner)]


def _maker(state: dict[str, Any], before: list[str]) -> list[Callable[[], Step]]:
    """What makes the step that `state` describes. before: types of the steps before it."""
    fused = "ByteLevel" in before or "Fuse" in before
    match state:
        case {"type": "Fuse"}:
            return []
        case {"type": "Strip", "content": content, "start": start, "stop": stop}:
            if fused:
                return [lambda: StripText(content, start, stop)]
            return [lambda: Map(lambda token: strip(token, content, start, stop))]
        case {"type": "Replace", "pattern": {"String": pattern}, "content": content} if pattern:
            if fused:
                return [_replace_text(pattern, content)]
            return [lambda: Map(lambda token: token.replace(pattern, content))]
        case {"type": "ByteLevel"}:
            return [ByteLevel]
        case _ if fused:
            raise NotStreamed(f"its step {state['type']} comes after tokens were joined")
        case {"type": "Replace"}:
            return [lambda: Map(_one_token(state))]
        case {"type": "ByteFallback"}:
            return [ByteFallback]
        case {"type": "BPEDecoder", "suffix": mark} if mark:
            return [lambda: WordEnds(mark)]
        case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme}:
            first = " " if scheme == "never" else ""
            return [lambda: FirstDiffers(lambda t: t.replace(mark, first), lambda t: t.replace(mark, " "))]
        case {"type": "WordPiece", "prefix": prefix, "cleanup": cleanup}:
            return [lambda: _word_piece(prefix, cleanup)]
    raise NotStreamed(f"its step {state['type']} is not known")


def _replace_text(pattern: str, content: str) -> Callable[[], Step]:
    return lambda: ReplaceText(pattern, content)


def _word_piece(prefix: str, cleanup: bool) -> Step:
    def clean(token: str) -> str:
        for pattern, content in WORDPIECE_CLEAN_UP if cleanup else ():
            token = token.replace(pattern, content)
        return token

    def other(token: str) -> str:
        return clean(token[len(prefix) :] if token.startswith(prefix) else " " + token)

    return FirstDiffers(clean, other)


def _one_token(state: dict[str, Any]) -> Callable[[str], str]:
    """The library's own decoder for one token; for regular expressions, which are Oniguruma's there."""
    from tokenizers import decoders

    decoder = decoders.Replace("a", "b")
    decoder.__setstate__(json.dumps(state).encode())
    decode: Callable[[list[str]], str] = decoder.decode
    return lambda token: decode([token])
