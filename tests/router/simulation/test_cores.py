"""Cores are shared equally: nobody gets more than one, and no work is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.simulation.clock import Clock
from router.simulation.cores import Cores


def ends(tasks: list[tuple[float, float]], count: int, background: float = 0.0, crowding: float = 0.0) -> list[float]:
    """When tasks of (start, seconds) end."""
    clock, found = Clock(), [-1.0] * len(tasks)
    cores = Cores(clock, count, background, crowding)

    def end(number: int) -> None:
        found[number] = clock.now

    for number, (start, seconds) in enumerate(tasks):
        clock.at(start, cores.run, seconds, lambda number=number: end(number))
    clock.run()
    assert cores.busy == 0
    return found


def test_a_task_gets_one_core_and_no_more() -> None:
    assert ends([(0.0, 1.0), (0.0, 1.0)], 2) == pytest.approx([1.0, 1.0])
    assert ends([(0.0, 1.0), (0.0, 1.0), (0.0, 1.0)], 2) == pytest.approx([1.5, 1.5, 1.5])


def test_who_comes_later_slows_down_who_is_there() -> None:
    # Alone for a second, then half a core each until the second one has its half.
    assert ends([(0.0, 2.0), (1.0, 0.5)], 1) == pytest.approx([2.5, 2.0])


def test_what_always_runs_and_what_is_shared_make_everything_slower() -> None:
    assert ends([(0.0, 1.0), (0.0, 1.0)], 2, background=0.5) == pytest.approx([4 / 3, 4 / 3])
    assert ends([(0.0, 1.0)], 2, crowding=0.5) == pytest.approx([1.0])
    assert ends([(0.0, 1.0), (0.0, 1.0)], 2, crowding=0.5) == pytest.approx([1.5, 1.5])


def test_what_has_to_be_woken_takes_longer_the_more_is_busy() -> None:
    clock = Clock()
    cores = Cores(clock, 2, contention=1.0)
    seen = [cores.stretch]
    for _ in range(3):
        cores.run(1.0, lambda: None)
        seen.append(cores.stretch)
    assert seen == [1.0, 1.5, 2.0, 2.0]


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(0.001, 3)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.floats(0, 1),
)
def test_no_work_is_lost(tasks: list[tuple[float, float]], count: int, crowding: float) -> None:
    found = ends(tasks, count, crowding=crowding)
    for (start, seconds), end in zip(tasks, found, strict=True):
        assert end >= start + seconds - 1e-6
    work = sum(seconds for _, seconds in tasks)
    latest = max(start for start, _ in tasks)
    assert max(found) - min(start for start, _ in tasks) >= work / count - 1e-6
    assert max(found) <= latest + work * (1 + crowding) + 1e-6


def test_steps_wait_for_a_place_in_order() -> None:
    cores, taken = Cores(Clock(), 2), []
    for number in range(4):
        cores.take(lambda number=number: taken.append(number))  # type: ignore[misc]
    assert taken == [0, 1]
    cores.give()
    assert taken == [0, 1, 2]
    for _ in range(3):
        cores.give()
    assert taken == [0, 1, 2, 3]
    assert cores.free == 2
