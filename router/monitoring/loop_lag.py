"""How late the event loop runs what is due: everything a router does waits for it."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Histogram

EVERY_S = 0.25
LAGS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class LoopLag:
    """Sleeps, and notes how much longer it slept than it wanted to."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "tandem_event_loop_lag_seconds", "How late a timer of the event loop was", registry=registry, buckets=LAGS
        )

    async def run(self) -> None:
        """Measures until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + EVERY_S
            await asyncio.sleep(EVERY_S)
            self._seconds.observe(max(loop.time() - due, 0.0))
