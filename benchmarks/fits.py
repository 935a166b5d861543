"""What measurements say of a machine: the fits behind `benchmarks.fit_machine`, which makes them.

All are least squares or medians of what a cluster did while requests came one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean, median
from typing import NamedTuple

import numpy as np

from benchmarks.client import Sample
from benchmarks.report import tpots, ttft

MESSAGE_MS = 1.0
"""What the simulator takes for one message between processes."""
BATCH_TOKENS = 512
"""The workers' default, with which they are started."""
FAST_LINK = 25e6
"""Bytes a millisecond where moving takes no time that could be measured."""
HALVINGS = 10


@dataclass(frozen=True, slots=True)
class Counts:
    """What steps did in some time, of one worker or of all."""

    steps: float = 0.0
    seconds: float = 0.0
    """That they took, without waiting for a core."""
    tokens: float = 0.0
    prefix: float = 0.0
    """For each token of a prompt, those that had KV before its step; as `Machine.per_prefix_ms` counts."""
    context: float = 0.0
    """Tokens that decoding sequences looked back on."""

    def since(self, other: Counts) -> Counts:
        """What was added."""
        return Counts(*(getattr(self, each.name) - getattr(other, each.name) for each in fields(self)))

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        return Counts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


class StepModel(NamedTuple):
    """Milliseconds, as in `router.simulation.setting.Machine`."""

    base_ms: float
    per_token_ms: float
    per_prefix_ms: float = 0.0
    per_context_ms: float = 0.0

    def of(self, counts: Counts) -> float:
        """What such steps take."""
        per = (counts.steps, counts.tokens, counts.prefix, counts.context)
        return sum(coefficient * count for coefficient, count in zip(self, per, strict=True))


def prompt_work(tokens: int, cached: int) -> Counts:
    """Steps, tokens and prefix of a prompt that comes alone, with its last token; how long they take is not told."""
    known, steps, prefix = cached, 0, 0
    while known < tokens:
        count = min(tokens - known, BATCH_TOKENS)
        steps, prefix, known = steps + 1, prefix + count * known, known + count
    return Counts(steps, tokens=tokens - cached, prefix=prefix)


def looked_back(sample: Sample) -> Counts:
    """What of an answer's work no worker counts: prefix and context."""
    later = max(sample.output_tokens - 1, 0)
    prefix = prompt_work(sample.prompt_tokens, sample.cached_tokens).prefix
    return Counts(prefix=prefix, context=later * (sample.prompt_tokens + (later + 1) / 2))


def fit_steps(loads: Iterable[Counts]) -> StepModel:
    """By least squares over loads, none of the coefficients below 0. Raises ValueError."""
    rows = [each for each in loads if each.steps]
    if len({each.tokens / each.steps for each in rows}) < 2:
        raise ValueError("workers ran too few steps of different sizes to fit what a step takes")
    # Each weighs as much as it has time in it.
    weights = np.array([each.seconds**-0.5 for each in rows])
    known = np.array([[each.steps, each.tokens, each.prefix, each.context] for each in rows]) * weights[:, None]
    took = np.array([each.seconds for each in rows]) * 1e3 * weights
    used = [column for column in range(known.shape[1]) if known[:, column].any()]
    while True:
        # Lengths differ by thousands: columns of one size keep the rank that they have.
        size = np.linalg.norm(known[:, used], axis=0)
        found = np.linalg.lstsq(known[:, used] / size, took, rcond=None)[0] / size
        if (found >= 0).all():
            break
        del used[int(np.argmin(found * size))]
    values = dict(zip(used, found.tolist(), strict=True))
    return StepModel(*(values.get(column, 0.0) for column in range(known.shape[1])))


def fit_pause(model: StepModel, answers: Sequence[Sample]) -> float:
    """Milliseconds between two steps, from answers that came alone: a worker takes them beside what its steps count.

    Raises ValueError when each answer came in one chunk.
    """
    paces = [
        pace * 1e3 - model.of(Counts(1, tokens=1, context=each.prompt_tokens + each.output_tokens / 2))
        for each in answers
        for pace in tpots([each])
    ]
    if not paces:
        raise ValueError("answers came in one chunk each, which says nothing of what lies between steps")
    return max(0.0, median(paces))


