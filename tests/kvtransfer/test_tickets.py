"""Both ends' ticket machines, alone and against each other with messages lost, late and out of order."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.layout import ahead
from kvtransfer.receiving import InboundTicket
from kvtransfer.sending import Credit, OutboundTicket
from kvtransfer.slab import Ranges
from tandem.kv import Span
from tandem.testing.kv import small_layout

LAYOUT = small_layout()
SLAB = 64 * LAYOUT.token_bytes
TICKET = "a" * 32


def inbound(end: int = 100) -> InboundTicket:
    return InboundTicket(TICKET, 0, end, queue_s=5.0, transfer_s=3.0, opened_at=0.0)


def credit(sequence: int, start: int, count: int, offset: int = 0) -> Credit:
    return Credit(sequence, Span(start, count), offset, count * LAYOUT.token_bytes)


class Conversation(RuleBasedStateMachine):
    """One ticket at both ends. The slab's bytes are watched: no write may hit a range that is not the ticket's."""

    def __init__(self) -> None:
        super().__init__()
        self.slab = Ranges(SLAB)
        self.receiver, self.sender = inbound(), OutboundTicket(TICKET, 0, 100)
        self.to_sender: list[Credit | str] = []
        self.notifications: list[int] = []
        self.quiesced: tuple[int, str] | None = None
        self.now = 0.0

    def pump(self) -> None:
        while (span := self.receiver.next_span(ahead(8, 1))) is not None:
            taken = self.slab.allocate(LAYOUT.span_bytes(span, 100))
            if taken is None:
                return
            sequence = self.receiver.grant(taken, self.now)
            self.to_sender.append(Credit(sequence, span, taken.offset, LAYOUT.span_bytes(span, 100)))

    @precondition(lambda self: self.receiver.spans is None and not self.receiver.ended)
    @rule(first=st.integers(0, 100))
    def reserve(self, first: int) -> None:
        self.receiver.plan(first, 8)
        self.pump()

    @precondition(lambda self: self.quiesced is None)
    @rule(more=st.integers(1, 40))
    def compute(self, more: int) -> None:
        if self.sender.progressed(self.sender.computed + more):
            self.receiver.progressed(self.sender.computed, self.now)
            self.pump()

    @precondition(lambda self: self.to_sender and self.quiesced is None)
    @rule()
    def deliver(self) -> None:
        message = self.to_sender.pop(0)
        if isinstance(message, Credit):
            self.sender.grant(message, LAYOUT, SLAB, SLAB)
        else:
            self.sender.cancelled = True

    @rule()
    def start(self) -> None:
        self.sender.take_sendable()

    @precondition(lambda self: self.sender.gathering)
    @rule(data=st.data())
    def gathered(self, data: st.DataObject) -> None:
        each = self.sender.gathering[data.draw(st.sampled_from(sorted(self.sender.gathering)))]
        if self.sender.begin(each.sequence):
            assert self.quiesced is None, "a write begins behind Quiesced"
            taken = self.receiver.out[each.sequence]
            assert (taken.offset, each.length <= taken.size) == (each.offset, True)
        else:
            self.sender.finished(each.sequence, complete=False)

    @precondition(lambda self: self.sender.writing)
    @rule(data=st.data(), complete=st.booleans())
    def finish(self, data: st.DataObject, complete: bool) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.sender.writing)))
        assert sequence in self.receiver.out, "a write under way must own its range"
        complete = complete or not self.sender.stopping
        self.sender.finished(sequence, complete)
        if complete:
            self.notifications.append(sequence)

    @precondition(lambda self: self.sender.over and self.quiesced is None)
    @rule()
    def quiesce(self) -> None:
        self.quiesced = (len(self.sender.sent), self.sender.error)

    @precondition(lambda self: self.quiesced is not None and self.receiver.sent is None)
    @rule()
    def hear_quiesced(self) -> None:
        assert self.quiesced is not None
        self.receiver.quiesced(*self.quiesced)
        if self.receiver.ended:
            self.drain()

    @precondition(lambda self: self.notifications)
    @rule(data=st.data())
    def notify(self, data: st.DataObject) -> None:
        sequence = self.notifications.pop(data.draw(st.integers(0, len(self.notifications) - 1)))
        if not self.receiver.ended:
            self.receiver.arrived(sequence, self.now)

    @precondition(lambda self: self.receiver.copied and not self.receiver.ended)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        self.slab.release(self.receiver.land(data.draw(st.sampled_from(sorted(self.receiver.copied)))))
        self.pump()

    @rule(text=st.sampled_from(["", "broken"]))
    def fail_source(self, text: str) -> None:
        if text and self.quiesced is None:
            self.sender.fail(text)

    @rule(seconds=st.floats(0.1, 2.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        if not self.receiver.ended and (late := self.receiver.expired(self.now)):
            self.receiver.fail(*late)

    @precondition(lambda self: not self.receiver.ended)
    @rule(give_up=st.booleans())
    def end(self, give_up: bool) -> None:
        if give_up or self.receiver.complete or self.receiver.error:
            if self.receiver.needs_cancel:
                self.to_sender.append("cancel")
            self.receiver.ended = True
            if self.receiver.sent is not None:
                self.drain()

    def drain(self) -> None:
        assert not self.sender.writing
        for taken in self.receiver.drain():
            self.slab.release(taken)

    @invariant()
    def consistent(self) -> None:
        self.slab.check_integrity()
        self.receiver.check_integrity()
        self.sender.check_integrity()
        held = [*self.receiver.out.values(), *self.receiver.copied.values()]
        assert self.slab.used_bytes == sum(taken.size for taken in held)
        assert set(self.sender.writing) <= set(self.receiver.out)
        if self.receiver.complete and not self.receiver.error:
            assert self.receiver.landed_until == 100
        if self.receiver.ended and self.receiver.sent is not None:
            assert self.slab.used_bytes == 0

    def teardown(self) -> None:
        """However it stood, it can be brought to an end in which nothing is in use."""
        if not self.receiver.ended:
            self.end(give_up=True)
        while self.to_sender and self.quiesced is None:
            self.deliver()
        for sequence in list(self.sender.writing):
            self.sender.finished(sequence, complete=False)
        if self.quiesced is None:
            assert self.sender.over, "the sender would never quiesce"
            self.quiesce()
        for sequence in list(self.sender.gathering):
            assert not self.sender.begin(sequence), "a write begins behind Quiesced"
            self.sender.finished(sequence, complete=False)
        if self.receiver.sent is None:
            self.hear_quiesced()
        self.consistent()
        assert self.slab.used_bytes == 0


TestConversation = Conversation.TestCase
TestConversation.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (credit(1, 0, 10), "sequence 1; 0 is expected"),
        (credit(0, 95, 10), "the prompt has 100"),
        (credit(0, -1, 10), "the prompt has 100"),
        (credit(0, 0, 0), "the prompt has 100"),
        (Credit(0, Span(0, 10), 0, 7), "its 10 tokens have 1280"),
        (credit(0, 0, 40), "at most 3840 can be staged"),
        (credit(0, 0, 10, offset=SLAB - 1), f"the slab has {SLAB}"),
    ],
)
def test_a_grant_that_is_wrong_is_refused_by_name(bad: Credit, text: str) -> None:
    ticket = OutboundTicket(TICKET, 0, 100)
    with pytest.raises(ValueError, match=text):
        ticket.grant(bad, LAYOUT, SLAB, 30 * LAYOUT.token_bytes)
    ticket.check_integrity()
    assert not ticket.waiting


def test_a_grant_is_for_what_moves() -> None:
    layout = small_layout(windows=(8, 8))
    ticket = OutboundTicket(TICKET, 0, 200)
    assert layout.moved_from(200) == 128
    with pytest.raises(ValueError, match=r"covers tokens 100\.\.128; nothing of them is moved"):
        ticket.grant(Credit(0, Span(100, 28), 0, 0), layout, SLAB, SLAB)
    with pytest.raises(ValueError, match="its 40 tokens have 1536"):
        ticket.grant(Credit(0, Span(100, 40), 0, 40 * layout.token_bytes), layout, SLAB, SLAB)
    ticket.grant(Credit(0, Span(100, 40), 0, 12 * layout.token_bytes), layout, SLAB, SLAB)


def test_no_grant_comes_after_the_last_span() -> None:
    ticket = OutboundTicket(TICKET, 0, 100)
    ticket.grant(credit(0, 90, 10), LAYOUT, SLAB, SLAB)
    with pytest.raises(ValueError, match="after the prompt's last span"):
        ticket.grant(credit(1, 0, 10), LAYOUT, SLAB, SLAB)


def test_a_span_is_sendable_once_when_all_its_tokens_are_computed() -> None:
    ticket = OutboundTicket(TICKET, 0, 100)
    ticket.grant(credit(0, 0, 10), LAYOUT, SLAB, SLAB)
    assert ticket.progressed(9)
    assert not ticket.progressed(5)
    assert ticket.take_sendable() == []
    ticket.progressed(10)
    assert [each.sequence for each in ticket.take_sendable()] == [0]
    assert ticket.take_sendable() == []
    assert ticket.begin(0)
    ticket.fail("first")
    ticket.fail("second")
    assert (ticket.error, ticket.over) == ("first", False)
    ticket.finished(0, complete=True)
    assert ticket.over


def test_deadlines_are_separate_and_waiting_for_space_has_none() -> None:
    ticket = inbound()
    assert ticket.expired(5.0) is None
    assert ticket.expired(5.1) == ("queue_deadline", "the sender did not start within queue_deadline_s = 5")
    ticket.progressed(8, 2.0)
    assert ticket.expired(1000.0) is None, "no grant is out"
    ticket.plan(0, 8)
    slab = Ranges(SLAB)
    taken = slab.allocate(100)
    assert taken is not None
    ticket.grant(taken, 1000.0)
    assert ticket.expired(1003.0) is None
    late = ticket.expired(1003.1)
    assert late is not None
    assert late[0] == "transfer_deadline"
    ticket.progressed(16, 1003.0)
    assert ticket.expired(1006.0) is None
    ticket.arrived(0, 1007.0)
    assert ticket.expired(2000.0) is None, "the span has arrived: the sink's time is not the sender's"


def test_a_span_that_is_not_computed_yet_waits_in_the_queue_and_not_on_the_wire() -> None:
    ticket, slab = inbound(), Ranges(SLAB)
    ticket.progressed(8, 1.0)  # cached, and exported before its turn came
    ticket.plan(0, 8)
    for _ in range(2):
        taken = slab.allocate(100)
        assert taken is not None
        ticket.grant(taken, 1.0)
    ticket.arrived(0, 2.0)
    assert ticket.expired(7.0) is None, "the sender computes for others first"
    assert ticket.expired(7.1) == ("queue_deadline", "the sender computed nothing for queue_deadline_s = 5")
    ticket.progressed(16, 7.0)
    assert ticket.expired(10.0) is None
    assert ticket.expired(10.1) == ("transfer_deadline", "no progress for transfer_deadline_s = 3")


def test_a_sender_that_stands_still_is_late_even_where_no_grant_could_be_given() -> None:
    ticket = inbound()
    ticket.progressed(8, 1.0)
    ticket.plan(8, 8)
    assert ticket.expired(6.0) is None
    assert ticket.expired(6.1) == ("queue_deadline", "the sender computed nothing for queue_deadline_s = 5")
    ticket.progressed(16, 6.0)
    assert ticket.expired(1000.0) is None, "the next span is computed and waits for space"


def test_only_spans_without_a_gap_count_as_landed() -> None:
    ticket, slab = inbound(20), Ranges(SLAB)
    ticket.plan(4, 8)
    assert ticket.spans == (Span(4, 4), Span(8, 8), Span(16, 4))
    for _ in range(3):
        taken = slab.allocate(64)
        assert taken is not None
        ticket.grant(taken, 0.0)
    assert ticket.landed_until == 4
    for sequence, until in ((2, 4), (0, 8), (1, 20)):
        ticket.arrived(sequence, 0.0)
        ticket.land(sequence)
        assert ticket.landed_until == until
    assert (ticket.complete, ticket.needs_cancel, ticket.landed_spans) == (True, False, list(ticket.spans))


def test_an_end_that_comes_too_early_is_an_error() -> None:
    ticket = inbound()
    ticket.plan(0, 50)
    assert ticket.quiesced(1, "")
    assert ticket.error == "the sender ended after 1 of 2 spans"
    unplanned = inbound()
    assert unplanned.quiesced(0, "refused")
    assert not unplanned.fail("later", "does not count")
    assert (unplanned.kind, unplanned.error) == ("sender", "refused")
    with pytest.raises(ValueError, match="cannot plan"):
        unplanned.plan(101, 8)
