"""Where each of millions of block hashes is, in about 20 bytes a block and without a pause for growing.

A dictionary would take some 100 bytes a block, hold objects that the garbage collector walks, and stop the event loop
for most of a second whenever it grows. Here a bucket is one byte string of records, searched by the C library, and
buckets are split one at a time (linear hashing, Litwin 1980).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence

from tandem.kv import BlockHash

KEY = 8
"""Bytes of a hash that are kept. Hashes are keyed and uniform, so two of ten million share them with odds of one in a
hundred thousand; callers compare the whole hash where they would go wrong by it."""
RECORD = 12
"""Bytes of a record: the key, and the number that it leads to."""
LOAD = 16
"""Records of a bucket on average."""
NOWHERE = -1

_word = struct.Struct("<I").unpack_from
_number = struct.Struct("<i").unpack_from
_pack = struct.Struct("<i").pack
_records = struct.Struct("<8si").iter_unpack


class BlockTable:
    """Block hash to number. Hashes with equal first eight bytes are the same to it."""

    def __init__(self) -> None:
        self._buckets = [bytearray()]
        self._half = 1
        """Buckets at the start of the current round of splits, a power of two."""
        self._mask = 1
        """Bits of a hash that choose its bucket; the highest counts only where the split has been."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def get(self, block: BlockHash) -> int:
        """The number of a block; NOWHERE if it has none."""
        buckets = self._buckets
        at = _word(block)[0] & self._mask
        bucket = buckets[at if at < len(buckets) else at - self._half]
        key = block[:KEY]
        place = bucket.find(key)
        if place % RECORD:
            place = _aligned(bucket, key, place)
        return NOWHERE if place < 0 else _number(bucket, place + KEY)[0]

    def has_any(self, blocks: Iterable[BlockHash]) -> bool:
        """Whether any of the blocks is there."""
        buckets, mask, half = self._buckets, self._mask, self._half
        size = len(buckets)
        for block in blocks:
            at = _word(block)[0] & mask
            bucket, key = buckets[at if at < size else at - half], block[:KEY]
            if (place := bucket.find(key)) >= 0 and _aligned(bucket, key, place) >= 0:
                return True
        return False

    def add(self, blocks: Sequence[BlockHash], number: int) -> None:
        """Adds blocks that are not there yet."""
        tail, buckets = _pack(number), self._buckets
        self._count += len(blocks)
        while self._count > LOAD * len(buckets):
            self._split()
        size, mask, half = len(buckets), self._mask, self._half
        for block in blocks:
            at = _word(block)[0] & mask
            buckets[at if at < size else at - half] += block[:KEY] + tail

    def move(self, blocks: Iterable[BlockHash], number: int) -> None:
        """Gives blocks that are there another number."""
        tail = _pack(number)
        for block in blocks:
            bucket, place = self._record(block)
            bucket[place + KEY : place + RECORD] = tail

    def remove(self, blocks: Iterable[BlockHash]) -> None:
        """Removes blocks that are there."""
        for block in blocks:
            bucket, place = self._record(block)
            bucket[place : place + RECORD] = bucket[-RECORD:]
            del bucket[-RECORD:]
            self._count -= 1

    def _record(self, block: BlockHash) -> tuple[bytearray, int]:
        bucket, key = self._buckets[self._at(block)], block[:KEY]
        place = _aligned(bucket, key, bucket.find(key))
        if place < 0:
            raise KeyError(block.hex())
        return bucket, place

    def _at(self, block: bytes) -> int:
        at: int = _word(block)[0] & self._mask
        return at if at < len(self._buckets) else at - self._half

    def _split(self) -> None:
        """Divides the next bucket of this round in two."""
        buckets = self._buckets
        byte, shift = divmod(self._half.bit_length() - 1, 8)
        old = bytes(buckets[len(buckets) - self._half])
        parts = (bytearray(), bytearray())
        for at in range(0, len(old), RECORD):
            parts[old[at + byte] >> shift & 1].extend(old[at : at + RECORD])
        buckets[len(buckets) - self._half] = parts[0]
        buckets.append(parts[1])
        if len(buckets) == 2 * self._half:
            self._half *= 2
            self._mask = 2 * self._half - 1

    def check_integrity(self) -> None:
        """Raises AssertionError unless every record is in its bucket, once; for tests."""
        found = list(self._places())
        assert len(found) == self._count
        assert len({key for key, _ in found}) == self._count, "a key stands twice"
        assert all(self._at(key) == at for key, at in found)
        assert self._half <= len(self._buckets) <= self._mask == 2 * self._half - 1

    def _places(self) -> Iterator[tuple[bytes, int]]:
        for at, bucket in enumerate(self._buckets):
            for key, _ in _records(bucket):
                yield key, at


def _aligned(bucket: bytearray, key: bytes, place: int) -> int:
    """The record with a key, from a place on at which its bytes are found, perhaps across two records."""
    while place >= 0 and place % RECORD:
        place = bucket.find(key, place + 1)
    return place
