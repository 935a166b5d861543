"""What was measured, in the words of the field, and how it is shown.

TTFT: from sending a request to its first chunk of output. ITL: between two successive chunks. TPOT: by request, the
time from the first to the last chunk over the output tokens after the first chunk; unlike ITL it does not depend on how
many tokens a server puts into the later ones. Goodput: requests a second that kept every service level objective asked
for.

How many tokens the first chunk had cannot be seen in its text. It is known only where a server tells the usage with
each chunk (`--extra 'stream_options={"include_usage":true,"continuous_usage_stats":true}'` asks Tandem and vLLM for it,
and costs a server something for each chunk); elsewhere it is taken to be one, which makes TPOT too low by a factor of
(n - k) / (n - 1) for k of n tokens. An answer in one chunk has no TPOT: it is in no percentile, and is held to an
objective by its whole time over all its tokens.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.client import Sample
from benchmarks.load import Measured


@dataclass(frozen=True, slots=True)
class Latency:
    """Of one kind, in milliseconds; zeros of nothing."""

    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    max: float = 0.0

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """From seconds, in any order."""
        values = sorted(value * 1e3 for value in seconds)
        if not values:
            return cls()
        p50, p90, p99 = (percentile(values, share) for share in (0.5, 0.9, 0.99))
        return cls(sum(values) / len(values), p50, p90, p99, values[-1])


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of sorted values, interpolated between the two nearest ranks."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Objective:
    """A service level; 0 asks for nothing. Milliseconds."""

    ttft_ms: float = 0.0
    tpot_ms: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.ttft_ms or self.tpot_ms)

    def kept(self, sample: Sample) -> bool:
        """Whether a request was answered, and as fast as was asked for."""
        return not (
            sample.error
            or (self.ttft_ms and ttft(sample) * 1e3 > self.ttft_ms)
            or (self.tpot_ms and _pace(sample) * 1e3 > self.tpot_ms)
        )


@dataclass(frozen=True, slots=True)
class Report:
    """A load in numbers. Failed requests count in `errors` and nowhere else."""

    requests: int
    seconds: float
    errors: Mapping[str, int]
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    """Prompt tokens, cached ones included, and output tokens."""
    prompt_tokens: int
    output_tokens: int
    cached_share: float
    """Of the prompt tokens, those that the server says it found in a cache."""
    ttft: Latency
    itl: Latency
    tpot: Latency
    tpot_none: int
    """Answers of several tokens whose TPOT cannot be known, such as those in one chunk."""
    tpot_assumed: int
    """Answers whose first chunk was taken to have one token, since the server did not say."""
    end_to_end: Latency
    goodput_per_s: float | None
    """None when no objective was given."""
    goodput_share: float | None
    """Of all requests."""
    client_cpu_share: float
    """Of one core, what the load generator itself used."""


def ttft(sample: Sample) -> float:
    """Seconds from sending to the first chunk; to the end if there was none."""
    return (sample.chunks[0] if sample.chunks else sample.ended) - sample.started


def tpot(sample: Sample) -> float | None:
    """Seconds for each output token after the first chunk; None if nothing was seen to come after it."""
    later = sample.output_tokens - (sample.first_tokens or 1)
    if later < 1 or len(sample.chunks) < 2:
        return None
    return (sample.chunks[-1] - sample.chunks[0]) / later


def tpots(samples: Sequence[Sample]) -> list[float]:
    """Of those that have one."""
    return [found for found in map(tpot, samples) if found is not None]


def _pace(sample: Sample) -> float:
    """What an objective for TPOT is asked of. One token has no pace."""
    if sample.output_tokens < 2:
        return 0.0
    known = tpot(sample)
    return (sample.ended - sample.started) / sample.output_tokens if known is None else known


def summarize(measured: Measured, objective: Objective | None = None) -> Report:
    """The numbers of one load."""
    good = [sample for sample in measured.samples if not sample.error]
    seconds = measured.seconds or 1e-9
    prompts, outputs = sum(s.prompt_tokens for s in good), sum(s.output_tokens for s in good)
    kept = sum(objective.kept(s) for s in measured.samples) if objective else None
    return Report(
        requests=len(measured.samples),
        seconds=measured.seconds,
        errors=dict(Counter(s.error for s in measured.samples if s.error)),
        requests_per_s=len(good) / seconds,
        output_tokens_per_s=outputs / seconds,
        total_tokens_per_s=(prompts + outputs) / seconds,
        prompt_tokens=prompts,
        output_tokens=outputs,
        cached_share=sum(s.cached_tokens for s in good) / prompts if prompts else 0.0,
        ttft=Latency.of([ttft(s) for s in good]),
        itl=Latency.of([after - before for s in good for before, after in pairwise(s.chunks)]),
        tpot=Latency.of(tpots(good)),
        tpot_none=sum(s.output_tokens > 1 and tpot(s) is None for s in good),
        tpot_assumed=sum(not s.first_tokens and tpot(s) is not None for s in good),
        end_to_end=Latency.of([s.ended - s.started for s in good]),
        goodput_per_s=None if kept is None else kept / seconds,
        goodput_share=None if kept is None else kept / max(1, len(measured.samples)),
        client_cpu_share=measured.client_cpu_s / seconds,
    )


def show(report: Report, title: str) -> None:
    """Prints the tables of one load."""
    console = Console()
    table = Table(title=title)
    for column in ("milliseconds", "mean", "p50", "p90", "p99", "max"):
        table.add_column(column, justify="right")
    rows = {
        "time to first token (TTFT)": report.ttft,
        "between chunks (ITL)": report.itl,
        "per output token (TPOT)": report.tpot,
        "end to end": report.end_to_end,
    }
    for name, latency in rows.items():
        table.add_row(name, *(f"{value:.1f}" for value in dataclasses.astuple(latency)))
    console.print(table)
    sums = Table(show_header=False)
    failed = sum(report.errors.values())
    sums.add_row("requests", f"{report.requests - failed} answered, {failed} failed, in {report.seconds:.1f} s")
    sums.add_row("output tokens/s", f"{report.output_tokens_per_s:.1f}")
    sums.add_row("prompt and output tokens/s", f"{report.total_tokens_per_s:.1f}")
    sums.add_row("requests/s", f"{report.requests_per_s:.2f}")
    if report.goodput_per_s is not None and report.goodput_share is not None:
        sums.add_row("goodput, requests/s", f"{report.goodput_per_s:.2f} ({report.goodput_share:.0%} of all)")
    sums.add_row("answers without TPOT", f"{report.tpot_none} of {report.requests - failed}")
    sums.add_row("TPOT if first chunk has 1", f"{report.tpot_assumed} of {report.requests - failed}")
    sums.add_row("prompt tokens cached", f"{report.cached_share:.1%} of {report.prompt_tokens}")
    sums.add_row("load generator", f"{report.client_cpu_share:.1%} of one core")
    for kind, count in report.errors.items():
        sums.add_row(f"[red]{kind}[/red]", str(count))
    console.print(sums)


def as_json(report: Report) -> dict[str, Any]:
    """Plain values."""
    return dataclasses.asdict(report)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Indented, with a newline at its end."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def load_pyplot() -> Any:
    """Matplotlib's drawing module, without a display. Raises ModuleNotFoundError with what to install."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--plot needs matplotlib: pip install 'tandem-serve[bench]'") from None


def plot(path: Path, measured: Measured, title: str) -> None:
    """Distributions of TTFT and TPOT, and output over time. Raises as `load_pyplot`."""
    pyplot = load_pyplot()
    good = [sample for sample in measured.samples if not sample.error]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    for axis, (name, values) in zip(
        axes,
        {
            "time to first token": sorted(ttft(s) * 1e3 for s in good),
            "time per output token": sorted(found * 1e3 for found in tpots(good)),
        }.items(),
        strict=False,
    ):
        axis.step(values, [(at + 1) / len(values) for at in range(len(values))], where="post")
        axis.set(xlabel=f"{name}, ms", ylabel="share of requests", ylim=(0, 1))
    start = min((s.started for s in measured.samples), default=0.0)
    axes[2].hist([at - start for s in good for at in s.chunks], bins=50)
    axes[2].set(xlabel="seconds", ylabel="chunks")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
