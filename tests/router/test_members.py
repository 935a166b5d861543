"""What a router knows of workers, without a connection to any: views are as fresh as what they show."""

from __future__ import annotations

from router.cache.prefix_index import PrefixIndex
from router.placement import book
from router.policies import RequestInfo
from router.workers.members import Member, Members
from router.workers.snapshot import Load
from tandem.cluster import CacheEvent, Candidate, EventKind, Role, Status, WorkerUpdate
from tandem.kv import BLOCK_TOKENS
from tandem.testing.workers import fake_info

BLOCKS = tuple(bytes([n]) * 16 for n in range(4))


def members(*names: str, role: Role = Role.PREFILL) -> tuple[Members[Member], PrefixIndex]:
    index = PrefixIndex(1000, 60.0, lambda: 0.0)
    made: Members[Member] = Members("me", index, lambda: 0.0)
    for name in names:
        worker = Member(fake_info(role, incarnation=name), made.booking_closed, 0.0)
        made.add(worker)
        made.observe(worker, WorkerUpdate(name, 0, snapshot=True))
    return made, index


def test_a_view_is_kept_until_something_changes() -> None:
    made, _ = members("p")
    worker = made.worker("p")
    assert worker is not None
    first = worker.view()
    assert worker.view() is first
    booking = made.book("p", Load(1, 64, 65), BLOCKS[:1])
    assert worker.view().queued_tokens == 64
    made.release(booking)
    assert worker.view().queued_tokens == 0
    made.ended("p", Load(sequences=1))
    made.observe(worker, WorkerUpdate("p", 1, status=Status("p", running=3)))
    assert (worker.view().sequences, worker.view().draining) == (3, False)
    worker.leaving = True
    assert worker.view().draining


def test_a_plan_is_booked_on_both_ends_and_predicted_there() -> None:
    made, index = members("p")
    decode = Member(fake_info(Role.DECODE, incarnation="d"), made.booking_closed, 0.0)
    made.add(decode)
    made.observe(decode, WorkerUpdate("d", 0, snapshot=True))
    request = RequestInfo("r", 4 * BLOCK_TOKENS, max_tokens=10)
    here, there = book(made, request, Candidate("d", "p", 0, BLOCK_TOKENS, {}), BLOCKS)
    views = {v.incarnation: v for v in (*made.snapshot().prefill, *made.snapshot().decode)}
    assert (views["p"].queued_tokens, views["d"].queued_tokens, views["d"].sequences) == (3 * BLOCK_TOKENS - 1, 0, 1)
    # The last prompt token is never computed on a prefill worker, so its block is not complete there.
    assert index.match(BLOCKS) == {"p": 3, "d": 4}
    assert made.release(here) and made.release(there)
    assert made.bookings() == 0 and not index.match(BLOCKS)
    local, none = book(made, request, Candidate("d", None, BLOCK_TOKENS, 0, {}), BLOCKS)
    assert none is None and local is not None and local.load.prefill_tokens == 3 * BLOCK_TOKENS - 1


def test_a_worker_out_of_sight_is_not_planned_with_and_its_cache_not_believed() -> None:
    made, index = members("p", "q")
    worker = made.worker("p")
    assert worker is not None
    made.observe(worker, WorkerUpdate("p", 1, (CacheEvent(EventKind.STORED, BLOCKS),)))
    assert index.match(BLOCKS) == {"p": 4}
    made.lose_sight(worker)
    assert [v.incarnation for v in made.snapshot().prefill] == ["q"] and not index.match(BLOCKS)
    made.remove(worker)
    assert made.worker("p") is None
