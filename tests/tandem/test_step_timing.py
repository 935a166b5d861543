"""The line through a worker's steps."""

from __future__ import annotations

import pytest

from tandem.step_timing import ENOUGH, TimingFit


def fit_of(steps: list[tuple[int, float]]) -> TimingFit:
    fit = TimingFit()
    for tokens, seconds in steps:
        fit.add(tokens, seconds)
    return fit


def test_a_line_is_found_again() -> None:
    timing = fit_of([(tokens, (2.0 + 0.25 * tokens) / 1e3) for tokens in (1, 8, 64, 2, 512, 16, 1, 300, 5)]).fit()
    assert timing is not None
    assert timing.base_ms == pytest.approx(2.0)
    assert timing.per_token_ms == pytest.approx(0.25)


def test_nothing_is_said_before_there_are_enough_steps() -> None:
    steps = [(1 + index, 0.001) for index in range(ENOUGH - 1)]
    assert fit_of(steps).fit() is None
    assert fit_of([*steps, (9, 0.001)]).fit() is not None


def test_steps_of_one_size_give_a_rate() -> None:
    timing = fit_of([(10, 0.005)] * 20).fit()
    assert timing is not None
    assert timing.base_ms == 0.0
    assert timing.per_token_ms == pytest.approx(0.5)


@pytest.mark.parametrize(
    "steps",
    [
        [(tokens, (10.0 - tokens) / 1e3) for tokens in range(1, 10)],  # larger ones were faster
        [(tokens, max(tokens - 5, 0) / 1e3) for tokens in range(1, 12)],  # the line meets zero on the way
    ],
)
def test_no_coefficient_is_negative(steps: list[tuple[int, float]]) -> None:
    timing = fit_of(steps).fit()
    assert timing is not None
    assert timing.base_ms >= 0.0
    assert timing.per_token_ms >= 0.0


def test_the_past_fades() -> None:
    slow = [(tokens, tokens / 1e3) for tokens in (1, 50, 100, 200)] * 5
    fast = [(tokens, tokens / 1e4) for tokens in (1, 50, 100, 200)] * 100
    timing = fit_of(slow + fast).fit()
    assert timing is not None
    assert timing.per_token_ms == pytest.approx(0.1, rel=0.02)
