"""Rows that both kinds of worker have."""

from __future__ import annotations

from deploy.grafana.panels import Panel, Query, Row, mean, of, rate


def load(selector: str) -> Row:
    """What waits, what runs and what it holds."""
    return Row(
        "Load",
        (
            Panel(
                "Sequences",
                "In the batch, and waiting: for KV, for pages, or for their turn.",
                "short",
                (
                    Query(f"sum by (instance) (tandem_worker_running{selector})", "{{instance}} running"),
                    Query(f"sum by (instance) (tandem_worker_waiting{selector})", "{{instance}} waiting"),
                ),
            ),
            Panel(
                "Prompt tokens to compute",
                "Queued at each worker.",
                "short",
                (Query(f"sum by (instance) (tandem_worker_queued_tokens{selector})", "{{instance}}"),),
            ),
            Panel(
                "Age of the oldest waiting",
                "How long the sequence that has waited longest has.",
                "s",
                (Query(f"max by (instance) (tandem_worker_oldest_waiting_seconds{selector})", "{{instance}}"),),
            ),
        ),
    )


def steps(selector: str) -> Row:
    """What the engine does with its time."""
    return Row(
        "Engine",
        (
            Panel(
                "Tokens computed a second",
                "Prompt and output tokens together, by worker.",
                "short",
                (Query(rate("tandem_worker_step_tokens_total", selector, "instance"), "{{instance}}"),),
            ),
            Panel(
                "Step time",
                "Mean time of an engine step. Prompt chunks make it long; --inter-token-ms bounds it.",
                "s",
                (Query(mean("tandem_worker_step_seconds", selector, "instance"), "{{instance}}"),),
            ),
            Panel(
                "Busy",
                "Share of the time in which the engine computes.",
                "percentunit",
                (Query(rate("tandem_worker_step_seconds_sum", selector, "instance"), "{{instance}}"),),
            ),
        ),
    )


def memory(selector: str) -> Row:
    """Pages."""
    return Row(
        "KV pages",
        (
            Panel(
                "Pages by state",
                "used: held by sequences. available: free, or cached and reclaimable. cached: in the prefix cache.",
                "short",
                (Query(f"sum by (instance, state) (tandem_worker_pages{selector})", "{{instance}} {{state}}"),),
            ),
            Panel(
                "Pages in use",
                "Share that sequences hold. Above 95 % nothing is left for the prefix cache.",
                "percentunit",
                (Query(f"max by (instance) (tandem:worker_pages_used:ratio{selector})", "{{instance}}"),),
                top=1,
            ),
            Panel(
                "Sequences put back",
                "Retractions a second: a sequence gave its pages to an older one, and will be computed again.",
                "short",
                (Query(rate("tandem_worker_retractions_total", selector, "instance"), "{{instance}}"),),
            ),
        ),
    )


def processes(selector: str) -> Row:
    """The processes themselves."""
    return Row(
        "Processes",
        (
            Panel(
                "Ready",
                "1 while the worker takes requests: it is not draining, and its self-probe arrives.",
                "short",
                (Query(f"min by (instance) (tandem_worker_ready{selector})", "{{instance}}"),),
                width=6,
            ),
            Panel(
                "Starts",
                "Times that the process was started anew in an hour.",
                "short",
                (Query(f"sum by (instance) (changes(process_start_time_seconds{selector}[1h]))", "{{instance}}"),),
                width=6,
            ),
            Panel(
                "CPU",
                "Cores in use.",
                "short",
                (Query(rate("process_cpu_seconds_total", selector, "instance"), "{{instance}}"),),
                width=6,
            ),
            Panel(
                "Memory",
                "Resident memory.",
                "bytes",
                (Query(f"sum by (instance) (process_resident_memory_bytes{selector})", "{{instance}}"),),
                width=6,
            ),
        ),
    )


def hits(selector: str, place: str, text: str, title: str = "Prompt tokens found cached") -> Panel:
    """Share of prompt tokens found cached. place: where."""
    found = of(selector, f'place="{place}"')
    whole = rate("tandem_worker_prompt_tokens_total", selector, "instance")
    share = f"{rate('tandem_worker_prefix_hit_tokens_total', found, 'instance')} / {whole}"
    return Panel(title, text, "percentunit", (Query(share, "{{instance}}"),), top=1)
