"""The manifest that rides in a transfer's own notification: which span this was, and what its bytes must hash to."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from kvtransfer.base import Buffer

VERSION = 1
NO_DIGEST = bytes(16)
"""Stands in a manifest until the transfer thread has computed the digest."""
_FORMAT = struct.Struct("<H16sIIQIQ16s")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One span's write. `sequence` counts the ticket's spans from 0; `digest` is xxh3-128 of its `length` bytes."""

    ticket_id: str
    attempt: int
    sequence: int
    start: int
    count: int
    length: int
    digest: bytes

    def pack(self) -> bytes:
        """Fixed-size little-endian bytes. Raises ValueError when a field does not fit."""
        try:
            ticket = bytes.fromhex(self.ticket_id)
            if len(ticket) != 16 or len(self.digest) != 16:
                raise ValueError("ticket id and digest must have 16 bytes")
            return _FORMAT.pack(
                VERSION, ticket, self.attempt, self.sequence, self.start, self.count, self.length, self.digest
            )
        except struct.error as error:
            raise ValueError(f"manifest does not fit: {error}") from None


def parse(data: bytes) -> Manifest:
    """Reads what `pack` wrote; raises ValueError, and nothing else, for anything different."""
    if len(data) != _FORMAT.size:
        raise ValueError(f"manifest has {len(data)} bytes; {_FORMAT.size} are expected")
    version, ticket, attempt, sequence, start, count, length, hashed = _FORMAT.unpack(data)
    if version != VERSION:
        raise ValueError(f"manifest version is {version}; {VERSION} is expected")
    return Manifest(ticket.hex(), attempt, sequence, start, count, length, hashed)


def digest(data: Buffer) -> bytes:
    """xxh3-128: finds accidents, not attackers, at memory speed. Releases the interpreter lock for large buffers."""
    return xxhash.xxh3_128_digest(data.data)
