"""The decode pool."""

from __future__ import annotations

from deploy.grafana.boards.engine import hits, load, memory, processes, steps
from deploy.grafana.panels import DECODE, Board, Panel, Query, Row, quantiles, rate, ratio

BOARD = Board(
    uid="tandem-decode",
    title="Tandem: decode pool",
    description="Workers that own requests: latencies as they see them, load, pages, drafts.",
    components="decode",
    rows=(
        load(DECODE),
        Row(
            "Requests",
            (
                Panel(
                    "Admission to first token",
                    "At the worker: fetching or computing the prompt's KV, waiting for pages, one step.",
                    "s",
                    quantiles("tandem_worker_time_to_first_token_seconds", DECODE),
                ),
                Panel(
                    "Between tokens",
                    "At the worker. What the router's figure has on top is the way.",
                    "s",
                    quantiles("tandem_worker_inter_token_seconds", DECODE),
                ),
                Panel(
                    "Requests ended",
                    "By outcome: stop, length, cancelled, error.",
                    "reqps",
                    (Query(rate("tandem_worker_requests_total", DECODE, "outcome"), "{{outcome}}"),),
                ),
                hits(DECODE, "decode", "Share of prompt tokens that the decode worker had itself."),
                hits(
                    DECODE,
                    "prefill",
                    "Share of prompt tokens beyond those that the prefill worker asked had cached.",
                    "Prompt tokens cached at prefill workers",
                ),
                Panel(
                    "Forced tokens",
                    "Output tokens a second that a grammar left no choice for: they cost no sampling.",
                    "short",
                    (Query(rate("tandem_worker_forced_tokens_total", DECODE, "instance"), "{{instance}}"),),
                ),
            ),
        ),
        Row(
            "Drafts (speculative decoding)",
            (
                Panel(
                    "Draft tokens accepted",
                    "Share of verified draft tokens that were right. Empty without a drafter.",
                    "percentunit",
                    (
                        Query(
                            ratio(
                                rate("tandem_spec_accepted_tokens_total", DECODE, "drafter"),
                                rate("tandem_spec_draft_tokens_total", DECODE, "drafter"),
                            ),
                            "{{drafter}}",
                        ),
                    ),
                    top=1,
                ),
                Panel(
                    "Tokens per verified draft",
                    "Mean tokens that a sequence got in a step with a draft, the one of its own included.",
                    "short",
                    (
                        Query(
                            ratio(
                                rate("tandem_spec_accepted_length_sum", DECODE, "drafter"),
                                rate("tandem_spec_accepted_length_count", DECODE, "drafter"),
                            ),
                            "{{drafter}}",
                        ),
                    ),
                ),
                Panel(
                    "Drafts a second",
                    "Drafts verified. Adaptive drafting stops where they do not pay.",
                    "short",
                    (Query(rate("tandem_spec_steps_total", DECODE, "instance"), "{{instance}}"),),
                ),
            ),
        ),
        steps(DECODE),
        memory(DECODE),
        processes(DECODE),
    ),
)
