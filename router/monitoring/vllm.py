"""The router's page under vLLM's names: the whole cluster as one engine."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from router.admission.gate import Admission
from router.workers.fleet import Fleet
from tandem.vllm_metrics import Alias, Load, gauges, renamed, text_page

ALIASES = (
    Alias("prompt_tokens", "tandem_prompt_tokens"),
    Alias("generation_tokens", "tandem_completion_tokens"),
    Alias("prefix_cache_queries", "tandem_prompt_tokens"),
    Alias("prefix_cache_hits", "tandem_cached_prompt_tokens"),
    Alias("time_to_first_token_seconds", "tandem_time_to_first_token_seconds"),
    Alias("inter_token_latency_seconds", "tandem_inter_token_latency_seconds"),
    Alias("e2e_request_latency_seconds", "tandem_request_duration_seconds"),
    Alias("request_queue_time_seconds", "tandem_request_queue_seconds"),
)


class VllmPage:
    """Made anew at each scrape. Running and waiting are those of decode workers: they own requests."""

    def __init__(self, registry: CollectorRegistry, fleet: Fleet, gate: Admission, model_name: str | None) -> None:
        """model_name: the one clients use; None is the workers'."""
        self._registry = registry
        self._fleet = fleet
        self._gate = gate
        self._model_name = model_name

    def page(self) -> bytes:
        """Prometheus' text format; without gauges until a decode worker is known."""
        views = self._fleet.snapshot().decode
        name = self._model_name or (views[0].info.model.name if views else "")
        labels = {"model_name": name, "engine": "0"}
        made = renamed(self._registry.collect(), ALIASES, labels)
        if views:
            pages = sum(view.status.total_pages for view in views)
            load = Load(
                running=sum(view.status.running for view in views),
                waiting=sum(view.status.waiting for view in views) + self._gate.queued,
                used_pages=pages - sum(view.status.free_pages for view in views),
                pages=pages,
                page_size=views[0].info.page_size,
                kv_dtype=views[0].info.kv_dtype,
                prefix_cache=True,
            )
            made = [*gauges(load, labels), *made]
        return text_page(made)
