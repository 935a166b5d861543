"""How long drafts are: by acceptance, by load, and by what steps cost."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.engine.spec.adaptive import (
    ENOUGH,
    FIRST_PAUSE,
    LASTING_LONGER,
    LASTING_STEPS,
    LONGEST_PAUSE,
    Costs,
    Load,
    Offer,
    Pause,
    Rate,
    choose_lengths,
)


def costs(base: float, slope: float, sizes: Sequence[int]) -> Costs:
    made = Costs()
    for size in sizes:
        for _ in range(ENOUGH):
            made.add(size, base + slope * size)
    return made


EVERY = [*range(1, 65), 80, 96, 128, 256]


def lengths(chances: Sequence[float], base: float, slope: float, limit: int = 8, budget: int = 500) -> list[int]:
    offers = [Offer(chance, limit) for chance in chances]
    measured = costs(base, slope, EVERY)
    return choose_lengths(offers, Load(len(offers), len(offers), budget), measured, measured)


def test_drafts_are_longer_the_more_is_accepted() -> None:
    found = [lengths([chance], 10.0, 0.5)[0] for chance in (0.02, 0.3, 0.6, 0.8, 0.95)]
    assert found == sorted(found) and found[0] == 0 and found[-1] == 8 and len(set(found)) >= 4


def test_there_are_none_where_every_token_costs_as_much() -> None:
    assert lengths([0.9], 0.0, 1.0) == [0]
    assert lengths([0.9] * 16, 1.0, 1.0) == [0] * 16


def test_a_large_batch_has_shorter_drafts() -> None:
    alone, many = lengths([0.7], 10.0, 0.5), lengths([0.7] * 16, 10.0, 0.5)
    assert alone[0] > max(many)


def test_the_likeliest_have_the_longest() -> None:
    found = lengths([0.9, 0.5, 0.05], 10.0, 0.4)
    assert found[0] > found[1] >= 1 and found[2] == 0


def test_limits_and_budget_are_kept() -> None:
    assert lengths([0.99], 10.0, 0.01, limit=3) == [3]
    assert sum(lengths([0.99] * 4, 10.0, 0.01, budget=6)) == 6


def test_rows_without_drafts_count_too() -> None:
    """One draft among many rows must pay for the time that it costs them all."""
    offers, measured = [Offer(0.5, 4)], costs(10.0, 1.0, EVERY)
    assert choose_lengths(offers, Load(1, 1, 99), measured, measured) != [0]
    assert choose_lengths(offers, Load(32, 32, 99), measured, measured) == [0]


def test_plain_steps_are_measured_before_any_is_replaced() -> None:
    offers, load, plain = [Offer(0.9, 4)], Load(1, 1, 99), Costs()
    for _ in range(ENOUGH):
        assert choose_lengths(offers, load, plain, Costs()) == [0]
        plain.add(1, 0.01)
    assert choose_lengths(offers, load, plain, Costs()) == [4]
    assert choose_lengths(offers, Load(1, 9, 99), plain, Costs()) == [0]


def test_costs_are_lines_between_what_was_measured() -> None:
    made = Costs()
    assert made.estimate(3) is None
    made.add(4, 1.0)
    made.add(8, 2.0)
    assert [made.estimate(size) for size in (4, 6, 8)] == [1.0, 1.5, 2.0]
    below, above = made.estimate(1), made.estimate(12)
    assert below is not None and above is not None and 0.5 < below < 1.0 and 2.0 < above < 4.0


def test_one_slow_step_is_no_measure() -> None:
    made = costs(1.0, 0.0, [4])
    made.add(4, 50.0)
    assert made.estimate(4) == 1.0
    made.add(4, 1.0)
    made.add(4, 40.0)
    assert made.estimate(4) == 1.0
    for _ in range(4):
        made.add(4, 3.0)
    assert made.estimate(4) == 3.0, "the machine has become slower"


def test_sizes_that_do_not_occur_again_are_forgotten() -> None:
    made = costs(1.0, 1.0, [4, 9])
    made.add(6, 1.0)
    for _ in range(2 * LASTING_STEPS):
        made.add(9, 2.0)
    assert made.sizes == [4, 9], "6 occurred once"
    for _ in range(LASTING_LONGER * LASTING_STEPS):
        made.add(9, 2.0)
    assert made.sizes == [9]
    for _ in range((LASTING_LONGER + 1) * LASTING_STEPS):
        made.expire()
    assert not made.knows(9) and made.estimate(9) is None


def test_memory_is_bounded() -> None:
    made = Costs()
    for size in range(1, 5000):
        made.add(size, 1.0)
    assert len(made.sizes) < 300


def test_rates_begin_with_a_guess_and_follow_what_happens() -> None:
    rate = Rate()
    assert rate.value(0.6) == 0.6
    for _ in range(30):
        rate.add(4, 4, 0.85)
    assert rate.value(0.6) > 0.95
    for _ in range(10):
        rate.add(0, 1, 0.85)
    assert rate.value(0.6) < 0.6


def test_pauses_grow_until_a_draft_pays() -> None:
    pause, waits = Pause(), list[int]()
    for _ in range(7):
        waited = 1
        while not pause.wait():
            waited += 1
        waits.append(waited)
        pause.probe()
    assert waits == [8, 16, 32, 64, 128, 256, 256] and (waits[0], waits[-1]) == (FIRST_PAUSE, LONGEST_PAUSE)
    pause.end()
    assert pause.length == FIRST_PAUSE
