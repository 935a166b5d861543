"""A worker's page under vLLM's names: one engine, as vLLM shows one."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry

from tandem.cluster import WorkerInfo
from tandem.types import FinishReason
from tandem.vllm_metrics import Alias, Load, gauges, renamed, text_page

FINISHED = {
    FinishReason.STOP.value: "stop",
    FinishReason.LENGTH.value: "length",
    FinishReason.CANCELLED.value: "abort",
    FinishReason.ERROR.value: "error",
}
ALIASES = (
    Alias("prompt_tokens", "tandem_worker_prompt_tokens"),
    Alias("prefix_cache_queries", "tandem_worker_prompt_tokens"),
    Alias("prefix_cache_hits", "tandem_worker_prefix_hit_tokens"),
    Alias("num_preemptions", "tandem_worker_retractions"),
    Alias("time_to_first_token_seconds", "tandem_worker_time_to_first_token_seconds"),
    Alias("inter_token_latency_seconds", "tandem_worker_inter_token_seconds"),
    Alias("e2e_request_latency_seconds", "tandem_worker_request_seconds"),
    Alias("request_success", "tandem_worker_requests", ("outcome", FINISHED, "finished_reason")),
    Alias("spec_decode_num_drafts", "tandem_spec_steps"),
    Alias("spec_decode_num_draft_tokens", "tandem_spec_draft_tokens"),
    Alias("spec_decode_num_accepted_tokens", "tandem_spec_accepted_tokens"),
)


def vllm_page(registry: CollectorRegistry, info: WorkerInfo, prefix_cache: bool) -> Callable[[], bytes]:
    """What makes the page, anew at each scrape. registry: the worker's own."""
    labels = {"model_name": info.model.name, "engine": "0"}

    def value(name: str, **of: str) -> int:
        return int(registry.get_sample_value(name, of) or 0)

    def page() -> bytes:
        load = Load(
            running=value("tandem_worker_running"),
            waiting=value("tandem_worker_waiting"),
            used_pages=value("tandem_worker_pages", state="used"),
            pages=info.total_pages,
            page_size=info.page_size,
            kv_dtype=info.kv_dtype,
            prefix_cache=prefix_cache,
        )
        return text_page([*gauges(load, labels), *renamed(registry.collect(), ALIASES, labels)])

    return page
