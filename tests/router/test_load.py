"""The ledger of load not yet reported: sums, ends once, and ends for the right reason."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from router.workers.load import Booking, LoadLedger
from router.workers.snapshot import Load
from tandem.cluster import CacheEvent, EventKind

LOADS = st.builds(Load, st.integers(0, 5), st.integers(0, 900), st.integers(0, 900))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("book"), LOADS),
        st.tuples(st.just("report"), st.integers(0, 12)),
        st.tuples(st.just("release"), st.integers(0, 11)),
    ),
    max_size=25,
)


@settings(max_examples=60)
@given(STEPS)
def test_every_booking_ends_once_and_the_sum_is_exact(steps: list[tuple[str, object]]) -> None:
    closed: list[int] = []
    ledger = LoadLedger("w", lambda booking: closed.append(booking.number))
    made: list[Booking] = []
    model: dict[int, Load] = {}
    for action, value in steps:
        if isinstance(value, Load):
            made.append(ledger.book(value, None, None))
            model[made[-1].number] = value
        elif action == "report":
            assert isinstance(value, int)
            ledger.reported(value)
            model = {number: load for number, load in model.items() if number > value}
        elif made:
            assert isinstance(value, int)
            booking = made[value % len(made)]
            ledger.release(booking)
            model.pop(booking.number, None)
        ledger.check_integrity()
        assert ledger.pending == sum(model.values(), Load())
        assert len(ledger) == len(model)
    ledger.close()
    numbers = [booking.number for booking in made]
    assert sorted(closed) == numbers == sorted(set(numbers))
    assert ledger.pending == Load()


def test_a_promise_ends_a_booking_with_the_next_status() -> None:
    closed: list[Booking] = []
    ledger = LoadLedger("w", closed.append)
    kept = ledger.book(Load(1, 64), b"other-block-hash", None)
    booking = ledger.book(Load(1, 64), b"last--block-hash", None)
    ledger.observe([CacheEvent(EventKind.EVICTED, (b"last--block-hash",))])
    ledger.reported(0)
    assert closed == []
    ledger.observe([CacheEvent(EventKind.PROMISED, (b"first-block-hash", b"last--block-hash"))])
    assert ledger.pending == Load(2, 128)
    ledger.reported(0)
    assert closed == [booking]
    assert ledger.pending == kept.load


def test_what_ended_since_the_last_status_is_taken_off_until_the_next_one() -> None:
    ledger = LoadLedger("w", lambda booking: None)
    booking = ledger.book(Load(1, 64), None, None)
    ledger.reported(booking.number)
    assert not ledger.release(booking)
    ledger.ended(Load(sequences=1))
    assert ledger.pending == Load(-1)
    ledger.reported(booking.number)
    assert ledger.pending == Load()


def test_numbers_go_on_where_the_worker_has_counted_to() -> None:
    """A worker that was silent, given up and found again still names this router's last dispatch."""
    ledger = LoadLedger("w", lambda booking: None)
    ledger.reported(57)
    booking = ledger.book(Load(1, 2, 3), None, None)
    ledger.reported(57)
    assert len(ledger) == 1
    ledger.reported(booking.number)
    assert len(ledger) == 0
