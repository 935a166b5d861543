"""What is fitted to measurements that follow the model exactly is the model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.client import Sample
from benchmarks.fits import (
    BATCH_TOKENS,
    FAST_LINK,
    Counts,
    Spent,
    StepModel,
    fit_around,
    fit_by_simulation,
    fit_hand_over,
    fit_host,
    fit_pause,
    fit_steps,
    looked_back,
    middle,
    prompt_work,
)

MODEL = StepModel(base_ms=2.0, per_token_ms=0.1, per_prefix_ms=1e-4, per_context_ms=5e-4)


def sample(tokens: int, ttft_ms: float, cached: int = 0) -> Sample:
    chunks = [1.0 + ttft_ms / 1e3]
    return Sample(started=1.0, wished_tokens=1, ended=9.0, chunks=chunks, prompt_tokens=tokens, cached_tokens=cached)


def timed(counts: Counts, model: StepModel = MODEL) -> Counts:
    return replace(counts, seconds=model.of(counts) / 1e3)


def test_a_prompts_work_is_that_of_its_chunks() -> None:
    assert prompt_work(100, 0) == Counts(1, tokens=100)
    assert prompt_work(100, 64) == Counts(1, tokens=36, prefix=36 * 64)
    two = prompt_work(BATCH_TOKENS + 10, 0)
    assert two == Counts(2, tokens=BATCH_TOKENS + 10, prefix=10 * BATCH_TOKENS)
    # Its steps after the first look back on the prompt, and on one token more each.
    answer = replace(sample(100, 9.0, cached=64), output_tokens=4)
    assert looked_back(answer) == Counts(prefix=36 * 64, context=101 + 102 + 103)


def test_step_times_are_found_again() -> None:
    prompts = [prompt_work(tokens, cached) for tokens, cached in ((200, 0), (1300, 0), (700, 600), (1300, 1200))]
    answers = [Counts(steps, tokens=steps, context=steps * back) for steps, back in ((60, 200), (40, 1300))]
    found = fit_steps([timed(each) for each in (*prompts, *answers, Counts())])
    assert found == pytest.approx(MODEL)
    with pytest.raises(ValueError, match="too few steps of different sizes"):
        fit_steps([Counts(2, 0.1, 4), Counts(4, 0.2, 8)])


def test_no_coefficient_is_below_nothing() -> None:
    odd = StepModel(2.0, 0.1, -1e-5, 0.0)
    found = fit_steps([timed(prompt_work(tokens, cached), odd) for tokens, cached in ((200, 0), (900, 600), (1300, 0))])
    assert found.per_prefix_ms == found.per_context_ms == 0.0
    assert found.per_token_ms == pytest.approx(0.1, rel=0.1)


def alone(tokens: int, cached: int, beside_ms: float, slower: float) -> tuple[Spent, list[Sample]]:
    """Three prompts, while the machine is so much slower than usual."""
    steps = timed(prompt_work(tokens, cached))
    took = replace(steps, seconds=steps.seconds * slower)
    every = took.plus(took).plus(took)
    samples = [sample(tokens, took.seconds * 1e3 + beside_ms + late, cached) for late in (-0.5, 0.0, 70.0)]
    return Spent(9.0, 9.0, every, requests=3, tokens=3), samples


@pytest.mark.parametrize("move_ms", [0.0, 0.01])
def test_what_surrounds_a_request_and_a_hand_over_is_found_again(move_ms: float) -> None:
    around, hand_over = 5.0, 3.0
    warm = [alone(tokens, tokens - 5, around + 1.0, slower) for tokens, slower in ((101, 1.0), (401, 2.0), (1001, 1.3))]
    lost = alone(1400, 0, 900.0, 1.0)  # not found again
    assert fit_around([*warm, lost]) == pytest.approx(around)
    with pytest.raises(ValueError, match="not found in a cache"):
        fit_around([lost])
    cold = {
        tokens: alone(tokens, 0, around + 2.0 + hand_over + tokens * move_ms, slower)
        for tokens, slower in ((101, 1.5), (401, 1.0), (1001, 1.2))
    }
    fixed, rate = fit_hand_over(around, cold, kv_bytes=2048)
    assert fixed == pytest.approx(hand_over, abs=0.02)
    assert rate == pytest.approx(2048 / move_ms if move_ms else FAST_LINK, rel=0.01)


def test_what_lies_between_steps_is_in_the_pace_of_answers() -> None:
    step = MODEL.of(Counts(1, tokens=1, context=105))
    answers = [
        replace(sample(100, 9.0), chunks=[1.0, 1.0 + 9 * (step + 0.4) / 1e3], output_tokens=10) for _ in range(3)
    ]
    assert fit_pause(MODEL, answers) == pytest.approx(0.4)
    assert fit_pause(MODEL, [replace(each, chunks=[1.0, 1.001]) for each in answers]) == 0.0
    with pytest.raises(ValueError, match="in one chunk each"):
        fit_pause(MODEL, [replace(each, chunks=[1.0]) for each in answers])
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


def test_the_middle_is_of_what_is_neither_short_nor_long() -> None:
    assert middle([900.0, 4.0, 1.0, 6.0, 5.0, 5.0, 0.0, 7.0]) == 5.0
    assert middle([3.0]) == 3.0


def test_what_no_counter_shows_is_what_predicts_a_load() -> None:
    def predict(crowding: float) -> float:
        return 30.0 * (1 + crowding)

    assert fit_by_simulation(predict, 48.0) == pytest.approx(0.6, abs=0.02)
    assert fit_by_simulation(predict, 20.0) == 0.0
    with pytest.raises(ValueError, match="a coefficient of 2 predicts 90, but 900 was measured"):
        fit_by_simulation(predict, 900.0, most=2.0)
