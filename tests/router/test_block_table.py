"""The table of block hashes against a dictionary, and the numbered sets of workers."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from router.cache.block_table import LOAD, NOWHERE, RECORD, BlockTable
from router.cache.worker_sets import EMPTY, FEW, WorkerBits, WorkerSets

# Few different bytes: keys are found across records, where they are not.
BLOCKS = st.lists(st.sampled_from([b"\0", b"\1"]), min_size=16, max_size=16).map(b"".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "move", "remove"]), BLOCKS, st.integers(0, 3)), max_size=200))
def test_it_is_a_dictionary(steps: list[tuple[str, bytes, int]]) -> None:
    table, naive = BlockTable(), {}
    for what, block, number in steps:
        key = block[:8]
        if what == "add" and key not in naive:
            table.add([block], number)
            naive[key] = number
        elif what == "move" and key in naive:
            table.move([block], number)
            naive[key] = number
        elif what == "remove" and key in naive:
            table.remove([block])
            del naive[key]
        assert table.get(block) == naive.get(key, NOWHERE)
        assert table.has_any([b"\2" * 16, block]) == (key in naive)
        assert len(table) == len(naive)
    table.check_integrity()
    assert all(table.get(key + bytes(8)) == number for key, number in naive.items())


def test_it_grows_bucket_by_bucket() -> None:
    table, rng = BlockTable(), random.Random(0)
    blocks = [rng.randbytes(16) for _ in range(100 * LOAD)]
    for at in range(0, len(blocks), 7):
        table.add(blocks[at : at + 7], at)
        table.check_integrity()
    assert [table.get(block) for block in blocks] == [at // 7 * 7 for at in range(len(blocks))]
    assert len(table._buckets) == 100
    assert max(map(len, table._buckets)) < 8 * LOAD * RECORD, "a split left a bucket whole"


def test_workers_get_their_bits_back_only_when_released() -> None:
    bits = WorkerBits()
    a, b = bits.of("a"), bits.of("b")
    bits.retire("a")
    assert bits.of("c") not in (a, b)
    bits.check_integrity()
    bits.release(a)
    assert bits.of("d") == a
    bits.check_integrity()


def test_large_and_small_masks_name_their_workers() -> None:
    bits = WorkerBits()
    all_of_them = sum(bits.of(f"w{n}") for n in range(5 * FEW))
    for mask in (all_of_them, all_of_them & int("01" * 60, 2), bits.of("w0"), bits.of(f"w{5 * FEW - 1}")):
        found: dict[str, int] = {}
        bits.note(found, mask, 7)
        assert found == {f"w{n}": 7 for n in range(5 * FEW) if mask & bits.of(f"w{n}")}


def test_sets_end_with_their_last_use() -> None:
    sets = WorkerSets()
    number = sets.take(3, 4)
    assert sets.take(3, 4) == sets.use(number) == number != EMPTY
    assert sets.either[number] == 7
    for _ in range(3):
        assert len(sets) == 2
        sets.drop(number)
    assert len(sets) == 1
    sets.check_integrity({})
    sets.drop(sets.take(0, 0))
    assert sets.take(0, 0) == EMPTY
