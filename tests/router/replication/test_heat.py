"""Requests are counted by their prompts' prefixes, near enough, and within a bound."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.replication.heat import EXACT, FORGET_S, TAU_S, PrefixHeat, depths


def chain(*parts: int) -> list[bytes]:
    """Hashes of blocks; each names all before it."""
    return [repr(parts[: end + 1]).encode() for end in range(len(parts))]


def test_short_prefixes_are_told_apart_and_long_ones_nearly() -> None:
    found = list(depths(2000))
    assert found[:EXACT] == list(range(1, EXACT + 1))
    assert len(found) < 80
    assert all(after - before <= before / 8 for before, after in zip(found[EXACT:], found[EXACT + 1 :], strict=False))
    assert list(depths(3)) == [1, 2, 3]
    assert list(depths(0)) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.lists(st.integers(0, 1), max_size=6)), max_size=30))
def test_counts_are_those_of_a_naive_model(asked: list[tuple[float, list[int]]]) -> None:
    now = 0.0
    heat, log = PrefixHeat(10_000, lambda: now), []
    for pause, parts in asked:
        now += pause
        heat.asked(chain(*parts))
        log.append((now, parts))
        heat.check_integrity()
    for _, parts in asked:
        expected = {
            depth: sum(math.exp((at - now) / TAU_S) for at, other in log if other[:depth] == parts[:depth])
            for depth in range(1, len(parts) + 1)
        }
        assert heat.counts(chain(*parts)) == pytest.approx(expected)


def test_the_least_recently_asked_for_is_forgotten() -> None:
    heat = PrefixHeat(4, lambda: 0.0)
    heat.asked(chain(1, 1))
    heat.asked(chain(2, 2))
    heat.asked(chain(1, 1))
    heat.asked(chain(3))
    heat.check_integrity()
    assert len(heat) == 4
    assert set(heat.counts(chain(1, 1)).values()) == {2.0}
    assert heat.counts(chain(2, 2)) == {2: 1.0}


def test_what_nobody_asks_for_any_more_is_forgotten() -> None:
    now = 0.0
    heat = PrefixHeat(10_000, lambda: now)
    heat.asked([])
    heat.asked(chain(1, 1))
    now = FORGET_S
    heat.asked(chain(2))
    assert len(heat) == 3
    now = FORGET_S + 1
    heat.asked([])
    assert len(heat) == 1
    now = 3 * FORGET_S
    heat.asked([])
    assert len(heat) == 0