@dataclass(frozen=True, slots=True)
class Spent:
    """What one load took of the machine."""

    seconds: float
    cpu_s: float
    """Of all processes of the cluster and of the client."""
    steps: Counts
    """Of all workers."""
    requests: int = 0
    tokens: int = 0
    """Of answers."""

    def with_pauses(self, pause_ms: float) -> Spent:
        """As if what a worker does between steps were a part of them."""
        return replace(self, steps=replace(self.steps, seconds=self.steps.seconds + self.steps.steps * pause_ms / 1e3))


def beside_steps(load: Spent, samples: Sequence[Sample]) -> float:
    """Milliseconds of a TTFT that no step took, where prompts came alone and answers had one token.

    By what the steps took then, not by what they should: a machine is not as fast in every minute.
    """
    return median(ttft(each) for each in samples) * 1e3 - load.steps.seconds * 1e3 / load.requests


def fit_around(warm: Sequence[tuple[Spent, Sequence[Sample]]]) -> float:
    """Milliseconds around a request, from prompts whose prefix is where they are decoded: one step, and one message.

    Raises ValueError when there are none.
    """
    found = [beside_steps(*load) for load in warm if load[0].steps.steps == load[0].requests]
    if not found:
        raise ValueError("prompts were not found in a cache when they were asked again")
    return max(0.0, median(found) - MESSAGE_MS)


def fit_hand_over(
    around: float, cold: Mapping[int, tuple[Spent, Sequence[Sample]]], kv_bytes: float
) -> tuple[float, float]:
    """Milliseconds of a hand-over, and the bytes it moves in one, from prompts that were all handed over.

    cold: by length. kv_bytes: of a token.
    """
    left = {length: beside_steps(*load) - around - 2 * MESSAGE_MS for length, load in cold.items()}
    slope, fixed = np.polyfit(list(left), list(left.values()), 1) if len(left) > 1 else (0.0, 0.0)
    if slope <= 0 or fixed <= 0:
        return max(0.0, median(left.values())), FAST_LINK
    return float(fixed), min(kv_bytes / float(slope), FAST_LINK)


def fit_host(idle: Spent, loads: Sequence[Spent]) -> tuple[float, float, float]:
    """Cores busy without any request; milliseconds of CPU beside steps on a request, and on each token of its answer.

    loads: at least two, with answers of different lengths, one request at a time: a step's time is its CPU then, unless
    other programs keep the cores busy, which is seen when nothing is left for requests. Raises ValueError.
    """
    background = idle.cpu_s / idle.seconds
    known = np.array([[each.requests, each.tokens] for each in loads], dtype=float)
    beside = np.array([each.cpu_s - each.steps.seconds - background * each.seconds for each in loads]) * 1e3
    (request, token), *_ = np.linalg.lstsq(known, beside, rcond=None)
    if request <= 0:
        raise ValueError(
            "steps took longer than the CPU time spent: other programs use the cores; fit when they do not"
        )
    return background, float(request), max(float(token), 0.0)


def middle(values: Sequence[float]) -> float:
    """The mean of what lies between the quartiles."""
    ordered, quarter = sorted(values), len(values) // 4
    return fmean(ordered[quarter : len(ordered) - quarter])


def fit_by_simulation(predict: Callable[[float], float], measured: float, most: float = 16.0) -> float:
    """The coefficient, between 0 and `most`, with which a load's figure is predicted as it was measured.

    For what no counter shows by itself: how threads of a core, caches and the scheduler's choices make processes slower
    that are busy at once. predict: the figure as the simulator has it with such a coefficient; it grows. Raises
    ValueError when the largest explains too little.
    """
    if predict(0.0) >= measured:
        return 0.0
    if (largest := predict(most)) < measured:
        raise ValueError(f"a coefficient of {most:g} predicts {largest:.4g}, but {measured:.4g} was measured")
    low, high = 0.0, most
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if predict(middle) < measured else (low, middle)
    return (low + high) / 2
