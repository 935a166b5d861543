"""A promised block is taken back by the last request that promised it, and by no other."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.cluster import CacheEvent, EventKind
from tandem.worker.promises import Promises


def test_one_of_two_that_ends_takes_nothing_back_that_the_other_promises() -> None:
    told: list[CacheEvent] = []
    promises = Promises(told.extend)
    promises.make("a", (b"1", b"2"))
    promises.make("b", (b"1", b"2", b"3"))
    promises.withdraw("b")
    assert told[2:] == [CacheEvent(EventKind.WITHDRAWN, (b"3",))]
    promises.withdraw("a")
    assert told[3:] == [CacheEvent(EventKind.WITHDRAWN, (b"1", b"2"))]
    promises.withdraw("a")
    promises.make("c", ())
    promises.withdraw("c")
    assert len(told) == 4
    assert promises.leaks() == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.booleans()), max_size=30))
def test_promises_are_those_of_a_naive_model(steps: list[tuple[int, int, bool]]) -> None:
    told: list[CacheEvent] = []
    promises, made = Promises(told.extend), {}
    for number, length, kept in steps:
        name = str(number)
        if name not in made:
            made[name] = tuple(bytes([place]) for place in range(length))
            promises.make(name, made[name])
        elif kept:
            promises.keep(name)
            del made[name]
        else:
            told.clear()
            promises.withdraw(name)
            hashes = made.pop(name)
            others = Counter(block for each in made.values() for block in each)
            back = [block for event in told for block in event.hashes]
            assert back == [block for block in hashes if not others[block]]
        promises.check_integrity()
