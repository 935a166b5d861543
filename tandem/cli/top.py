"""`tandem top`: a running cluster in the terminal, from the pages of its router and workers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict

import httpx
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from tandem.cli.fleet_client import FleetClient
from tandem.cli.frame import Frame, frame_between
from tandem.errors import TandemError

WIDE = 160
"""Columns where the output is no terminal: a log line is not cut."""
BAR = 10


def top(client: FleetClient, every_s: float, once: bool, as_json: bool) -> None:
    """Shows frames until Ctrl-C, or one with `once`. Raises Unavailable and BadRequest when the first read fails.

    A frame needs two reads, because rates are what happened between them.
    """
    before = client.read()
    if once or as_json:
        time.sleep(every_s)
        frame = frame_between(before, client.read())
        if as_json:
            print(json.dumps(asdict(frame)))
        else:
            console = Console()
            console = console if console.is_terminal else Console(width=WIDE)
            console.print(picture(frame))
        return
    with Live(console=Console(), screen=True, auto_refresh=False) as live:
        try:
            follow(client, every_s, live.update)
        except KeyboardInterrupt:
            return


def follow(client: FleetClient, every_s: float, show: Callable[..., None]) -> None:
    """Shows frame after frame. A router that does not answer is told in the picture, and tried again."""
    before = client.read()
    while True:
        time.sleep(every_s)
        try:
            now = client.read()
        except (TandemError, httpx.HTTPError) as error:
            show(f"{error}\nTrying again; Ctrl-C ends this.", refresh=True)
            continue
        show(picture(frame_between(before, now)), refresh=True)
        before = now


def picture(frame: Frame) -> RenderableType:
    """One frame."""
    return Group(_head(frame), "", _workers(frame), "", _pairs(frame))


def _head(frame: Frame) -> str:
    router = frame.router
    first = "no first token lately" if router.ttft_p50_s is None else f"first token {router.ttft_p50_s * 1e3:.0f} ms"
    tail = "" if router.ttft_p95_s is None else f" (95 %: {router.ttft_p95_s * 1e3:.0f} ms)"
    return (
        f"{router.url}  queued {router.queued}  running {router.running}  {router.requests_per_s:.1f} requests/s  "
        f"{router.tokens_per_s:.0f} tokens/s  {first}{tail}  cached {router.cached_share:.0%} of prompt tokens"
    )


def _workers(frame: Frame) -> Table:
    columns = (
        "worker",
        "role",
        "state",
        "running",
        "waiting",
        "queued tokens",
        "KV pages in use",
        "cached",
        "tokens/s",
    )
    table = Table(*columns, title=f"{len(frame.workers)} workers", title_justify="left")
    for worker in frame.workers:
        filled = round(worker.used_share * BAR)
        table.add_row(
            worker.address,
            worker.role,
            worker.state,
            str(worker.running),
            str(worker.waiting),
            str(worker.queued_tokens),
            f"{'█' * filled}{'░' * (BAR - filled)} {worker.used_share:.0%} of {worker.pages}",
            "?" if worker.cached_share is None else f"{worker.cached_share:.0%}",
            "?" if worker.tokens_per_s is None else f"{worker.tokens_per_s:.0f}",
            style=None if worker.state == "ready" else "yellow" if worker.state == "draining" else "red",
        )
    return table


def _pairs(frame: Frame) -> Table:
    columns = ("from", "to", "over", "MiB", "MiB/s now", "hand-overs", "failed")
    table = Table(*columns, title=f"{len(frame.pairs)} pairs that moved KV", title_justify="left")
    for pair in frame.pairs:
        table.add_row(
            pair.sender,
            pair.receiver,
            pair.transport,
            f"{pair.mib:.1f}",
            f"{pair.mib_per_s:.1f}",
            str(pair.tickets),
            str(pair.failures),
        )
    return table
