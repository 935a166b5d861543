"""Who is let in, who waits, and who is shed."""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.admission.gate import Admission
from tandem.errors import Overloaded, TandemError, Unavailable


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def gate(
    inflight: int = 2, queued: int = 0, deadline_s: float = 60.0, room: Callable[[], float] = lambda: math.inf
) -> Admission:
    return Admission(inflight, queued, deadline_s, room, Clock())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_bound_holds_and_leaving_frees_a_place_once() -> None:
    admission = gate()
    await admission.enter("a")
    await admission.enter("b")
    with pytest.raises(Overloaded, match="2 requests are in flight and 0 wait, which is the most"):
        await admission.enter("c")
    admission.leave("a")
    admission.leave("a")
    assert admission.inflight == 1
    await admission.enter("c")
    with pytest.raises(ValueError, match="request_id c is already in flight"):
        await admission.enter("c")
    admission.leave("b")
    admission.leave("c")
    assert admission.inflight == 0
    admission.check_integrity()


async def test_priority_goes_first_then_tenants_with_few_inside_then_arrival() -> None:
    admission = gate(inflight=3, queued=9)
    for name in ("x1", "x2", "x3"):
        await admission.enter(name, tenant="x")
    order: list[str] = []

    async def wait(name: str, priority: int, tenant: str) -> None:
        await admission.enter(name, priority, tenant)
        order.append(name)

    tasks = []
    for name, priority, tenant in (("x4", 0, "x"), ("x5", 0, "x"), ("y1", 0, "y"), ("low", -1, "z"), ("vip", 5, "x")):
        tasks.append(asyncio.ensure_future(wait(name, priority, tenant)))
        await settle()
    for name in ("x1", "x2", "x3", "vip", "y1"):
        admission.leave(name)
        await settle()
        admission.check_integrity()
    assert order == ["vip", "y1", "x4", "x5", "low"]
    await asyncio.gather(*tasks)


async def test_a_full_queue_sheds_the_newest_of_the_lowest_priority() -> None:
    admission = gate(inflight=1, queued=2)
    await admission.enter("in")
    waiting = {}
    for name, priority in (("low1", 0), ("low2", 0), ("high", 1)):
        waiting[name] = asyncio.ensure_future(admission.enter(name, priority))
        await settle()
    with pytest.raises(Overloaded) as refused:
        await waiting["low2"]
    assert refused.value.retry_s == 1.0
    with pytest.raises(Overloaded):
        await admission.enter("low3", 0)
    assert admission.refused == {"full": 2}
    admission.check_integrity()
    admission.leave("in")
    await waiting["high"]
    admission.leave("high")
    await waiting["low1"]


async def test_a_flood_of_one_tenant_displaces_itself_and_not_others() -> None:
    admission = gate(inflight=1, queued=4)
    await admission.enter("in")
    flood = {}
    for number in range(4):
        flood[number] = asyncio.ensure_future(admission.enter(f"flood{number}", tenant="flood"))
        await settle()
    small = []
    for number in range(2):
        small.append(asyncio.ensure_future(admission.enter(f"small{number}", tenant="small")))
        await settle()
        admission.check_integrity()
    for number in (3, 2):
        with pytest.raises(Overloaded):
            await flood[number]
    low = asyncio.ensure_future(admission.enter("low", -1, tenant="other"))
    with pytest.raises(Overloaded):
        await low
    high = asyncio.ensure_future(admission.enter("high", 1, tenant="flood"))
    await settle()
    assert small[1].done(), "both have two waiting, and this is the newest"
    with pytest.raises(Overloaded):
        await small[1]
    for task in (flood[0], flood[1], small[0], high):
        assert not task.done()
        task.cancel()
    await asyncio.gather(flood[0], flood[1], small[0], high, return_exceptions=True)
    admission.leave("in")


async def test_who_waits_too_long_leaves_with_503() -> None:
    admission = gate(inflight=1, queued=2, deadline_s=0.01)
    await admission.enter("in")
    with pytest.raises(Unavailable, match=r"waited 0\.01 s") as refused:
        await admission.enter("late")
    assert refused.value.retry_s
    assert (admission.inflight, admission.queued) == (1, 0)
    assert admission.refused == {"late": 1} and admission.oldest_s == 0.0


async def test_requests_wait_for_room_at_workers() -> None:
    full = True
    admission = gate(queued=2, room=lambda: not full)
    waiting = asyncio.ensure_future(admission.enter("a"))
    await settle()
    assert (admission.inflight, admission.queued) == (0, 1)
    full = False
    admission.wake()
    await waiting
    assert (admission.inflight, admission.queued) == (1, 0)


