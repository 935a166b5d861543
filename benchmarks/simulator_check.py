"""Does `tandem replay` predict a real cluster? Both, round by round, with medians over the rounds.

    python -m benchmarks.make_trace chats.jsonl --requests 260 --rate 6 --output 512 --tenants 10 --system 6 --turns 4
    python -m benchmarks.simulator_check chats.jsonl --policy cost --policy sglang --policy round_robin --rounds 3

The trace is played on a real cluster of each policy, and before and after each the machine is fitted by loads that are
not the trace (`benchmarks.fit_machine`): its speed changes from minute to minute, so each run is predicted from the
means of these two fits. How much processes hinder one another is of the programs and the machine, not of the minute,
and one fit of it is rough: the median of all fits counts. How long all steps took, predicted and measured, tells
whether it was the same machine. Where other programs use it, nothing this says is worth anything.
"""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import report as reports
from benchmarks.baselines import BASELINES
from benchmarks.fit_machine import BLOCK_TOKENS, Pages, cores, fit, wait_for_workers
from benchmarks.load import Endpoint, Load
from benchmarks.load import run as ask
from benchmarks.report import Report
from benchmarks.shapes import checkpoint
from benchmarks.systems import Peers, Setting, StartError, server
from benchmarks.workloads import Shape, make
from router.simulation import setting as simulated
from router.simulation.result import Result
from router.simulation.setting import Machine, Objective
from tandem.cli.replay_cells import Cell, run_cell
from tandem.errors import ConfigError
from tandem.traces import TraceEntry, read_trace

WARM_UP = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Played:
    """A real run."""

    report: Report
    step_s: float
    """What the steps of all its workers took."""


FIGURES: dict[str, tuple[Callable[[Result], float], Callable[[Played], float]]] = {
    "cached share": (lambda result: result.cached_share, lambda played: played.report.cached_share),
    "TTFT p50, ms": (lambda result: result.ttft_p50, lambda played: played.report.ttft.p50),
    "TTFT p90, ms": (lambda result: result.ttft_p90, lambda played: played.report.ttft.p90),
    "TTFT p99, ms": (lambda result: result.ttft_p99, lambda played: played.report.ttft.p99),
    "TPOT p50, ms": (lambda result: result.tpot_p50, lambda played: played.report.tpot.p50),
    "steps, s": (lambda result: result.step_s, lambda played: played.step_s),
}
"""Predicted and measured."""

Round = dict[str, dict[str, tuple[float, float]]]
"""By policy and figure: predicted, measured."""
HINDRANCES = ("crowding", "contention")
"""Fields of a machine that are not of the minute."""


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One cluster and one trace, real and simulated."""

    trace: Path
    requests: int
    scale: float
    prefill: int
    decode: int
    real: Setting

    def predict(self, machine: Machine, policy: str, entries: Sequence[TraceEntry]) -> Result:
        """By simulation. Raises ConfigError."""
        basis = simulated.Setting(
            self.prefill, self.decode, machine, block_tokens=BLOCK_TOKENS, pool=True, slots=cores()
        )
        name = f"benchmarks.baselines:{policy}" if policy in BASELINES else policy
        return run_cell(entries, Cell(basis, 0.0, 1.0, 0, self.scale), name, Objective())

    def play(self, policy: str, seed: int, folder: Path) -> Played:
        """For real. Raises ValueError, ConnectionError, StartError, httpx.HTTPError."""
        shape = Shape(self.requests, 1, 1, trace=self.trace, scale=self.scale)
        one = server(self.system(policy), self.real, Peers(), folder)
        with one.running() as url:
            # Another seed: nothing of it is found in a cache.
            warm_up = make("trace", dataclasses.replace(shape, requests=WARM_UP), seed + 1_000_003)
            asyncio.run(ask(Endpoint(url), warm_up, Load(concurrency=4)))
            pages = Pages([worker.metrics for worker in wait_for_workers(one.log)])
            before = pages.read()
            measured = asyncio.run(ask(Endpoint(url), make("trace", shape, seed), Load(speed=1.0)))
            steps = [after.since(old) for old, after in zip(before, pages.read(), strict=True)]
        report = reports.summarize(measured)
        if report.errors:
            raise ValueError(f"{policy}: {sum(report.errors.values())} requests failed: {', '.join(report.errors)}")
        return Played(report, sum(each.seconds for each in steps))

    def system(self, policy: str) -> str:
        """Its name in `benchmarks.systems`."""
        return f"tandem-{self.prefill}p{self.decode}d-{policy}"


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One policy's, and the fits before and after it."""

    policy: str
    fits: tuple[dict[str, float], dict[str, float]]
    played: Played


