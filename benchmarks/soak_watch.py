"""What a soak's processes hold while they live: memory, descriptors, threads; and how fast that grows.

A slope is Theil and Sen's, the median over all pairs of points: a spike, or a step while a cache fills, moves it
little. Its interval is Sen's (1968), from Kendall's statistic; points are medians of half minutes, because samples
that follow each other closely are not independent.

What noise hides is not flat: a process is flat when the upper ends of its intervals are at most `FLAT_MIB_MIN`, it
grows when a lower end is above, and between the two neither is shown.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import psutil

from tandem.testing.cluster import Process

SAMPLE_S = 5.0
POINT_S = 30.0
MIB = 1 << 20
LEAST_POINTS = 5
"""With fewer, not even the least and the largest of all pairs' slopes hold the true one with 95 %."""
FLAT_MIB_MIN = 0.1
FLAT, GROWS, NOT_SHOWN, NOT_JUDGED = "flat", "grows", "not shown", "not judged"


@dataclass(frozen=True)
class Sample:
    """One look at a process."""

    at_s: float
    """Since the soak began."""
    figures: Mapping[str, float]
    """rss, pss and anonymous memory in MiB; descriptors; threads."""


Life = tuple[str, int]
"""Name and pid."""


@dataclass(frozen=True)
class Slope:
    """Growth a minute, with the interval that holds it with 95 %."""

    low: float
    slope: float
    high: float

    def __str__(self) -> str:
        return f"{self.slope:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def theil_sen(points: Sequence[tuple[float, float]], confidence: float = 0.95) -> Slope:
    """The median of all pairs' slopes, and its interval. Raises ValueError with fewer than `LEAST_POINTS`."""
    count = len(points)
    if count < LEAST_POINTS:
        raise ValueError(f"{count} points have no slope with an interval")
    slopes = sorted((b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2))
    deviation = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    width = statistics.NormalDist().inv_cdf((1 + confidence) / 2) * deviation
    # Sen's limits are the M1-th and the (M2 + 1)-th slope, counted from one; broken ranks are rounded outward.
    low = max(0, math.floor((len(slopes) - width) / 2) - 1)
    high = min(len(slopes) - 1, math.ceil((len(slopes) + width) / 2))
    return Slope(slopes[low], statistics.median(slopes), slopes[high])


def verdict(slopes: Sequence[Slope | None]) -> str:
    """What a process's slopes of memory show: `FLAT`, `GROWS`, `NOT_SHOWN`, or `NOT_JUDGED` where one has none."""
    found = [each for each in slopes if each is not None]
    if any(each.low > FLAT_MIB_MIN for each in found):
        return GROWS
    if not found or len(found) < len(slopes):
        return NOT_JUDGED
    return FLAT if all(each.high <= FLAT_MIB_MIN for each in found) else NOT_SHOWN


def look(pid: int) -> dict[str, float] | None:
    """A process's figures; None for one that has ended."""
    try:
        process = psutil.Process(pid)
        status = Path(f"/proc/{pid}/status").read_text()
        anonymous = sum(int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "RssShm")))
        memory = process.memory_full_info()
        if not memory.rss:
            return None
        return {
            "rss": memory.rss / MIB,
            "pss": memory.pss / MIB,
            "own": anonymous / 1024,
            "descriptors": process.num_fds(),
            "threads": process.num_threads(),
        }
    except (psutil.Error, OSError):
        return None


@dataclass
class Watch:
    """Samples of every life of every process."""

    processes: Sequence[Process]
    begun: float = field(default_factory=time.monotonic)
    lives: dict[Life, list[Sample]] = field(default_factory=lambda: defaultdict(list))

    async def run(self) -> None:
        """Looks until it is cancelled."""
        while True:
            for process in self.processes:
                if process.popen is not None and process.popen.poll() is None:
                    figures = await asyncio.to_thread(look, process.popen.pid)
                    if figures is not None:
                        at_s = time.monotonic() - self.begun
                        self.lives[process.name, process.popen.pid].append(Sample(at_s, figures))
            await asyncio.sleep(SAMPLE_S)

    def longest(self) -> dict[str, list[Sample]]:
        """Each process's longest life."""
        found: dict[str, list[Sample]] = {}
        for (name, _), life in self.lives.items():
            if name not in found or _length(life) > _length(found[name]):
                found[name] = life
        return found


def _length(life: Sequence[Sample]) -> float:
    return life[-1].at_s - life[0].at_s


def after(life: Sequence[Sample], warm_s: float) -> list[Sample]:
    """A life without its beginning."""
    return [sample for sample in life if sample.at_s - life[0].at_s >= warm_s]


def slope(life: Sequence[Sample], figure: str) -> Slope | None:
    """Growth of a figure a minute; None for a life too short for `LEAST_POINTS`."""
    groups: dict[int, list[Sample]] = defaultdict(list)
    for sample in life:
        groups[int(sample.at_s // POINT_S)].append(sample)
    points = [
        (statistics.median(s.at_s for s in group) / 60, statistics.median(s.figures[figure] for s in group))
        for group in groups.values()
    ]
    return theil_sen(points) if len(points) >= LEAST_POINTS else None
