"""What is read off a cluster, and random prompts as the simulator gets them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.fit_machine import MIXED, Random, counts, workers
from benchmarks.fits import Counts
from router.simulation.setting import Machine


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


def test_random_prompts_are_simulated_as_they_are_asked_and_fitted_to_what_came_of_it() -> None:
    load = Random("tandem-4p2d", slots=2, seed=3, prompts=40)
    machine = Machine(1.0, 0.08, 1e-4, 512, 64, kv_tokens=4096, overhead_ms=9.0, request_cpu_ms=12.0, token_cpu_ms=0.3)
    steps_s, ttft_ms = load.predict(machine)
    assert steps_s * 1e3 > 0.9 * 40 * machine.per_token_ms * (MIXED.output_tokens + MIXED.input_tokens)
    assert ttft_ms > machine.overhead_ms + machine.per_token_ms * MIXED.input_tokens / 2
    slow = replace(machine, crowding=0.4, contention=1.2)
    found = load.fit(machine, *load.predict(slow))
    assert (found.crowding, found.contention) == pytest.approx((0.4, 1.2), rel=0.2)
    with pytest.raises(ValueError, match="a cluster of Tandem's is needed"):
        Random("vllm", slots=2, seed=3)
