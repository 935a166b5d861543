"""Systems side by side: one checkpoint, one load, one machine, in turn; medians of rounds, and ratios.

    python -m benchmarks.compare tandem-1p1d tandem-0p2d --model demo
    python -m benchmarks.compare tandem-0p1d hf --model qwen2-370m --input-tokens 512 --output-tokens 64 --concurrency 8
    python -m benchmarks.compare tandem-1p1d vllm-pd --model llama-7m --peers PEERS --vllm PEERS/vllm
    python -m benchmarks.compare tandem-0p1d vllm --workload multiturn --turns 6 --shared-tokens 510 --input-tokens 20

Only ratios from one run count: machines differ, and the same machine does from minute to minute.
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import report as reports
from benchmarks.load import Endpoint, Load
from benchmarks.report import Report
from benchmarks.serve import measure, shape_of
from benchmarks.shapes import SHAPES, checkpoint
from benchmarks.systems import NAMES, Peers, Server, Setting, StartError, server
from benchmarks.workloads import Shape
from tandem.errors import ConfigError

FIGURES: dict[str, tuple[str, Callable[[Report], float]]] = {
    "output_tokens_per_s": ("output tokens/s", lambda r: r.output_tokens_per_s),
    "ttft_p50_ms": ("TTFT p50, ms", lambda r: r.ttft.p50),
    "ttft_p99_ms": ("TTFT p99, ms", lambda r: r.ttft.p99),
    "tpot_p50_ms": ("TPOT p50, ms", lambda r: r.tpot.p50),
    "tpot_p99_ms": ("TPOT p99, ms", lambda r: r.tpot.p99),
    "tpot_none": ("answers without TPOT", lambda r: float(r.tpot_none)),
    "end_to_end_p50_ms": ("end to end p50, ms", lambda r: r.end_to_end.p50),
    "cached_share": ("cached share", lambda r: r.cached_share),
    "errors": ("errors", lambda r: float(sum(r.errors.values()))),
}
"""What a comparison shows."""

Figures = dict[str, float]


def medians(found: Sequence[Figures]) -> Figures:
    """Figure by figure."""
    return {name: median(each[name] for each in found) for name in found[0]}


def ratios(ours: Sequence[Figures], theirs: Sequence[Figures]) -> Figures:
    """Medians over rounds of ours / theirs in the same round; figures that are 0 in any round are left out."""
    pairs = list(zip(ours, theirs, strict=True))
    names = [name for name in FIGURES if all(mine[name] and other[name] for mine, other in pairs)]
    return {name: median(mine[name] / other[name] for mine, other in pairs) for name in names}


def alternate(
    servers: Sequence[Server], workload: str, shape: Shape, load: Load, warmup: int, rounds: int, progress: Console
) -> dict[str, list[Figures]]:
    """Every system once a round, each round with another seed. Raises StartError, ConnectionError."""
    found: dict[str, list[Figures]] = {each.name: [] for each in servers}
    with ExitStack() as stack:
        for each in servers:
            stack.callback(each.end)
        for number in range(rounds):
            for each in servers:
                progress.print(f"round {number + 1} of {rounds}: {each.name}", highlight=False)
                seeded = Load(load.concurrency, load.rate, load.speed, load.seed + number, load.timeout_s)
                with each.running() as url:
                    report = reports.summarize(measure(Endpoint(url), workload, shape, seeded, warmup))
                found[each.name].append({name: of(report) for name, (_, of) in FIGURES.items()})
                line = ", ".join(f"{FIGURES[name][0]} {value:.4g}" for name, value in found[each.name][-1].items())
                failed = "".join(f"; {count} x {kind}" for kind, count in report.errors.items())
                progress.print(f"  {line}{failed}", highlight=False, soft_wrap=True)
    return found


def show(found: dict[str, list[Figures]], title: str) -> None:
    """Medians, and the first system's ratio to each other one."""
    table, first = Table(title=title), next(iter(found))
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    others = [name for name in found if name != first]
    for name in others:
        table.add_column(f"{first} / {name}", justify="right")
    middle = {name: medians(rounds) for name, rounds in found.items()}
    shares = {name: ratios(found[first], found[name]) for name in others}
    for figure, (words, _) in FIGURES.items():
        cells = [f"{values[figure]:.4g}" for values in middle.values()]
        cells += [f"{values[figure]:.2f}" if figure in values else "" for values in shares.values()]
        table.add_row(words, *cells)
    Console().print(table)


def _servers(systems: Sequence[str], setting: Setting, peers: Peers, logs: Path | None) -> list[Server]:
    folder = logs or Path(tempfile.mkdtemp(prefix="tandem-compare-"))
    folder.mkdir(parents=True, exist_ok=True)
    return [server(name, setting, peers, folder) for name in dict.fromkeys(systems)]


def main(
    systems: Annotated[list[str], typer.Argument(help=NAMES)],
    model: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}, demo, a folder or a hub id")] = "llama-7m",
    workload: str = "random",
    input_tokens: Annotated[int, typer.Option(min=1)] = 300,
    output_tokens: Annotated[int, typer.Option(min=1)] = 32,
    shared_tokens: Annotated[int, typer.Option(min=0, help="for shared; in multiturn, words of the system text")] = 0,
    turns: Annotated[int, typer.Option(min=1, help="for the workload multiturn")] = 1,
    spread: float = 0.0,
    trace: Annotated[Path | None, typer.Option(help="for the workload trace")] = None,
    trace_scale: Annotated[float, typer.Option(help="factor for a trace's lengths")] = 1.0,
    trace_speed: Annotated[float, typer.Option(min=0, help="how much faster than its times; 0: closed loop")] = 0.0,
    concurrency: Annotated[int, typer.Option(min=1)] = 4,
    requests: Annotated[int, typer.Option(min=1)] = 48,
    warmup: Annotated[int, typer.Option(min=0)] = 8,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seed: int = 0,
    kv_mib: Annotated[int, typer.Option(min=0, help="KV memory of each of Tandem's workers; 0: 1 GiB")] = 0,
    peers: Annotated[Path | None, typer.Option(help="folder with vllm-pd.sh")] = None,
    vllm: Annotated[Path | None, typer.Option(help="folder that setup-vllm-cpu.sh was given")] = None,
    cache: Annotated[Path | None, typer.Option(help="where made checkpoints are kept")] = None,
    logs: Annotated[Path | None, typer.Option(help="where servers write; default: a temporary folder")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every round here")] = None,
) -> None:
    """Measures every system once a round, in turn."""
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whatever ends this, the servers end too
    try:
        servers = _servers(systems, Setting(checkpoint(model, cache), kv_mib=kv_mib), Peers(peers, vllm), logs)
        given = {
            "requests": requests, "input_tokens": input_tokens, "output_tokens": output_tokens, "spread": spread,
            "shared_tokens": shared_tokens, "turns": turns, "trace": trace, "scale": trace_scale,
        }  # fmt: skip
        shape = shape_of(workload, given)
        load = Load(0 if trace_speed else concurrency, speed=trace_speed, seed=seed)
        found = alternate(servers, workload, shape, load, warmup, rounds, console)
    except (ValueError, ConnectionError, StartError, ConfigError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    lengths = f"{input_tokens} in, {output_tokens} out, concurrency {concurrency}"
    show(found, f"{model}, {workload}: {lengths}; medians of {rounds} rounds of {requests} requests")
    if json_file:
        reports.write_json(
            json_file, {"model": model, "workload": workload, "load": {**given, "trace": str(trace)}, "rounds": found}
        )


if __name__ == "__main__":
    typer.run(main)
