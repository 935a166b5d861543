"""Where requests go and what they find there: the router's queue, load by worker, cache hits, the index, copies."""

from __future__ import annotations

from deploy.grafana.panels import ROUTER, Board, Panel, Query, Row, of, rate, ratio

PROMPT = of(ROUTER, 'rung="prompt"')


def by_worker(metric: str) -> tuple[Query, ...]:
    """Of the fleet's gauges: every router sees the same, the latest counts."""
    return (Query(f"max by (role, worker) ({metric}{ROUTER})", "{{role}} {{worker}}"),)


BOARD = Board(
    uid="tandem-routing",
    title="Tandem: routing and cache",
    description="Where requests go, how evenly, and how much of their prompts is found cached.",
    components="router",
    rows=(
        Row(
            "The queue at the router",
            (
                Panel(
                    "Inside and waiting",
                    "Requests let in, and those that wait to be, beside their limits (--max-inflight, --max-queued).",
                    "short",
                    (
                        Query(f"sum(tandem_admission_running{ROUTER})", "inside"),
                        Query(f"sum(tandem_admission_running_limit{ROUTER})", "inside, limit"),
                        Query(f"sum(tandem_admission_queued{ROUTER})", "waiting"),
                        Query(f"sum(tandem_admission_queued_limit{ROUTER})", "waiting, limit"),
                    ),
                ),
                Panel(
                    "Age of the oldest",
                    "How long the request that has waited longest has. At --queue-s it is refused.",
                    "s",
                    (Query(f"max by (instance) (tandem_admission_oldest_seconds{ROUTER})", "{{instance}}"),),
                ),
                Panel(
                    "Refused",
                    "full: the queue had no place (429). late: the deadline passed (503).",
                    "reqps",
                    (Query(rate("tandem_admission_refused_total", ROUTER, "cause"), "{{cause}}"),),
                ),
            ),
        ),
        Row(
            "Load",
            (
                Panel("Running", "Sequences in each worker's batch.", "short", by_worker("tandem_fleet_running")),
                Panel(
                    "Waiting",
                    "Sequences at each worker that are not in the batch: they wait for KV, pages or their turn.",
                    "short",
                    by_worker("tandem_fleet_waiting"),
                ),
                Panel(
                    "Prompt tokens to compute",
                    "Queued at each worker. The best measure of how busy prefill is; autoscale on it.",
                    "short",
                    by_worker("tandem_fleet_queued_tokens"),
                ),
                Panel(
                    "KV pages in use",
                    "Share of each worker's pages that running sequences hold; cached ones can be reclaimed.",
                    "percentunit",
                    (
                        Query(
                            f"1 - max by (role, worker) (tandem_fleet_free_pages{ROUTER})"
                            f" / max by (role, worker) (tandem_fleet_pages{ROUTER})",
                            "{{role}} {{worker}}",
                        ),
                    ),
                    top=1,
                ),
                Panel(
                    "Workers by state",
                    "ready; draining: takes nothing new; silent: known, and not heard.",
                    "short",
                    (Query(f"max by (role, state) (tandem_fleet_workers{ROUTER})", "{{role}} {{state}}"),),
                ),
                Panel(
                    "Workers gone",
                    "In an hour. goodbye: drained and ended. lost: without a word.",
                    "short",
                    (
                        Query(
                            f"max by (role, cause) (increase(tandem_fleet_workers_ended_total{ROUTER}[1h]))",
                            "{{role}} {{cause}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Cache",
            (
                Panel(
                    "Prompt tokens found cached",
                    "Share of prompt tokens whose KV was not computed again, on either side of a hand-over.",
                    "percentunit",
                    (
                        Query(
                            ratio(
                                rate("tandem_cached_prompt_tokens_total", ROUTER, "model"),
                                rate("tandem_prompt_tokens_total", ROUTER, "model"),
                            ),
                            "{{model}}",
                        ),
                    ),
                    top=1,
                ),
                Panel(
                    "Hit ladder",
                    "Shares of the prompt tokens in whole blocks. ideal: an infinite cache; capacity: one cache of the "
                    "fleet's size; perfect_routing: some worker had them; achieved: not computed again.",
                    "percentunit",
                    (
                        Query(
                            rate("tandem_hit_ladder_tokens_total", ROUTER, "rung")
                            + " / ignoring (rung) group_left () "
                            + rate("tandem_hit_ladder_tokens_total", PROMPT),
                            "{{rung}}",
                        ),
                    ),
                    top=1,
                ),
                Panel(
                    "Prefix index",
                    "Blocks of 64 tokens that each router knows to be cached somewhere, as a share of its bound "
                    "(--index-max-blocks).",
                    "percentunit",
                    (
                        Query(
                            f"max by (instance) (tandem_index_blocks{ROUTER} / tandem_index_blocks_limit{ROUTER})",
                            "{{instance}}",
                        ),
                    ),
                ),
                Panel(
                    "Events without a place",
                    "Blocks that workers told of and whose parent the index does not know: it is forgetful, or lost "
                    "something.",
                    "short",
                    (Query(rate("tandem_index_unplaced_blocks_total", ROUTER, "instance"), "{{instance}}"),),
                ),
                Panel(
                    "Copies of popular prefixes",
                    "Copies to other workers, by how they ended.",
                    "short",
                    (Query(rate("tandem_replicas_total", ROUTER, "outcome"), "{{outcome}}"),),
                ),
                Panel(
                    "Prompts spliced",
                    "Share of prompt tokens taken from remembered turns instead of being tokenised again.",
                    "percentunit",
                    (
                        Query(
                            ratio(
                                rate("tandem_spliced_prompt_tokens_total", ROUTER),
                                f"({rate('tandem_spliced_prompt_tokens_total', ROUTER)}"
                                f" + {rate('tandem_encoded_prompt_tokens_total', ROUTER)})",
                            ),
                            "spliced",
                        ),
                    ),
                    top=1,
                ),
            ),
        ),
    ),
)
