"""What users get: requests, latencies, objectives, errors, and whether there is room."""

from __future__ import annotations

from deploy.grafana.panels import ROUTER, Board, Panel, Query, Row, of, quantiles, rate, ratio

READY = of(ROUTER, 'state="ready"')
ANSWERED = of(ROUTER, 'outcome!="cancelled"')
OURS = of(ROUTER, 'kind=~"fenced|internal_error|overloaded|unavailable|worker_lost"')


def burn(title: str, record: str, budget: str, description: str) -> Panel:
    """How fast a budget of errors is used up, over four windows; 1 would use it up in the month it is for."""
    queries = tuple(
        Query(f'tandem:{record}:ratio_rate{window}{{model=~"$model"}} / {budget}', f"{{{{model}}}} {window}")
        for window in ("5m", "30m", "1h", "6h")
    )
    return Panel(title, description, "short", queries)


BOARD = Board(
    uid="tandem-overview",
    title="Tandem: overview and SLO",
    description="What users get. Start here; the other dashboards say why.",
    components="router",
    rows=(
        Row(
            "Now",
            (
                Panel(
                    "Requests a second",
                    "Requests that ended, whatever their outcome.",
                    "reqps",
                    (Query(rate("tandem_requests_total", ROUTER), "requests"),),
                    width=4,
                    single=True,
                ),
                Panel(
                    "Output tokens a second",
                    "Tokens that routers received from decode workers.",
                    "short",
                    (Query(rate("tandem_completion_tokens_total", ROUTER), "tokens"),),
                    width=4,
                    single=True,
                ),
                Panel(
                    "First token, p99",
                    "From a request's receipt at the router to its first token.",
                    "s",
                    quantiles("tandem_time_to_first_token_seconds", ROUTER, (0.99,)),
                    width=4,
                    single=True,
                ),
                Panel(
                    "Between tokens, p99",
                    "Time between two tokens of an answer. What came at once shares the time before it.",
                    "s",
                    quantiles("tandem_inter_token_latency_seconds", ROUTER, (0.99,)),
                    width=4,
                    single=True,
                ),
                Panel(
                    "Errors",
                    "Share of requests that failed through no fault of the client; refusals of a full queue count.",
                    "percentunit",
                    (
                        Query(
                            ratio(rate("tandem_request_failures_total", OURS), rate("tandem_requests_total", ANSWERED)),
                            "errors",
                        ),
                    ),
                    width=4,
                    single=True,
                ),
                Panel(
                    "Ready workers",
                    "Workers that take requests, as the router with the fewest sees them.",
                    "short",
                    (Query(f"min by (role) (tandem_fleet_workers{READY})", "{{role}}"),),
                    width=4,
                    single=True,
                ),
            ),
        ),
        Row(
            "Requests",
            (
                Panel(
                    "Requests by outcome",
                    "ok, refused (wrong, over a limit, or the queue was full), failed, cancelled by the client, or cut "
                    "because the client read too slowly.",
                    "reqps",
                    (Query(rate("tandem_requests_total", ROUTER, "outcome"), "{{outcome}}"),),
                ),
                Panel(
                    "Refusals and failures by kind",
                    "Kinds are the `code` or `type` of the error that the client got.",
                    "reqps",
                    (Query(rate("tandem_request_failures_total", ROUTER, "kind"), "{{kind}}"),),
                ),
                Panel(
                    "At work and waiting",
                    "At work: taken by a worker. Waiting: received, and not yet taken by one.",
                    "short",
                    (
                        Query(f"sum(tandem_requests_running{ROUTER})", "at work"),
                        Query(f"sum(tandem_requests_queued{ROUTER})", "waiting"),
                    ),
                ),
            ),
        ),
        Row(
            "Latency",
            (
                Panel(
                    "Time to first token",
                    "From receipt at the router to the first token. Its parts: the queue beside, prefill and hand-over "
                    "on the other dashboards.",
                    "s",
                    quantiles("tandem_time_to_first_token_seconds", ROUTER),
                ),
                Panel(
                    "Time between tokens",
                    "Between two tokens of an answer, at the router.",
                    "s",
                    quantiles("tandem_inter_token_latency_seconds", ROUTER),
                ),
                Panel(
                    "Until a worker takes the request",
                    "Receipt to acceptance: reading, tokenising, waiting at the router, planning, submitting.",
                    "s",
                    quantiles("tandem_request_queue_seconds", ROUTER),
                ),
                Panel(
                    "Whole requests",
                    "Receipt to end. Grows with the length of answers; not an objective.",
                    "s",
                    quantiles("tandem_request_duration_seconds", ROUTER),
                ),
                Panel(
                    "Tokens",
                    "Prompt tokens of finished requests, those of them that were cached, and output tokens.",
                    "short",
                    (
                        Query(rate("tandem_prompt_tokens_total", ROUTER), "prompt"),
                        Query(rate("tandem_cached_prompt_tokens_total", ROUTER), "prompt, cached"),
                        Query(rate("tandem_completion_tokens_total", ROUTER), "output"),
                    ),
                ),
                Panel(
                    "Requests that went on elsewhere",
                    "Their decode worker was lost, or drained. Clients see a pause, and no error.",
                    "reqps",
                    (Query(rate("tandem_requests_moved_total", ROUTER), "moved"),),
                ),
            ),
        ),
        Row(
            "Objectives: how fast the budget of a month is used up",
            (
                burn(
                    "First tokens: burn rate",
                    "ttft_slow",
                    "0.01",
                    "99 % within 2.5 s. Alerts: above 14.4 over 1 h and 5 m, or above 6 over 6 h and 30 m.",
                ),
                burn(
                    "Between tokens: burn rate",
                    "itl_slow",
                    "0.01",
                    "99 % within 100 ms. Alerts: above 14.4 over 1 h and 5 m, or above 6 over 6 h and 30 m.",
                ),
                burn(
                    "Errors: burn rate",
                    "errors",
                    "0.001",
                    "99.9 % answered. Alerts: above 14.4 over 1 h and 5 m, or above 6 over 6 h and 30 m.",
                ),
            ),
        ),
        Row(
            "Routers",
            (
                Panel(
                    "Event loop lag, p99",
                    "How late a timer of the router's event loop is: every token waits for it.",
                    "s",
                    (
                        Query(
                            "histogram_quantile(0.99, "
                            + rate("tandem_event_loop_lag_seconds_bucket", ROUTER, "instance, le")
                            + ")",
                            "{{instance}}",
                        ),
                    ),
                ),
                Panel(
                    "CPU",
                    "Cores that routers use; one process cannot use more than about one.",
                    "short",
                    (Query(rate("process_cpu_seconds_total", ROUTER, "instance"), "{{instance}}"),),
                ),
                Panel(
                    "Memory",
                    "Resident memory of routers.",
                    "bytes",
                    (Query(f"sum by (instance) (process_resident_memory_bytes{ROUTER})", "{{instance}}"),),
                ),
            ),
        ),
    ),
)
