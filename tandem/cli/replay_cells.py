"""Simulations of policies cell by cell, and how they are shown: what `tandem replay` does."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from router.policies import POLICIES, Policy
from router.simulation.replay import Replay
from router.simulation.result import Result, summarize
from router.simulation.setting import Objective, Setting, arrivals, ideal_share
from tandem.errors import ConfigError
from tandem.traces import TraceEntry

COLUMNS: dict[str, tuple[str, str]] = {
    "hit_share": ("hit share", "{:.1%}"),
    "ttft_p50": ("TTFT p50, ms", "{:.0f}"),
    "ttft_p90": ("p90", "{:.0f}"),
    "ttft_p99": ("p99", "{:.0f}"),
    "itl_p50": ("ITL p50, ms", "{:.1f}"),
    "itl_p99": ("p99", "{:.1f}"),
    "goodput_share": ("goodput", "{:.2%}"),
    "busiest": ("busiest / mean", "{:.2f}"),
    "busiest_share": ("busiest", "{:.0%}"),
    "local_share": ("decode-only", "{:.1%}"),
    "rejected_share": ("rejected", "{:.1%}"),
    "plan_ms_p50": ("plan p50, ms", "{:.2f}"),
}


LEAST_WIDTH = 165
"""Of a table, where the output is no terminal."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cluster under one load: what all policies are compared in."""

    setting: Setting
    load: float
    cache_share: float
    """Of the trace's working set, all prefill workers together."""
    skip: int

    @property
    def title(self) -> str:
        """What distinguishes it."""
        return (
            f"{self.setting.prefill} prefill and {self.setting.decode} decode workers, load {self.load:.0%}, "
            f"caches {self.cache_share:.0%} of the working set ({self.setting.cache_blocks} blocks a worker)"
        )


def make_policy(name: str) -> Policy:
    """A product policy by its name, any other as `module:attribute`. Raises ConfigError."""
    if name in POLICIES:
        return POLICIES[name]()
    module, colon, attribute = name.partition(":")
    try:
        if not colon:
            raise ValueError("no such policy")
        made = getattr(importlib.import_module(module), attribute)()
        if not isinstance(made, Policy):
            raise TypeError("it is no router.policies.Policy")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        known = ", ".join(POLICIES)
        raise ConfigError(f"--policy: {name}: {error}; give one of {known}, or module:attribute") from None
    return made


def run_cell(entries: Sequence[TraceEntry], cell: Cell, policy: str, objective: Objective) -> Result:
    """One policy in one cell. Raises ConfigError."""
    try:
        load = arrivals(entries, cell.skip, cell.load, cell.setting)
        replay = Replay(cell.setting, make_policy(policy), load)
        replay.run()
        return summarize(replay, policy, objective)
    except ValueError as error:
        raise ConfigError(str(error)) from None


Found = tuple[Cell, float, list[Result]]


def run_cells(
    entries: Sequence[TraceEntry], cells: Sequence[Cell], policies: Sequence[str], objective: Objective, jobs: int
) -> Iterator[Found]:
    """Cell by cell; each is shown as soon as it is there."""
    with ProcessPoolExecutor(jobs) as pool:
        asked = [
            [pool.submit(run_cell, entries, cell, policy, objective) for policy in dict.fromkeys(policies)]
            for cell in cells
        ]
        for cell, futures in zip(cells, asked, strict=True):
            results = [future.result() for future in futures]
            load = arrivals(entries, cell.skip, cell.load, cell.setting)
            ideal = ideal_share(load, cell.setting.block_tokens)
            _show(cell, ideal, results)
            yield cell, ideal, results


def _short(policy: str) -> str:
    return policy.rpartition(":")[2]


def _show(cell: Cell, ideal: float, results: Sequence[Result]) -> None:
    table = Table(title=f"{cell.title}; an infinite shared cache would hit {ideal:.1%}")
    table.add_column("policy")
    for title, _ in COLUMNS.values():
        table.add_column(title, justify="right")
    for result in results:
        table.add_row(
            _short(result.policy), *(form.format(getattr(result, name)) for name, (_, form) in COLUMNS.items())
        )
    console = Console()
    console.width = max(console.width, LEAST_WIDTH)
    console.print(table)


def write_json(path: Path, found: Sequence[Found]) -> None:
    """Everything, one object for each cell."""
    data = [
        {**dataclasses.asdict(cell), "ideal_share": ideal, "results": [dataclasses.asdict(each) for each in results]}
        for cell, ideal, results in found
    ]
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def load_pyplot() -> Any:
    """Matplotlib's drawing module, without a display. Raises ConfigError with what to install."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ModuleNotFoundError:
        raise ConfigError("--plot needs matplotlib: pip install 'tandem-serve[bench]'") from None


def draw(path: Path, found: Sequence[Found]) -> None:
    """Four figures over all cells, a line for each policy."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(4, 1, figsize=(12, 14), sharex=True)
    names = [f"{c.setting.prefill}p {c.load:.0%} {c.cache_share:.0%}" for c, _, _ in found]
    for axis, field in zip(axes, ("hit_share", "ttft_p50", "ttft_p99", "busiest"), strict=True):
        for number, result in enumerate(found[0][2]):
            values = [getattr(results[number], field) for _, _, results in found]
            axis.plot(range(len(found)), values, marker="o", label=_short(result.policy))
        axis.set(ylabel=COLUMNS[field][0] if field != "ttft_p99" else "TTFT p99, ms")
        axis.grid(alpha=0.3)
    axes[0].legend(ncols=4, fontsize=8)
    axes[-1].set_xticks(range(len(found)), names, rotation=60, ha="right")
    axes[-1].set_xlabel("prefill workers, load, caches over the working set")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
