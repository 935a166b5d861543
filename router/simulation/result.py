"""A run in numbers, of the requests that are reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router.simulation.replay import Replay
from router.simulation.setting import Objective


@dataclass(frozen=True, slots=True)
class Result:
    """One policy's run. Times are milliseconds; of requests that were not rejected."""

    policy: str
    requests: int
    rejected_share: float
    hit_share: float
    """Prompt tokens that nobody had to compute for a request."""
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    goodput_share: float
    """Requests that kept the service level, of all."""
    goodput_per_s: float
    busiest: float
    """Busy time of the busiest prefill worker over the mean, while reported requests arrived; 0 without any."""
    busiest_share: float
    """Of that time, how long the busiest prefill worker computed."""
    local_share: float
    """Requests whose prompt the decode worker computed."""
    plan_ms_p50: float
    """Real time; differs from run to run."""
    plan_ms_p99: float
    cached_share: float = 0.0
    """Prompt tokens that clients are told were cached; see `Flight.cached_tokens`."""
    tpot_p50: float = 0.0
    """Of answers of several tokens: by request, as clients measure it."""
    step_s: float = 0.0
    """What all steps of all workers took together, from the first request to the last."""


def summarize(replay: Replay, policy: str, objective: Objective) -> Result:
    """Raises ValueError when every request was rejected."""
    asked = [flight for flight in replay.flights if flight.arrival.reported]
    served = [flight for flight in asked if not flight.rejected]
    if not served:
        raise ValueError(f"{policy}: none of {len(asked)} requests was admitted")
    ttft = np.array([flight.ttft_s for flight in served]) * 1e3
    kept = sum(
        flight.ttft_s * 1e3 <= objective.ttft_ms and flight.tpot_s * 1e3 <= objective.tpot_ms for flight in served
    )
    start, end = replay.window
    busiest, mean = _busy(replay)
    itl_p50, itl_p99 = _between_tokens(replay.steps, start, (0.5, 0.99))
    ttft_p50, ttft_p90, ttft_p99 = (float(np.quantile(ttft, share)) for share in (0.5, 0.9, 0.99))
    plan_p50, plan_p99 = (float(np.quantile(replay.plan_s, share)) * 1e3 for share in (0.5, 0.99))
    return Result(
        policy=policy,
        requests=len(asked),
        rejected_share=1 - len(served) / len(asked),
        hit_share=1 - sum(f.computed for f in served) / sum(f.prompt_tokens for f in served),
        ttft_p50=ttft_p50,
        ttft_p90=ttft_p90,
        ttft_p99=ttft_p99,
        itl_p50=itl_p50,
        itl_p99=itl_p99,
        goodput_share=kept / len(asked),
        goodput_per_s=kept / max(end - start, 1e-9),
        busiest=busiest / mean if mean else 0.0,
        busiest_share=busiest / max(end - start, 1e-9),
        local_share=sum(flight.local for flight in served) / len(served),
        plan_ms_p50=plan_p50,
        plan_ms_p99=plan_p99,
        cached_share=sum(f.cached_tokens for f in served) / sum(f.prompt_tokens for f in served),
        tpot_p50=float(np.median([f.tpot_s * 1e3 for f in served if f.output_tokens > 1] or [0.0])),
        step_s=sum(worker.engine.busy_s for worker in (*replay.prefill, *replay.decode)),
    )


def _between_tokens(
    steps: Sequence[tuple[float, float, int]], start: float, shares: tuple[float, float]
) -> tuple[float, float]:
    """Quantiles of the time between tokens: a step's time, as often as it gave a sequence a token."""
    table = np.array([step for step in steps if step[0] >= start and step[2] > 0])
    if not len(table):
        return 0.0, 0.0
    table = table[np.argsort(table[:, 1])]
    places = np.cumsum(table[:, 2])
    low, high = (float(table[np.searchsorted(places, share * places[-1]), 1]) for share in shares)
    return low, high


def _busy(replay: Replay) -> tuple[float, float]:
    """Seconds that the busiest prefill worker computed while reported requests arrived, and the mean of all."""
    if not replay.busy or not replay.prefill:
        return 0.0, 0.0
    first, last = replay.busy[0], replay.busy[-1]
    spent = [last[name] - first[name] for name in last]
    return max(spent), sum(spent) / len(spent)
