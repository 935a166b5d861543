"""What `tandem up` shows once everything stands: plain lines, readable in 80 columns and in a log file."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from tandem.cluster import Role, WorkerInfo
from tandem.config import UpConfig
from tandem.ports import authority


@dataclass(frozen=True, slots=True)
class Standing:
    """A cluster that stands."""

    host: str
    port: int
    router_pid: int
    model_path: str
    workers: Sequence[tuple[str, WorkerInfo]]
    """Names, and what the workers say of themselves; at least one decode worker."""
    slots: int | None = None
    """How many workers may compute at once; None is all."""
    keys: bool = False
    """Whether clients need API keys."""
    drafts: str = ""
    """Who guesses tokens ahead, and how many."""
    where: str = ""
    """Which Ray cluster; empty on one machine."""
    more_routers: Sequence[tuple[str, str, int]] = ()
    """Name, address and process id of each but the first."""


def banner(cluster: Standing) -> str:
    """Topology, model, KV, addresses, a line for each process, and a request to paste."""
    url = f"http://{authority(cluster.host, cluster.port)}"
    infos = [info for _, info in cluster.workers]
    first, roles = infos[0], Counter(info.role for info in infos)
    moved = ", ".join(sorted({info.transport for info in infos})) if roles[Role.PREFILL] else "none needed"
    form = "disaggregated" if roles[Role.PREFILL] else "aggregated: decode workers prefill locally"
    access = "with API keys" if cluster.keys else "loopback, no authentication"
    facts = {
        **({"cluster": cluster.where} if cluster.where else {}),
        "topology": f"{_routers(cluster)}, {roles[Role.PREFILL]} prefill, {roles[Role.DECODE]} decode ({form})",
        "model": f"{first.model.name}, context {first.model.max_context} tokens",
        "folder": cluster.model_path,
        "KV": f"{first.kv_dtype}, pages of {first.page_size} tokens",
        "KV transport": moved,
        "compute": f"{first.threads} thread{'s' if first.threads > 1 else ''} for each worker"
        + (f", at most {cluster.slots} of them at once" if cluster.slots is not None else ""),
        **({"drafts": cluster.drafts} if cluster.drafts else {}),
        "listening on": f"{url} ({access})",
        "metrics": f"{url}/metrics",
    }
    lines = ["", "Tandem is up", ""]
    lines += [f"  {label:<13} {value}" for label, value in facts.items()]
    lines += ["", *_processes(cluster), "", "Ask it something:", "", *_curl(url, first.model.name), ""]
    return "\n".join([*lines, "Ctrl-C stops everything."])


def drafts_of(config: UpConfig) -> str:
    """Who guesses tokens ahead, and how many; empty where nobody does."""
    who = "prompt lookup" if config.speculative == "ngram" else config.draft_model
    if who is None:
        return ""
    tokens = f"up to {config.draft_tokens} tokens"
    return f"{who}, trees of {tokens}" if config.draft_branches > 1 else f"{who}, {tokens} ahead"


def _routers(cluster: Standing) -> str:
    more = len(cluster.more_routers)
    return f"{more + 1} routers" if more else "1 router"


def _processes(cluster: Standing) -> list[str]:
    rows = [["router", authority(cluster.host, cluster.port), f"pid {cluster.router_pid}"]]
    rows += [[name, address, f"pid {pid}"] for name, address, pid in cluster.more_routers]
    for name, info in cluster.workers:
        pages, metrics = f"{info.total_pages} pages", f"metrics {info.metrics_port}"
        rows.append([name, info.address, f"pid {info.pid}", pages, metrics])
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    return ["  " + "  ".join(f"{text:<{widths[at]}}" for at, text in enumerate(row)).rstrip() for row in rows]


def _curl(url: str, model: str) -> list[str]:
    """A chat completion, as a shell command over four lines."""
    body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": "What is Tandem?"}]})
    before, after = shlex.quote(body).split('"messages"', 1)
    return [
        f"curl -N {url}/v1/chat/completions \\",
        "  -H 'content-type: application/json' \\",
        f"  -d {before.rstrip()}",
        f'      "messages"{after}',
    ]
