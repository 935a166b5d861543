"""Whether this router traces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.config import RouterConfig
from tandem.obs import tracer_of

if TYPE_CHECKING:
    from router.tracing.requests import RequestTraces


def traces_of(config: RouterConfig, router_id: str) -> RequestTraces | None:
    """What traces this router's requests; None, and nothing is imported, where the settings name no collector."""
    tracer = tracer_of(config, "tandem-router", router_id)
    if tracer is None:
        return None
    from router.tracing.requests import RequestTraces

    return RequestTraces(tracer)
