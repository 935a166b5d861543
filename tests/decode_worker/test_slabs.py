"""A decode worker whose landing slabs are spent drains and ends; one that lacks them for a moment does not."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from decode_worker import services
from decode_worker.services import SLAB_CHECKS, DecodeServices


@pytest.mark.parametrize(("stuck_for", "drains"), [(SLAB_CHECKS, False), (SLAB_CHECKS + 1, True)])
async def test_only_what_lasts_drains_and_that_for_good(
    stuck_for: int, drains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "SLAB_CHECK_S", 0.0)
    reasons: list[str] = []
    worker = SimpleNamespace(draining=False, open_requests=1)
    budget = SimpleNamespace(stuck=True, quarantined_bytes=5)
    running: Any = SimpleNamespace(_budget=budget, worker=worker, _give_up=reasons.append)
    watch = asyncio.create_task(DecodeServices._watch_slabs(running))
    try:
        await asyncio.sleep(0)
        for _ in range(stuck_for):
            await asyncio.sleep(0)
        budget.stuck = False
        for _ in range(5):
            await asyncio.sleep(0)
        assert (worker.draining, reasons) == (drains, [])
        worker.open_requests = 0
        for _ in range(3):
            await asyncio.sleep(0)
        assert reasons == (["5 bytes of landing slabs are quarantined"] if drains else [])
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
