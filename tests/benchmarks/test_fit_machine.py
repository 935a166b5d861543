"""What is fitted to measurements that follow the model exactly is the model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.client import Sample
from benchmarks.fit_machine import (
    FAST_LINK,
    Counts,
    Spent,
    counts,
    fit_around,
    fit_crowding,
    fit_hand_over,
    fit_host,
    fit_pause,
    fit_steps,
    workers,
)
from tandem.cluster import StepTiming

TIMING = StepTiming(base_ms=2.0, per_token_ms=0.1)


def sample(tokens: int, ttft_ms: float) -> Sample:
    return Sample(started=1.0, wished_tokens=1, ended=9.0, chunks=[1.0 + ttft_ms / 1e3], prompt_tokens=tokens)


def test_step_times_are_found_again() -> None:
    intervals = [Counts(n, (n * 2.0 + t * 0.1) / 1e3, t) for n, t in ((1, 512), (40, 40), (10, 1500), (0, 0))]
    found = fit_steps(intervals)
    assert (found.base_ms, found.per_token_ms) == pytest.approx((2.0, 0.1))
    with pytest.raises(ValueError, match="too few steps of different sizes"):
        fit_steps([Counts(2, 0.1, 4), Counts(4, 0.2, 8)])


@pytest.mark.parametrize("move_ms", [0.0, 0.01])
def test_what_surrounds_a_request_and_a_hand_over_is_found_again(move_ms: float) -> None:
    around, hand_over = 5.0, 3.0
    warm = [sample(tokens, around + 1.0 + 2.1) for tokens in (101, 401, 1001)]
    assert fit_around(TIMING, warm) == pytest.approx(around)
    cold = [
        sample(tokens, around + 2.0 + 2.1 + hand_over + -(-(tokens - 1) // 512) * 2.0 + (tokens - 1) * (0.1 + move_ms))
        for tokens in (101, 401, 1001) * 2
    ]
    fixed, rate = fit_hand_over(TIMING, around, cold, kv_bytes=2048)
    assert fixed == pytest.approx(hand_over, abs=0.02)
    assert rate == pytest.approx(2048 / move_ms if move_ms else FAST_LINK, rel=0.01)


def test_what_lies_between_steps_is_in_the_pace_of_answers() -> None:
    answers = [replace(sample(100, 9.0), chunks=[1.0, 1.0 + 9 * 2.5e-3], output_tokens=10) for _ in range(3)]
    assert fit_pause(TIMING, answers) == pytest.approx(0.4)
    assert fit_pause(TIMING, [replace(each, chunks=[1.0, 1.001]) for each in answers]) == 0.0
    with pytest.raises(ValueError, match="in one chunk each"):
        fit_pause(TIMING, [replace(each, chunks=[1.0]) for each in answers])
    load = Spent(9.0, 9.0, Counts(10, 0.5, 99)).with_pauses(0.4)
    assert load.steps.seconds == pytest.approx(0.504)


def test_what_processes_spend_beside_steps_is_found_again() -> None:
    def load(requests: int, tokens: int, seconds: float, steps_s: float) -> Spent:
        cpu = 0.1 * seconds + steps_s + requests * 0.012 + tokens * 0.0003
        return Spent(seconds, cpu, Counts(9, steps_s, 99), requests, tokens)

    loads = [load(40, 640, 9.0, 1.5), load(10, 2560, 4.0, 3.0)]
    assert fit_host(Spent(4.0, 0.4, Counts()), loads) == pytest.approx((0.1, 12.0, 0.3))
    # Steps waited for cores that something else had.
    slow = [replace(each, steps=replace(each.steps, seconds=2 * each.steps.seconds)) for each in loads]
    with pytest.raises(ValueError, match="other programs use the cores"):
        fit_host(Spent(4.0, 0.4, Counts()), slow)


def test_crowding_is_the_cpu_time_that_the_same_steps_take_more() -> None:
    steps = Counts(100, 5.0, 2000)  # the time does not count: others had the cores meanwhile
    model_s = (100 * TIMING.base_ms + 2000 * TIMING.per_token_ms) / 1e3
    alone = [Spent(9.0, 9.0, steps, engine_s=model_s * 1.1)] * 2
    full = Spent(3.0, 6.0, replace(steps, seconds=50.0), engine_s=model_s * 1.1 * 1.4)
    assert fit_crowding(TIMING, alone, full) == pytest.approx(0.4)
    assert fit_crowding(TIMING, alone, replace(full, engine_s=model_s)) == 0.0
    with pytest.raises(ValueError, match="no CPU time"):
        fit_crowding(TIMING, [Spent(9.0, 9.0, steps)], full)


def test_counters_are_read_from_a_workers_page() -> None:
    page = "\n".join(
        [
            "# TYPE tandem_worker_step_seconds histogram",
            'tandem_worker_step_seconds_bucket{le="+Inf"} 7.0',
            "tandem_worker_step_seconds_count 7.0",
            "tandem_worker_step_seconds_sum 0.25",
            "# TYPE tandem_worker_step_tokens counter",
            "tandem_worker_step_tokens_total 900.0",
            "",
        ]
    )
    assert counts(page) == Counts(7.0, 0.25, 900.0)
    added = counts(page).since(Counts(2.0, 0.05, 400.0))
    assert (added.steps, added.seconds, added.tokens) == pytest.approx((5.0, 0.2, 500.0))


def test_workers_are_found_in_what_up_prints() -> None:
    log = "  router     127.0.0.1:1  pid 5\n  prefill-0  127.0.0.1:2  pid 6  256 pages  metrics 37209\n"
    assert workers(log) == [(6, 256, "http://127.0.0.1:37209/metrics")]
    with pytest.raises(ValueError, match="names no workers"):
        workers("starting\n")
