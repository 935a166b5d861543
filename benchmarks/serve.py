"""A load on any OpenAI-compatible endpoint, Tandem's or another's: black box, over HTTP, streamed.

    python -m benchmarks.serve random --concurrency 8 --requests 64
    python -m benchmarks.serve multiturn --rate 2 --requests 80 --slo-ttft-ms 500 --slo-tpot-ms 50
    python -m benchmarks.serve trace --trace mooncake_conversation.jsonl --trace-scale 0.05 --trace-speed 10

Workloads: random (independent prompts), shared (one system prompt for all), multiturn (chats that carry the server's
own answers forward), long (long prompts), trace (see tandem/traces.py for its format).
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import report as reports
from benchmarks.load import DETAILS, Endpoint, Load, Measured, run
from benchmarks.workloads import DEFAULTS, WORKLOADS, Shape, make

Positive = typer.Option(min=1)


def measure(endpoint: Endpoint, name: str, shape: Shape, load: Load, warmup: int) -> Measured:
    """Warms the server up with other requests of the same kind, then measures. Raises ValueError, ConnectionError."""
    conversations = make(name, shape, load.seed)
    if warmup:
        # A closed loop: what is warmed up is the server, not the arrivals.
        ahead = make(name, replace(shape, requests=warmup), load.seed + 1_000_003)
        width = min(warmup, load.concurrency or 4)
        asyncio.run(run(endpoint, ahead, Load(concurrency=width, timeout_s=load.timeout_s)))
    return asyncio.run(run(endpoint, conversations, load))


def fields(pairs: list[str]) -> tuple[tuple[str, Any], ...]:
    """`name=JSON` of each. Raises ValueError."""
    found = []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            if not (name and equals):
                raise ValueError("no name or no value")
            found.append((name, json.loads(value)))
        except ValueError as error:
            raise ValueError(f"--extra is {pair}; name=JSON is needed: {error}") from None
    return tuple(found)


def shape_of(workload: str, given: dict[str, Any]) -> Shape:
    """The workload's own shape where nothing else was given (None). Raises ValueError."""
    if workload not in WORKLOADS:
        raise ValueError(f"workload is {workload}; it must be one of {', '.join(WORKLOADS)}")
    return Shape(**{**DEFAULTS[workload], **{name: value for name, value in given.items() if value is not None}})


def main(
    workload: Annotated[str, typer.Argument(help=f"one of {', '.join(WORKLOADS)}")] = "random",
    url: Annotated[str, typer.Option(help="of the server, without /v1")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="default: the first that the server names")] = "",
    api_key: str = "",
    requests: Annotated[int, Positive] = 64,
    concurrency: Annotated[int, typer.Option(min=0, help="open conversations; default 8 without a rate")] = 0,
    rate: Annotated[float, typer.Option(min=0, help="conversations a second, Poisson; 0: closed loop")] = 0.0,
    warmup: Annotated[int, typer.Option(min=0, help="requests before the measured ones")] = 8,
    input_tokens: Annotated[int | None, Positive] = None,
    output_tokens: Annotated[int | None, Positive] = None,
    spread: Annotated[float | None, typer.Option(help="lengths vary by this share, 0 to 1")] = None,
    shared_tokens: Annotated[int | None, typer.Option(help="tokens that all prompts start with")] = None,
    turns: Annotated[int | None, Positive] = None,
    low_id: Annotated[int | None, typer.Option(help="least token id of random prompts")] = None,
    high_id: Annotated[int | None, typer.Option(help="one more than the largest")] = None,
    trace: Annotated[Path | None, typer.Option(exists=True, dir_okay=False)] = None,
    trace_scale: Annotated[float, typer.Option(help="factor for a trace's lengths")] = 1.0,
    trace_speed: Annotated[float, typer.Option(min=0, help="how much faster than its times; 0: closed loop")] = 0.0,
    slo_ttft_ms: Annotated[float, typer.Option(min=0)] = 0.0,
    slo_tpot_ms: Annotated[float, typer.Option(min=0)] = 0.0,
    seed: int = 0,
    timeout: Annotated[float, typer.Option(help="seconds for one request")] = 600.0,
    extra: Annotated[list[str] | None, typer.Option(help="name=JSON for every body, repeatable")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the numbers here")] = None,
    plot: Annotated[Path | None, typer.Option(help="write a picture here; needs matplotlib")] = None,
) -> None:
    """One load, its tables, and the same as JSON or a picture."""
    given = {
        "requests": requests, "input_tokens": input_tokens, "output_tokens": output_tokens, "spread": spread,
        "shared_tokens": shared_tokens, "turns": turns, "low_id": low_id, "high_id": high_id,
        "trace": trace, "scale": trace_scale,
    }  # fmt: skip
    try:
        shape = shape_of(workload, given)
        load = Load(concurrency or (0 if rate or trace_speed else 8), rate, trace_speed, seed, timeout)
        if plot:
            reports.load_pyplot()
        measured = measure(Endpoint(url, model, api_key, fields(extra or [])), workload, shape, load, warmup)
        report = reports.summarize(measured, reports.Objective(slo_ttft_ms, slo_tpot_ms))
        title = f"{workload} on {url}: {requests} requests, {_pace(load)}, seed {seed}"
        reports.show(report, title)
        if json_file:
            _write(json_file, {"workload": workload, "url": url, **asdict(load), **given}, report)
        if plot:
            reports.plot(plot, measured, title)
    except (ValueError, ConnectionError, ModuleNotFoundError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    _explain(measured)


def _pace(load: Load) -> str:
    if load.speed:
        return f"trace at {load.speed:g}x"
    return f"{load.rate:g} a second" if load.rate else f"concurrency {load.concurrency}"


def _write(path: Path, settings: dict[str, Any], report: reports.Report) -> None:
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    reports.write_json(path, {"settings": plain, **reports.as_json(report)})


def _explain(measured: Measured) -> None:
    """The first few errors of each kind in full, on stderr; then raises typer.Exit."""
    shown: Counter[str] = Counter()
    for sample in measured.samples:
        shown[sample.error] += 1
        if sample.error and shown[sample.error] <= DETAILS:
            text = f"{sample.error}: {sample.detail}"
            Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
    if shown.keys() - {""}:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
