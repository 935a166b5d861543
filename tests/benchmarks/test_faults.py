"""What counts as lost or missed in a cell of the fault matrix, and when a worker is in a phase."""

from __future__ import annotations

import pytest

from benchmarks.fault_cells import LOST, STREAMS, TARGET_S, Cell, Outcome, Stream, page
from benchmarks.fault_phases import HandOver, hand_overs

CELL = Cell("decode", "SIGSTOP", "mid-transfer")
RIGHT = Stream("right")
CUT = Stream(problem=LOST + "a clean end after 3 of 150 tokens")
TOLD = Stream(problem="APIError: gone")


def judged(right: Stream, during: Stream, after: Stream, cell: Cell = CELL) -> Outcome:
    outcome = Outcome(cell, reached=True)
    outcome.judge([right] * STREAMS, [during] * STREAMS, [after] * STREAMS)
    return outcome


@pytest.mark.parametrize(
    ("during", "after", "lost", "answered", "told"),
    [
        (RIGHT, RIGHT, 0, STREAMS, 0),
        (CUT, RIGHT, STREAMS, 0, STREAMS),
        (CUT, CUT, 2 * STREAMS, 0, STREAMS),
        (Stream("wrong"), Stream("wrong"), 2 * STREAMS, 0, STREAMS),
        (RIGHT, Stream("wrong"), STREAMS, STREAMS, 0),
        (TOLD, RIGHT, 0, 0, STREAMS),
        (RIGHT, TOLD, 0, STREAMS, 0),
    ],
)
def test_a_stream_is_judged_by_what_it_was_before_the_fault(
    during: Stream, after: Stream, lost: int, answered: int, told: int
) -> None:
    outcome = judged(RIGHT, during, after)
    assert (outcome.lost, outcome.answered, len(outcome.errors)) == (lost, answered, told)
    assert outcome.missed == (during is not RIGHT or after is not RIGHT)
    assert (str(CELL) in page([outcome]).split("targets missed in: ")[1].splitlines()[0]) == outcome.missed


def test_nothing_is_shown_by_a_cell_that_was_not_met_or_had_no_answers_to_compare_with() -> None:
    outcome = judged(RIGHT, RIGHT, RIGHT)
    outcome.reached = False
    assert outcome.missed
    assert judged(TOLD, RIGHT, RIGHT).missed


def test_a_killed_router_may_tell_its_clients_but_not_lose_them() -> None:
    router = Cell("router", "SIGKILL", "mid-decode")
    assert not judged(RIGHT, TOLD, RIGHT, router).missed
    assert judged(RIGHT, CUT, RIGHT, router).missed


def test_a_cell_that_is_played_again_keeps_what_went_wrong_the_first_time() -> None:
    outcome, again = judged(RIGHT, CUT, RIGHT), judged(RIGHT, RIGHT, RIGHT)
    outcome.reached, again.service_s = False, TARGET_S / 2
    outcome.join(again)
    assert outcome.reached and outcome.missed
    assert (outcome.lost, outcome.answered, outcome.service_s) == (STREAMS, STREAMS, TARGET_S / 2)


def test_hand_overs_of_both_ends_are_read_from_their_audits() -> None:
    assert hand_overs(
        [
            "ticket a of receiver r1 has not quiesced: token 64 of 700 is computed, 0 spans are sent",
            "ticket b of receiver r2 has not quiesced: token 350 of 700 is computed, 5 spans are sent",
            "ticket c of receiver r1 has not quiesced: token 0 of 700 is computed, 0 spans are sent",
            "ticket d of sender s1 is not quiesced: 0 of 0 spans have landed",
            "ticket e of sender s1 is not quiesced: 6 of 11 spans have landed",
            "ticket b still holds pages",
        ]
    ) == [
        HandOver("r1", 64 / 700, False),
        HandOver("r2", 0.5, True),
        HandOver("s1", 0.0, False),
        HandOver("s1", 6 / 11, True),
    ]


@pytest.mark.parametrize(
    ("share", "moved", "prefill", "transfer"),
    [(0.1, False, True, False), (0.1, True, True, False), (0.5, True, False, True), (0.5, False, False, False)],
)
def test_a_hand_over_is_in_one_phase_at_a_time(share: float, moved: bool, prefill: bool, transfer: bool) -> None:
    hand_over = HandOver("peer", share, moved)
    assert hand_over.in_phase("mid-prefill") == prefill
    assert hand_over.in_phase("mid-transfer") == transfer
    assert not HandOver("peer", 1.0, True).in_phase("mid-transfer"), "all of it is there"
