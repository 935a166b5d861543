"""KV on its way, and what goes wrong there."""

from __future__ import annotations

from deploy.grafana.panels import WORKERS, Board, Panel, Query, Row, of, rate, ratio

ROUTERS = '{component="router",model=~"$model"}'
"""All of them: the variable `instance` is a worker's here."""
DECODERS = of(WORKERS, 'component="decode"')
HAND_OVERS = of(WORKERS, 'kind="hand_over"')
LOST = 'outcome="lost"'
PAIR = "sender, receiver, transport"
PAIR_NAME = "{{sender}} to {{receiver}}, {{transport}}"


def by_pair(expr: str) -> str:
    """With incarnations cut to their first digits, as `x-tandem-route` writes them."""
    for label in ("sender", "receiver"):
        expr = f'label_replace({expr}, "{label}", "$1", "{label}", "(.{{8}}).*")'
    return expr


BOARD = Board(
    uid="tandem-handover",
    title="Tandem: KV hand-over and failures",
    description="KV moved by pair and transport, hand-overs that fail, leases, self-probes, quarantined memory.",
    components="prefill|decode",
    rows=(
        Row(
            "Hand-overs",
            (
                Panel(
                    "KV landed",
                    "Bytes a second by pair, as routers hear of it. Incarnations are cut to eight digits.",
                    "Bps",
                    (Query(by_pair(rate("tandem_kv_moved_bytes_total", ROUTERS, PAIR)), PAIR_NAME),),
                ),
                Panel(
                    "Speed while under way",
                    "Bytes for each second in which a hand-over had bytes under way: the speed of the way itself.",
                    "Bps",
                    (
                        Query(
                            by_pair(
                                ratio(
                                    rate("tandem_kv_moved_bytes_total", ROUTERS, PAIR),
                                    rate("tandem_kv_moved_seconds_total", ROUTERS, PAIR),
                                )
                            ),
                            PAIR_NAME,
                        ),
                    ),
                ),
                Panel(
                    "Hand-overs a second",
                    "Those that landed something, by pair.",
                    "short",
                    (Query(by_pair(rate("tandem_kv_handovers_total", ROUTERS, PAIR)), PAIR_NAME),),
                ),
                Panel(
                    "Open tickets",
                    "Hand-overs under way, by end.",
                    "short",
                    (Query(f"sum by (instance, end) (tandem_kv_open_tickets{WORKERS})", "{{instance}} {{end}}"),),
                ),
                Panel(
                    "Pending spans",
                    "Posted and not yet complete.",
                    "short",
                    (Query(f"sum by (instance) (tandem_kv_pending_sends{WORKERS})", "{{instance}}"),),
                ),
                Panel(
                    "Who is who",
                    "Incarnations behind the addresses, for the names in the graphs above.",
                    "short",
                    (
                        Query(
                            "label_replace(max by (role, worker, incarnation) (tandem_fleet_worker_info"
                            f'{ROUTERS}), "incarnation", "$1", "incarnation", "(.{{8}}).*")',
                            "{{incarnation}}: {{role}} {{worker}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Failures",
            (
                Panel(
                    "Hand-overs that fail",
                    "Share of the hand-overs that decode workers ask for. Each is tried at the next prefill worker, "
                    "and in the end computed locally.",
                    "percentunit",
                    (
                        Query(
                            ratio(
                                rate("tandem_worker_failures_total", HAND_OVERS),
                                f"({rate('tandem_worker_failures_total', HAND_OVERS)}"
                                f" + {rate('tandem_kv_handovers_total', DECODERS)})",
                            ),
                            "failed",
                        ),
                    ),
                    top=1,
                ),
                Panel(
                    "Failures by kind",
                    "Kinds are explained in docs/runbooks/TandemKvHandoverFailures.md.",
                    "short",
                    (Query(rate("tandem_worker_failures_total", WORKERS, "kind"), "{{kind}}"),),
                ),
                Panel(
                    "Failed ways",
                    "Hand-overs that neither end failed, but the way between them, by pair.",
                    "short",
                    (Query(by_pair(rate("tandem_kv_handover_failures_total", ROUTERS, PAIR)), PAIR_NAME),),
                ),
                Panel(
                    "Pairs avoided",
                    "Pairs that routers plan last since their hand-overs failed.",
                    "short",
                    (Query(f"max by (instance) (tandem_kv_pairs_avoided{ROUTERS})", "{{instance}}"),),
                ),
                Panel(
                    "Leases that ran out",
                    "In an hour. peer: a worker heard nothing of another. router: a decode worker of a router. fleet: "
                    "a router of a worker. Not transport failures: those are above.",
                    "short",
                    (
                        Query(f"sum by (of) (increase(tandem_worker_lease_expiries_total{WORKERS}[1h]))", "{{of}}"),
                        Query(f"sum(increase(tandem_fleet_lease_expiries_total{ROUTERS}[1h]))", "fleet"),
                    ),
                ),
                Panel(
                    "Self-probes lost",
                    "In an hour: pages that a worker sent itself over its transport, and that did not arrive.",
                    "short",
                    (
                        Query(
                            f"sum by (instance) (increase(tandem_worker_probes_total{of(WORKERS, LOST)}[1h]))",
                            "{{instance}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Memory",
            (
                Panel(
                    "Quarantined slabs",
                    "Landing memory of peers that were given up and may still write.",
                    "bytes",
                    (Query(f"sum by (instance) (tandem_kv_quarantined_bytes{WORKERS})", "{{instance}}"),),
                ),
                Panel(
                    "Cached pages checked",
                    "Pages of the prefix cache whose digest was compared when they were hit (--verify-kv).",
                    "short",
                    (Query(rate("tandem_worker_kv_checked_pages_total", WORKERS, "instance"), "{{instance}}"),),
                ),
                Panel(
                    "Cached pages that had changed",
                    "In a day. Anything above nought is a fault of the memory, or of the code.",
                    "short",
                    (
                        Query(
                            f"sum by (instance) (increase(tandem_worker_kv_corrupt_pages_total{WORKERS}[1d]))",
                            "{{instance}}",
                        ),
                    ),
                ),
            ),
        ),
    ),
)
