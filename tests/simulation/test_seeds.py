"""Seeds of the simulation: a clock bounds how many, so that a slow machine runs fewer and no longer.

`python -m tests.simulation.run FIRST LAST` runs others, and with one number shows that seed's trace.
"""

from __future__ import annotations

import time

import pytest

from tests.simulation.run import run

SECONDS = 120.0
LEAST = 40
MOST = 5000


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_seeds() -> None:
    """At least `LEAST`, then as many as fit."""
    begun = time.monotonic()
    for seed in range(MOST):
        result = run(seed)
        assert not result.wrong, result
        if seed >= LEAST and time.monotonic() - begun > SECONDS:
            break


@pytest.mark.parametrize("seed", range(6))
def test_a_seed_replays_exactly(seed: int) -> None:
    assert run(seed) == run(seed)


@pytest.mark.parametrize(
    "seed",
    [
        9914,  # a cancellation whose caller left half-way cancelled the preparation, and never ended the request
        16318,  # an older request that came back for pages waited behind a younger one that waited for it
    ],
)
def test_a_seed_that_found_something(seed: int) -> None:
    result = run(seed)
    assert not result.wrong, result
