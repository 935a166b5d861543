"""How vocabularies spell bytes."""

from __future__ import annotations

import re

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How vocabularies with byte fallback (sentencepiece) spell a single byte."""


def byte_level_bytes(spelling: str) -> bytes:
    """The bytes behind a byte-level BPE token; a spelling outside that alphabet stands for its UTF-8 bytes."""
    try:
        return bytes(_BYTE_OF[char] for char in spelling)
    except KeyError:
        return spelling.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: visible Latin-1 for itself, the rest from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
