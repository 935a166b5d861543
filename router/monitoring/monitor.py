"""All that a router's metrics pages show beside its own requests, put together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial

from prometheus_client import Gauge, ProcessCollector

from router.control import ControlPlane
from router.metrics import CONTENT_TYPE, Page, RouterMetrics
from router.monitoring.control import ControlMetrics
from router.monitoring.fleet import FleetMetrics
from router.monitoring.fleet_page import fleet_page
from router.monitoring.loop_lag import LoopLag
from router.monitoring.targets import JSON_TYPE, targets
from router.monitoring.vllm import VllmPage
from tandem import __version__, errors
from tandem.config import RouterConfig

OUTCOMES = ("ok", "refused", "failed", "cancelled", "slow_client")


def start_at_nought(metrics: RouterMetrics) -> None:
    """Makes every counter of ends exist before the first one: a rate sees the step from nought, and no step to it."""
    for endpoint in ("chat", "completion"):
        for outcome in OUTCOMES:
            metrics.requests.labels(endpoint, outcome)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TandemError)]
    for name in {"slow_client", *(kind.code or kind.type for kind in kinds)}:
        metrics.failures.labels(name)


@contextlib.asynccontextmanager
async def monitored(config: RouterConfig, control: ControlPlane, metrics: RouterMetrics) -> AsyncIterator[None]:
    """Fills the pages, and measures the event loop while it is open."""
    fleet, dispatcher, name = control.fleet, control.dispatcher, config.served_model_name
    ProcessCollector(registry=metrics.registry)
    about = Gauge("tandem_router_info", "This router", ["version", "policy"], registry=metrics.registry)
    about.labels(__version__, config.policy).set(1)
    start_at_nought(metrics)
    own = ControlMetrics(dispatcher.admission, control.index, dispatcher.pairs)
    for source in (FleetMetrics(fleet), own, dispatcher, control.ladder, control.quotas):
        metrics.add_collector(source.collect)
    metrics.pages["targets"] = Page(JSON_TYPE, partial(targets, fleet, name))
    metrics.pages["fleet"] = Page(JSON_TYPE, partial(fleet_page, config, fleet))
    if config.metrics_alias == "vllm":
        alias = VllmPage(metrics.registry, fleet, dispatcher.admission, name)
        metrics.pages["vllm"] = Page(CONTENT_TYPE, alias.page)
    task = asyncio.create_task(LoopLag(metrics.registry).run(), name="loop-lag")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
