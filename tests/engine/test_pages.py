from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tandem.engine.pages import PagePool, PagesExhausted

PAGES = 6


def test_a_pool_needs_a_page() -> None:
    with pytest.raises(ValueError, match="num_pages is 0; it must be at least 1"):
        PagePool(0)


def test_a_refused_allocation_takes_nothing() -> None:
    pool = PagePool(3)
    pool.allocate(2)
    assert not pool.can_allocate(2)
    with pytest.raises(PagesExhausted, match="2 pages were asked for and 1 of 3 are free"):
        pool.allocate(2)
    assert pool.free_count == 1


@pytest.mark.parametrize("page", [-1, 3, 0])
def test_only_pages_in_use_can_be_freed(page: int) -> None:
    pool = PagePool(3)
    with pytest.raises(ValueError, match=f"page {page} is freed but not in use"):
        pool.free([page])


class PoolMachine(RuleBasedStateMachine):
    """The pool against a set of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES)
        self.taken: set[int] = set()

    @rule(count=st.integers(0, PAGES + 1))
    def allocate(self, count: int) -> None:
        fits = count <= PAGES - len(self.taken)
        assert self.pool.can_allocate(count) == fits
        if not fits:
            with pytest.raises(PagesExhausted):
                self.pool.allocate(count)
            return
        pages = self.pool.allocate(count)
        assert len(pages) == count == len(set(pages))
        assert not self.taken & set(pages)
        assert set(pages) <= set(range(PAGES))
        self.taken |= set(pages)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted(self.taken)), unique=True))
        self.pool.free(pages)
        self.taken -= set(pages)

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.used() == self.taken
        assert self.pool.free_count == PAGES - len(self.taken)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
