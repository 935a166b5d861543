"""A promised block is taken back behind the next report, when the last request that promised it has ended."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.cluster import CacheEvent, EventKind
from tandem.worker.promises import Promises


def taken_back(promises: Promises) -> list[bytes]:
    promises.seal()
    return [block for event in promises.taken_back() for block in event.hashes]


def test_one_of_two_that_ends_takes_nothing_back_that_the_other_promises() -> None:
    told: list[CacheEvent] = []
    promises = Promises(told.extend)
    promises.make("a", (b"1", b"2"))
    promises.make("b", (b"1", b"2", b"3"))
    assert told == [CacheEvent(EventKind.PROMISED, (b"1", b"2")), CacheEvent(EventKind.PROMISED, (b"1", b"2", b"3"))]
    promises.end("b")
    assert taken_back(promises) == [b"3"]
    promises.end("a")
    assert taken_back(promises) == [b"1", b"2"]
    promises.end("a")
    promises.make("c", ())
    promises.end("c")
    assert taken_back(promises) == []
    assert len(told) == 2
    assert promises.leaks() == []


def test_what_ends_or_is_promised_while_a_report_is_made_waits_for_the_next_one() -> None:
    promises = Promises(lambda events: None)
    for name, block in (("a", b"1"), ("b", b"2"), ("c", b"3")):
        promises.make(name, (block,))
    promises.end("a")
    promises.end("b")
    promises.seal()
    promises.make("again", (b"2",))
    promises.end("c")
    assert [event.hashes for event in promises.taken_back()] == [(b"1",)]
    assert taken_back(promises) == [b"3"]
    promises.end("again")
    assert taken_back(promises) == [b"2"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.booleans()), max_size=30))
def test_promises_are_those_of_a_naive_model(steps: list[tuple[int, int, bool]]) -> None:
    promises, made, shown = Promises(lambda events: None), dict[str, tuple[bytes, ...]](), set[bytes]()
    for number, length, report in steps:
        name = str(number)
        if name not in made:
            made[name] = tuple(bytes([place]) for place in range(length))
            promises.make(name, made[name])
            shown.update(made[name])
        else:
            promises.end(name)
            del made[name]
        if report:
            shown -= set(taken_back(promises))
            assert shown == set(Counter(block for each in made.values() for block in each))
        promises.check_integrity()
