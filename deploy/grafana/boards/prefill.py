"""The prefill pool."""

from __future__ import annotations

from deploy.grafana.boards.engine import hits, load, memory, processes, steps
from deploy.grafana.panels import PREFILL, Board, Panel, Query, Row, of, rate

SENDER = 'end="sender"'

BOARD = Board(
    uid="tandem-prefill",
    title="Tandem: prefill pool",
    description="Workers that compute prompts: how much waits, how fast it goes, what is cached, what is handed over.",
    components="prefill",
    rows=(
        load(PREFILL),
        Row(
            "Prompts",
            (
                Panel(
                    "Prompt tokens a second",
                    "Asked of each worker, cached ones included.",
                    "short",
                    (Query(rate("tandem_worker_prompt_tokens_total", PREFILL, "instance"), "{{instance}}"),),
                ),
                hits(PREFILL, "prefill", "Share of the prompt tokens asked of a worker that it had cached."),
                Panel(
                    "Hand-overs at work",
                    "Tickets open as the sender, and spans posted that are not yet complete.",
                    "short",
                    (
                        Query(
                            f"sum by (instance) (tandem_kv_open_tickets{of(PREFILL, SENDER)})", "{{instance}} tickets"
                        ),
                        Query(f"sum by (instance) (tandem_kv_pending_sends{PREFILL})", "{{instance}} spans"),
                    ),
                ),
            ),
        ),
        steps(PREFILL),
        memory(PREFILL),
        processes(PREFILL),
    ),
)
