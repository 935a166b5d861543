"""The same load on the same cores: disaggregated beside aggregated, alternating, medians.

python -m benchmarks.forms --rounds 3
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from dataclasses import fields
from statistics import median
from typing import Annotated

import httpx
import typer

from benchmarks.load import Report, run, show
from tandem.ports import free_ports

FORMS = {
    "1 prefill + 1 decode": ("--prefill", "1", "--decode", "1"),
    "2 aggregated": ("--prefill", "0", "--decode", "2"),
    "1 aggregated": ("--prefill", "0", "--decode", "1"),
}
START_S = 120.0


def measure(model: str, form: tuple[str, ...], concurrency: int, requests: int, shape: tuple[int, int, int]) -> Report:
    """Starts a cluster, warms it with a tenth of the load, measures, stops it."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tandem.cli", "up", model, *form, "--port", str(port), "--log-level", "warning"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the cluster {' '.join(form)} did not start")
            time.sleep(0.2)
        prompt, output, shared = shape
        asyncio.run(run(url, concurrency, max(requests // 10, concurrency), prompt, output, shared, seed=1))
        return asyncio.run(run(url, concurrency, requests, prompt, output, shared, seed=2))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _ready(url: str) -> bool:
    try:
        return httpx.get(url + "/ready", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def medians(reports: list[Report]) -> Report:
    """Field by field."""
    values = {each.name: median(getattr(r, each.name) for r in reports) for each in fields(Report)}
    return Report(**values)


def main(
    model: str = "demo",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    concurrency: int = 4,
    requests: int = 48,
    prompt_tokens: int = 300,
    output_tokens: int = 32,
    shared_tokens: int = 0,
) -> None:
    """Every form once a round, in turn; the table shows medians over rounds."""
    shape = (prompt_tokens, output_tokens, shared_tokens)
    found: dict[str, list[Report]] = {name: [] for name in FORMS}
    for _ in range(rounds):
        for name, form in FORMS.items():
            found[name].append(measure(model, form, concurrency, requests, shape))
    title = f"{model}: {prompt_tokens} in ({shared_tokens} shared), {output_tokens} out, concurrency {concurrency}"
    show({name: medians(reports) for name, reports in found.items()}, f"{title}, medians of {rounds}")


if __name__ == "__main__":
    typer.run(main)
