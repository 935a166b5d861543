"""What `tandem up` shows once everything stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tandem.cluster import Role, WorkerInfo
from tandem.config import UpConfig


def banner(config: UpConfig, model_path: str, workers: Sequence[WorkerInfo], names: Sequence[str]) -> RenderableType:
    """Topology, model, pages, transport, threads, URL and a request to paste."""
    url = f"http://{config.host}:{config.port}"
    model = workers[0].model
    roles = Counter(worker.role for worker in workers)
    form = "disaggregated" if roles[Role.PREFILL] else "aggregated: decode workers prefill locally"
    transports = ", ".join(sorted({worker.transport for worker in workers}))
    head = Table.grid(padding=(0, 2))
    for label, value in (
        ("topology", f"1 router, {roles[Role.PREFILL]} prefill, {roles[Role.DECODE]} decode ({form})"),
        ("model", f"{model.name}, {workers[0].kv_dtype}, context {model.max_context} tokens, from {model_path}"),
        ("KV transport", transports if roles[Role.PREFILL] else "none needed"),
        ("listening on", f"{url}  (loopback, no authentication)"),
        ("metrics", f"{url}/metrics"),
    ):
        head.add_row(Text(label, style="bold"), Text(value))
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for title in ("process", "address", "pid", "compute threads", "KV pages", "metrics port"):
        table.add_column(title, no_wrap=True)
    table.add_row("router", f"{config.host}:{config.port}", "", "0", "", str(config.port))
    for name, worker in zip(names[1:], workers, strict=True):
        pages = f"{worker.total_pages} x {worker.page_size} tokens"
        row = (name, worker.address, str(worker.pid), str(worker.threads), pages, str(worker.metrics_port))
        table.add_row(*row)
    ask = (
        f"curl -N {url}/v1/chat/completions -H 'content-type: application/json' -d '"
        f'{{"model": "{model.name}", "stream": true, "messages": [{{"role": "user", "content": "What is Tandem?"}}]}}\''
    )
    return Group(
        Text("\nTandem is up\n", style="bold"), head, Text(), table, Text(), Text(ask), Text("\nCtrl-C stops everything.")
    )