async def test_no_more_are_let_in_at_once_than_there_is_room_for() -> None:
    room = 0
    admission = gate(inflight=9, queued=9, room=lambda: room)
    waiting = [asyncio.ensure_future(admission.enter(name)) for name in "abc"]
    await settle()
    room = 2
    admission.wake()
    await settle()
    assert [task.done() for task in waiting] == [True, True, False]
    room = 1
    admission.placed("a")
    admission.placed("b")
    admission.wake()
    await waiting[2]


@pytest.mark.parametrize("leave_first", [False, True])
async def test_a_client_that_goes_away_while_it_waits_leaves_nothing(leave_first: bool) -> None:
    """Also when it is let in in the same moment."""
    admission = gate(inflight=1, queued=2)
    await admission.enter("in")
    waiting = asyncio.ensure_future(admission.enter("gone"))
    await settle()
    if leave_first:
        admission.leave("in")
    waiting.cancel()
    await asyncio.wait([waiting])
    admission.leave("in")
    assert (admission.inflight, admission.queued) == (0, 0)
    admission.check_integrity()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["enter", "leave", "cancel"]), st.integers(0, 2)), max_size=30))
def test_every_request_is_in_waits_or_was_refused(steps: list[tuple[str, int]]) -> None:
    async def play() -> None:
        admission = gate(inflight=2, queued=3)
        tasks: dict[str, asyncio.Future[None]] = {}
        ended: set[str] = set()
        for number, (action, value) in enumerate(steps):
            name = f"r{number}"
            inside = [n for n, task in tasks.items() if task.done() and not task.exception() and n not in ended]
            outside = [n for n, task in tasks.items() if not task.done()]
            if action == "enter":
                tasks[name] = asyncio.ensure_future(admission.enter(name, value, "ab"[value % 2]))
            elif action == "leave" and inside:
                ended.add(inside[value % len(inside)])
                admission.leave(inside[value % len(inside)])
            elif action == "cancel" and outside:
                ended.add(outside[value % len(outside)])
                task = tasks.pop(outside[value % len(outside)])
                task.cancel()
            await settle()
            admission.check_integrity()
            states = Counter("waits" if not t.done() else "out" if t.exception() else "in" for t in tasks.values())
            assert states["waits"] == admission.queued
            gone = sum(1 for n in ended if n in tasks)
            assert states["in"] - gone == admission.inflight
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)

    asyncio.run(play())


SERVICE_S, DEADLINE_S, SERVERS = 1000.0, 4000.0, 2
"""Virtual: so long that no real timer fires."""


async def served_in_time(offered: float, services: int) -> tuple[int, Counter[int]]:
    """Requests of three priorities, offered at a multiple of what can be served; all in virtual time."""
    clock = Clock()
    admission = Admission(SERVERS, 8, DEADLINE_S - SERVICE_S, lambda: math.inf, clock)
    ends: list[tuple[float, str]] = []
    good: Counter[int] = Counter()

    async def ask(name: str, priority: int, at: float) -> None:
        try:
            await admission.enter(name, priority)
        except TandemError:
            return
        heapq.heappush(ends, (clock.now + SERVICE_S, name))
        good[priority] += clock.now + SERVICE_S - at <= DEADLINE_S

    tasks = []
    arrivals = [(n * SERVICE_S / SERVERS / offered, n) for n in range(int(services * SERVERS * offered))]
    for at, number in arrivals:
        while ends and ends[0][0] <= at:
            clock.now, name = heapq.heappop(ends)
            admission.leave(name)
            await settle()
        clock.now = at
        tasks.append(asyncio.ensure_future(ask(f"r{number}", number % 3, at)))
        await settle()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return good.total(), good


async def test_overload_keeps_goodput_flat_and_serves_high_priority() -> None:
    capacity = 100 * SERVERS
    at_capacity, _ = await served_in_time(1.0, 100)
    twice, by_priority = await served_in_time(2.0, 100)
    five_times, _ = await served_in_time(5.0, 100)
    assert at_capacity >= 0.97 * capacity
    assert twice >= 0.97 * at_capacity
    assert five_times >= 0.97 * at_capacity
    asked = 2 * capacity // 3
    assert by_priority[2] >= 0.97 * asked
    assert by_priority[0] <= 0.1 * asked
