"""Simulations of policies cell by cell, and how they are shown: what `tandem replay` does."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from router.policies import POLICIES, Policy
from router.simulation.replay import Replay
from router.simulation.result import Result, summarize
from router.simulation.setting import Arrival, Machine, Objective, Setting, arrivals, ideal_share
from tandem.errors import ConfigError
from tandem.traces import TraceEntry

COLUMNS: dict[str, tuple[str, str]] = {
    "hit_share": ("hit share", "{:.1%}"),
    "cached_share": ("told", "{:.1%}"),
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
    scale: float = 1.0
    """Factor of the trace's lengths."""

    @property
    def title(self) -> str:
        """What distinguishes it."""
        setting = self.setting
        load = f"load {self.load:.0%}" if self.load else "the trace's own times"
        caches = f"caches {self.cache_share:.0%} of the working set ({setting.cache_blocks} blocks a worker)"
        if setting.pool:
            caches = f"{setting.machine.kv_tokens} tokens of KV a worker"
        return f"{setting.prefill} prefill and {setting.decode} decode workers, {load}, {caches}"

    def arrivals(self, entries: Sequence[TraceEntry]) -> list[Arrival]:
        """The load. Raises ValueError."""
        return arrivals(entries, self.skip, self.load, self.setting, self.scale)


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


def check_wishes(policies: Sequence[str], plot: Path | None) -> None:
    """Raises ConfigError at once for what would fail after the first simulation."""
    for name in policies:
        make_policy(name)
    if plot:
        load_pyplot()


def run_cell(entries: Sequence[TraceEntry], cell: Cell, policy: str, objective: Objective) -> Result:
    """One policy in one cell. Raises ConfigError."""
    try:
        replay = Replay(cell.setting, make_policy(policy), cell.arrivals(entries))
        replay.run()
        return summarize(replay, policy, objective)
    except ValueError as error:
        raise ConfigError(str(error)) from None


Found = tuple[Cell, float, list[Result]]


def run_cells(
    entries: Sequence[TraceEntry],
    cells: Sequence[Cell],
    policies: Sequence[str],
    objective: Objective,
    jobs: int,
    known: Mapping[tuple[Cell, str], Result],
) -> Iterator[Found]:
    """Cell by cell; each is shown as soon as it is there. known: what need not be run."""
    names = list(dict.fromkeys(policies))
    with ProcessPoolExecutor(jobs) as pool:
        asked = {
            (cell, policy): pool.submit(run_cell, entries, cell, policy, objective)
            for cell in cells
            for policy in names
            if (cell, policy) not in known
        }
        for cell in cells:
            keys = [(cell, policy) for policy in names]
            results = [known[key] if key in known else asked[key].result() for key in keys]
            ideal = ideal_share(cell.arrivals(entries), cell.setting.block_tokens)
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


def read_results(paths: Sequence[Path]) -> dict[tuple[Cell, str], Result]:
    """What `write_json` wrote, by cell and policy; later files win. Raises ConfigError."""
    found = {}
    for path in paths:
        try:
            for data in json.loads(path.read_text(encoding="utf-8")):
                setting = {**data["setting"], "machine": Machine(**data["setting"]["machine"])}
                cell = Cell(Setting(**setting), data["load"], data["cache_share"], data["skip"], data.get("scale", 1.0))
                found.update({(cell, each["policy"]): Result(**each) for each in data["results"]})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"--merge: {path}: {type(error).__name__}: {error}") from None
    return found


def read_machine(given: Sequence[str]) -> Machine:
    """From `name=number` and JSON files of such, in turn. Raises ConfigError."""
    fields = {name: type(default) for name, default in dataclasses.asdict(Machine()).items()}
    values: dict[str, Any] = {}
    for each in given:
        name, equals, number = each.partition("=")
        try:
            new = {name: json.loads(number)} if equals else json.loads(Path(each).read_text(encoding="utf-8"))
            for field, value in new.items():
                if field not in fields:
                    raise ValueError(f"{field} is none of {', '.join(fields)}")
                if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                    raise ValueError(f"{field} is {value!r}; a number of at least 0 is needed")
                values[field] = fields[field](value)
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"--machine: {each}: {error}") from None
    return Machine(**values)


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
