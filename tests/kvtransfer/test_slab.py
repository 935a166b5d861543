from __future__ import annotations

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.slab import ALIGN, Range, Ranges, SlabBudget, Staging
from tandem.errors import Overloaded

SIZE = 4096


class RangesMachine(RuleBasedStateMachine):
    """Against a model: one byte of owner for each byte."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges = Ranges(SIZE)
        self.held: list[Range] = []
        self.owned = bytearray(SIZE)

    @rule(length=st.integers(1, 1500))
    def allocate(self, length: int) -> None:
        size = -(-length // ALIGN) * ALIGN
        taken = self.ranges.allocate(length)
        if taken is None:
            assert bytes(size) not in bytes(self.owned), "there was room"
            return
        assert taken.size == size
        assert taken.offset == self.owned.index(bytes(size)), "not the first fit"
        self.owned[taken.offset : taken.offset + size] = b"x" * size
        self.held.append(taken)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        taken = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.ranges.release(taken)
        self.owned[taken.offset : taken.offset + taken.size] = bytes(taken.size)
        with pytest.raises(ValueError, match="not in use"):
            self.ranges.release(taken)

    @invariant()
    def consistent(self) -> None:
        self.ranges.check_integrity()
        assert self.ranges.used_bytes == sum(self.owned[index] != 0 for index in range(SIZE))


TestRanges = RangesMachine.TestCase
TestRanges.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


class BudgetMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.budget = SlabBudget(1000)
        self.slabs: dict[int, tuple[int, bool]] = {}

    @rule(size=st.integers(1, 600))
    def take(self, size: int) -> None:
        fits = sum(slab for slab, _ in self.slabs.values()) + size <= 1000
        if fits:
            self.slabs[self.budget.take(size)] = (size, False)
        else:
            with pytest.raises(Overloaded, match="slabs_max_mib"):
                self.budget.take(size)

    @precondition(lambda self: self.slabs)
    @rule(data=st.data(), closed=st.booleans())
    def end(self, data: st.DataObject, closed: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.slabs)))
        if closed:
            self.budget.release(key)
            del self.slabs[key]
        else:
            self.budget.quarantine(key)
            self.slabs[key] = (self.slabs[key][0], True)

    @invariant()
    def consistent(self) -> None:
        self.budget.check_integrity()
        assert self.budget.used_bytes == sum(size for size, _ in self.slabs.values())
        assert self.budget.quarantined_bytes == sum(size for size, quarantined in self.slabs.values() if quarantined)


TestBudget = BudgetMachine.TestCase
TestBudget.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_a_range_that_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Ranges(SIZE).allocate(SIZE + 1)
    with pytest.raises(ValueError, match="does not fit"):
        Ranges(SIZE).allocate(0)


def test_quarantine_that_leaves_no_room_for_a_slab_means_the_worker_is_stuck() -> None:
    budget = SlabBudget(100)
    first = budget.take(60)
    assert not budget.stuck
    budget.quarantine(first)
    states = [budget.stuck]
    budget.release(first)
    assert [*states, budget.stuck] == [True, False]


def yes() -> bool:
    return True


async def obtained(staging: Staging, length: int, owner: object = "a") -> Range:
    taken = await staging.obtain(length, owner, yes)
    assert taken is not None
    return taken


async def test_those_who_wait_for_staging_are_served_in_order() -> None:
    staging = Staging(SIZE)
    first, second = await obtained(staging, SIZE // 2), await obtained(staging, SIZE // 2, "b")
    served: list[str] = []

    async def wait(name: str, length: int) -> Range:
        taken = await obtained(staging, length, name)
        served.append(name)
        return taken

    large = asyncio.create_task(wait("large", SIZE))
    await asyncio.sleep(0)
    gone = asyncio.create_task(wait("gone", ALIGN))
    small = asyncio.create_task(wait("small", ALIGN))
    await asyncio.sleep(0)
    gone.cancel()
    staging.release(first)
    await asyncio.sleep(0)
    assert served == [], "the small one must not overtake"
    staging.release(second)
    taken = await large
    staging.release(taken)
    staging.release(await small)
    assert served == ["large", "small"]
    assert staging.used_bytes == 0
    staging.check_integrity()


async def test_one_owner_leaves_half_of_the_staging_to_the_others() -> None:
    staging, quarter = Staging(SIZE), SIZE // 4
    held = [await obtained(staging, quarter) for _ in range(2)]
    third = asyncio.create_task(obtained(staging, quarter))
    await asyncio.sleep(0)
    others = await obtained(staging, quarter, "b")
    assert not third.done()
    staging.release(held.pop())
    for taken in (await third, others, *held):
        staging.release(taken)
    staging.release(await obtained(staging, SIZE))  # a span larger than half still has its turn
    assert staging.used_bytes == 0


async def test_who_is_not_wanted_any_more_waits_for_no_room() -> None:
    staging, wanted = Staging(SIZE), True
    first = await obtained(staging, SIZE)
    waiter = asyncio.create_task(staging.obtain(SIZE, "b", lambda: wanted))
    await asyncio.sleep(0)
    wanted = False
    staging.serve()
    assert await waiter is None
    staging.release(first)
    assert staging.used_bytes == 0


async def test_a_waiter_that_is_cancelled_as_it_is_served_gives_its_range_back() -> None:
    staging = Staging(SIZE)
    first = await obtained(staging, SIZE)
    waiter = asyncio.create_task(obtained(staging, SIZE))
    await asyncio.sleep(0)
    staging.release(first)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert staging.used_bytes == 0


async def test_a_span_larger_than_the_staging_is_refused() -> None:
    staging = Staging(SIZE)
    with pytest.raises(ValueError, match="does not fit"):
        await obtained(staging, SIZE + 1)
    assert staging.view(Range(0, 128), 100).nbytes == 100
