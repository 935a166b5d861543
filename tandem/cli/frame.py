"""What `tandem top` shows, computed from two reads of a cluster's pages. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tandem import obs

MIB = 1 << 20
SHORT_ID = 8
Series = Mapping[str, Sequence[tuple[Mapping[str, str], float]]]
"""Sample name -> (labels, value) of each."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A cluster's pages at one moment."""

    url: str
    at_s: float
    fleet: Mapping[str, Any]
    """The router's `/metrics/fleet`."""
    router: Series
    workers: Mapping[str, Series]
    """Metrics page of each worker that showed it, by incarnation."""


@dataclass(frozen=True, slots=True)
class RouterLine:
    """A router between two reads. Times and shares are of that while, or since its start where nothing happened."""

    url: str
    queued: int
    running: int
    requests_per_s: float
    tokens_per_s: float
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    cached_share: float


@dataclass(frozen=True, slots=True)
class WorkerLine:
    """A worker; `cached_share` and `tokens_per_s` are None where its own page cannot be read."""

    incarnation: str
    address: str
    role: str
    state: str
    running: int
    waiting: int
    queued_tokens: int
    pages: int
    used_share: float
    """Of pages that running sequences hold."""
    cached_share: float | None
    """Of pages that hold prefixes for reuse."""
    tokens_per_s: float | None
    """Computed, prompts and outputs."""


@dataclass(frozen=True, slots=True)
class PairLine:
    """KV that one worker gave another, since the router knows of it."""

    sender: str
    receiver: str
    transport: str
    mib: float
    mib_per_s: float
    tickets: int
    failures: int


@dataclass(frozen=True, slots=True)
class Frame:
    """What is shown at once."""

    router: RouterLine
    workers: tuple[WorkerLine, ...]
    pairs: tuple[PairLine, ...]


def series_of(page: str) -> Series:
    """All samples of a Prometheus page."""
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def frame_between(before: Reading, now: Reading) -> Frame:
    """The frame of the time between two reads."""
    seconds = max(now.at_s - before.at_s, 1e-6)
    workers = tuple(_worker(each, before, now, seconds) for each in now.fleet["workers"])
    return Frame(_router(before, now, seconds), workers, _pairs(before, now, seconds))


def total(series: Series, name: str, **labels: str) -> float:
    """Sum over the samples of a name that have these labels."""
    samples = series.get(name, ())
    return sum(value for have, value in samples if all(have.get(key) == wanted for key, wanted in labels.items()))


def _router(before: Reading, now: Reading, seconds: float) -> RouterLine:
    def grown(name: str) -> float:
        return max(0.0, total(now.router, name) - total(before.router, name))

    prompt, cached = grown(obs.PROMPT_TOKENS_TOTAL), grown(obs.CACHED_TOKENS_TOTAL)
    if not prompt:
        prompt, cached = total(now.router, obs.PROMPT_TOKENS_TOTAL), total(now.router, obs.CACHED_TOKENS_TOTAL)
    return RouterLine(
        url=now.url,
        queued=round(total(now.router, obs.REQUESTS_QUEUED)),
        running=round(total(now.router, obs.REQUESTS_RUNNING)),
        requests_per_s=grown(obs.REQUESTS_TOTAL) / seconds,
        tokens_per_s=grown(obs.COMPLETION_TOKENS_TOTAL) / seconds,
        ttft_p50_s=_quantile(before.router, now.router, 0.5),
        ttft_p95_s=_quantile(before.router, now.router, 0.95),
        cached_share=cached / prompt if prompt else 0.0,
    )


def _quantile(before: Series, now: Series, share: float) -> float | None:
    """Of the time to the first token: the bound of the bucket that it falls into, as Prometheus would have it."""
    name = f"{obs.FIRST_TOKEN_SECONDS}_bucket"
    counts = _buckets(now, name)
    earlier = _buckets(before, name)
    lately = {bound: count - earlier.get(bound, 0.0) for bound, count in counts.items()}
    counts = lately if max(lately.values(), default=0.0) > 0 else counts
    whole = max(counts.values(), default=0.0)
    if not whole:
        return None
    lower, below = 0.0, 0.0
    for bound in sorted(counts):
        if counts[bound] >= share * whole:
            inside = counts[bound] - below
            width = bound - lower
            return lower if bound == float("inf") else lower + width * (share * whole - below) / max(inside, 1e-9)
        lower, below = bound, counts[bound]
    return lower


def _buckets(series: Series, name: str) -> dict[float, float]:
    """Upper bound -> count up to it, over all processes of the router."""
    found: dict[float, float] = {}
    for labels, value in series.get(name, ()):
        bound = float(labels["le"])
        found[bound] = found.get(bound, 0.0) + value
    return found


def _worker(worker: Mapping[str, Any], before: Reading, now: Reading, seconds: float) -> WorkerLine:
    name, pages = worker["incarnation"], worker["total_pages"]
    own, earlier = now.workers.get(name), before.workers.get(name)
    cached = tokens = None
    if own is not None:
        cached = total(own, "tandem_worker_pages", state="cached") / max(pages, 1)
        if earlier is not None:
            steps = "tandem_worker_step_tokens_total"
            tokens = max(0.0, total(own, steps) - total(earlier, steps)) / seconds
    return WorkerLine(
        incarnation=name,
        address=worker["address"],
        role=worker["role"],
        state=worker["state"],
        running=worker["running"],
        waiting=worker["waiting"],
        queued_tokens=worker["queued_tokens"],
        pages=pages,
        used_share=(pages - worker["free_pages"]) / max(pages, 1),
        cached_share=cached,
        tokens_per_s=tokens,
    )


def _pairs(before: Reading, now: Reading, seconds: float) -> tuple[PairLine, ...]:
    addresses = {each["incarnation"]: each["address"] for each in now.fleet["workers"]}
    earlier = {_pair(each): each["bytes"] for each in before.fleet["pairs"]}
    lines = []
    for each in now.fleet["pairs"]:
        sender, receiver, transport = _pair(each)
        lines.append(
            PairLine(
                sender=addresses.get(sender, f"{sender[:SHORT_ID]} (gone)"),
                receiver=addresses.get(receiver, f"{receiver[:SHORT_ID]} (gone)"),
                transport=transport,
                mib=each["bytes"] / MIB,
                mib_per_s=max(0, each["bytes"] - earlier.get(_pair(each), 0)) / MIB / seconds,
                tickets=each["tickets"],
                failures=each["failures"],
            )
        )
    return tuple(sorted(lines, key=lambda line: -line.mib))


def _pair(each: Mapping[str, Any]) -> tuple[str, str, str]:
    return each["sender"], each["receiver"], each["transport"]