def mean(one: Mapping[str, float], other: Mapping[str, float]) -> Machine:
    """Between two fits. Rates are averaged as times, which is what a hand-over takes."""
    values: dict[str, Any] = {name: (one[name] + other[name]) / 2 for name in one}
    rates = one["link_bytes_per_ms"], other["link_bytes_per_ms"]
    values["link_bytes_per_ms"] = 2 / sum(1 / rate for rate in rates)
    whole = {name: round(values[name]) for name in ("kv_bytes", "kv_tokens", "max_batch_tokens", "max_running")}
    return Machine(**{**values, **whole})


def machines(runs: Sequence[Run]) -> list[Machine]:
    """What each run is predicted with."""
    fits = [runs[0].fits[0], *(run.fits[1] for run in runs)]
    hindrances: dict[str, Any] = {name: median(fit[name] for fit in fits) for name in HINDRANCES}
    return [dataclasses.replace(mean(*run.fits), **hindrances) for run in runs]


class Check:
    """Fits and runs in turn."""

    def __init__(self, case: Case, entries: Sequence[TraceEntry], seed: int) -> None:
        self._case, self._entries, self._seed = case, entries, seed
        self._folder = Path(tempfile.mkdtemp(prefix="tandem-check-"))
        self.runs: list[Run] = []

    def play(self, policies: Sequence[str]) -> None:
        """Every policy once. Raises as `fit` and `Case.play`."""
        for policy in policies:
            before = self.runs[-1].fits[1] if self.runs else self._fit()
            played = self._case.play(policy, self._seed, self._folder)
            self.runs.append(Run(policy, (before, self._fit()), played))

    def _fit(self) -> dict[str, float]:
        self._seed += 1
        return fit(self._case.system("cost"), self._case.real, self._seed, self._folder)

    def rounds(self, policies: int) -> list[Round]:
        """All runs so far, so many in a round, beside what is predicted for them."""
        found = []
        for run, machine in zip(self.runs, machines(self.runs), strict=True):
            predicted = self._case.predict(machine, run.policy, self._entries)
            found.append(
                (run.policy, {name: (of(predicted), seen(run.played)) for name, (of, seen) in FIGURES.items()})
            )
        return [dict(found[at : at + policies]) for at in range(0, len(found), policies)]


def over_rounds(rounds: Sequence[Round]) -> Mapping[str, Mapping[str, tuple[float, float, float]]]:
    """By policy and figure: medians of what was predicted and measured, and of their ratio in the same round."""

    def of(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
        predicted, measured = ([pair[place] for pair in pairs] for place in (0, 1))
        return median(predicted), median(measured), median(one / other if other else 0.0 for one, other in pairs)

    return {
        policy: {name: of([each[policy][name] for each in rounds]) for name in figures}
        for policy, figures in rounds[0].items()
    }


def show(rounds: Sequence[Round]) -> None:
    """A row for each policy and figure."""
    table = Table(title=f"medians of {len(rounds)} rounds")
    for title in ("policy", "", "predicted", "measured", "predicted / measured", "in each round"):
        table.add_column(title, justify="left" if title in ("policy", "") else "right")
    for policy, figures in over_rounds(rounds).items():
        for name, (predicted, measured, ratio) in figures.items():
            each = " ".join(f"{one / other:.2f}" for one, other in (found[policy][name] for found in rounds) if other)
            table.add_row(policy, name, f"{predicted:.3g}", f"{measured:.3g}", f"{ratio:.2f}", each)
    Console().print(table)


def main(
    trace: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="see benchmarks.make_trace")],
    policy: Annotated[list[str] | None, typer.Option(help="repeatable; default: cost")] = None,
    prefill: Annotated[int, typer.Option(min=1)] = 4,
    decode: Annotated[int, typer.Option(min=1)] = 2,
    model: Annotated[str, typer.Option(help="see benchmarks.compare")] = "demo",
    kv_mib: Annotated[int, typer.Option(min=1, help="KV memory of each worker")] = 8,
    requests: Annotated[int, typer.Option(min=1)] = 200,
    scale: Annotated[float, typer.Option(help="factor for the trace's lengths")] = 0.125,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seed: int = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every round here")] = None,
) -> None:
    """Fits, predicts and measures, round by round."""
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whatever ends this, the clusters end too
    try:
        case = Case(trace, requests, scale, prefill, decode, Setting(checkpoint(model), "bfloat16", kv_mib=kv_mib))
        check, policies = Check(case, list(read_trace(trace, requests)), seed), list(dict.fromkeys(policy or ["cost"]))
        for number in range(rounds):
            check.play(policies)
            console.print(f"round {number + 1} of {rounds}", highlight=False)
            if json_file:
                reports.write_json(json_file, {"runs": [dataclasses.asdict(run) for run in check.runs]})
        show(check.rounds(len(policies)))
    except (ValueError, ConnectionError, StartError, ConfigError, httpx.HTTPError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
