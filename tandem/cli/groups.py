"""Under which heading `--help` shows a setting."""

from __future__ import annotations

from fnmatch import fnmatch

GROUPS: dict[str, tuple[str, ...]] = {
    "Model": (
        "model", "served_model_name", "max_context", "chat_template", "generation_config", "tool_parser",
        "reasoning_parser",
    ),
    "Network": (
        "host", "port", "metrics_port", "control_host", "control_port", "cors_*", "max_connections", "max_body_*",
    ),
    "Cluster": (
        "prefill", "decode", "router", "worker", "workers", "workers_file", "processes", "cluster_key", "lease_s",
        "drain_s", "on", "kubernetes*", "k8s*", "ray*",
    ),
    "Trust": ("api_keys", "token", "metrics_token", "tls_*"),
    "Routing": ("policy", "replicas*", "index_*", "turn_cache_mib", "retries", "local_prefill_tokens"),
    "Queues": (
        "max_inflight", "max_queued", "queue_s", "worker_backlog", "max_waiting", "ageing_s", "stream_queue",
    ),
    "KV memory": ("kv_mib", "pages", "page_size", "prefix_cache", "tenant_cache_share", "verify_kv"),
    "KV hand-over": (
        "transport", "slab_mib", "slabs_max_mib", "staging_mib", "span_tokens", "*_deadline_s", "quiesce_s", "probe_s",
    ),
    "Engine": (
        "max_batch_tokens", "max_running", "inter_token_ms", "overlap", "device", "dtype", "threads", "kernels",
        "cuda_graphs", "compute_slots",
    ),
    "Drafts": ("speculative", "draft_*"),
    "Grammars": ("grammar_*", "json_any_whitespace"),
    "Observing": ("config", "log_*", "explain_*", "ladder_*", "otlp*", "otel*", "trac*", "metrics_*"),
    "Training": ("prompts", "out", "steps", "unroll", "batch_tokens", "learning_rate", "intermediate", "max_tokens",
                 "temperature", "seed"),
}  # fmt: skip
"""Heading -> settings, by name or pattern; the first that fits counts."""
OTHER = "Settings"


def group_of(setting: str) -> str:
    """The heading of a setting."""
    return next((name for name, patterns in GROUPS.items() if any(fnmatch(setting, each) for each in patterns)), OTHER)


def rank(setting: str) -> int:
    """Where its heading stands among the headings."""
    return [*GROUPS, OTHER].index(group_of(setting))
