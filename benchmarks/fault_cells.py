"""The matrix of `benchmarks/faults.py`: what is played, what came of it, and the page that says so."""

from __future__ import annotations

import datetime as dt
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

ROLES = ("prefill", "decode")
FAULTS = ("SIGKILL", "SIGSTOP", "SIGTERM", "restart", "partition", "slow link")
PHASES = ("idle", "mid-prefill", "mid-transfer", "mid-decode")
ROUTER_FAULTS = ("SIGKILL", "SIGTERM", "restart")
STREAMS = 6
PROMPT_TOKENS = 700
OUTPUT_TOKENS = 300
STOPPED_S = 20.0
NETWORK_S = 5.0
"""How long a pair is cut or a link is slow."""
REPLACED_S = 1.0
"""Seconds until a supervisor starts what was killed; none for a restart on the same address."""
TARGET_S = 5.0
LOST = "lost: "
"""How a stream's problem begins that no client could notice, or that has no end."""


@dataclass(frozen=True)
class Cell:
    """One fault of one role in one phase."""

    role: str
    fault: str
    phase: str

    @property
    def victim(self) -> str:
        """The process that is struck."""
        return "router" if self.role == "router" else f"{self.role}-0"

    @property
    def network(self) -> bool:
        """Whether links are struck, and no process."""
        return self.fault in ("partition", "slow link")

    def __str__(self) -> str:
        return f"{self.role}, {self.fault}, {self.phase}"


@dataclass(frozen=True)
class Stream:
    """What a client got: a text, or a problem."""

    text: str = ""
    problem: str = ""

    def beside(self, right: Stream) -> str:
        """What is wrong with it, `right` being the answer without a fault; empty for nothing."""
        if not self.problem and not right.problem and self.text != right.text:
            return LOST + "another text than without a fault"
        return self.problem


@dataclass
class Outcome:
    """What came of a cell."""

    cell: Cell
    skipped: str = ""
    reached: bool = False
    """Whether the fault met the victim in the cell's phase."""
    answered: int = 0
    errors: list[str] = field(default_factory=list)
    """What clients were told, or what happened to them."""
    lost: int = 0
    """Streams without an end, or with a clean end too early, or with another text."""
    besides: list[str] = field(default_factory=list)
    """What went wrong without a fault: with the same prompts before it, or afterwards."""
    service_s: float = 0.0
    """From the replacement's first answer, or the end of the fault, until all workers serve again."""
    leaked: list[str] = field(default_factory=list)

    @property
    def leaked_bytes(self) -> int:
        """Bytes that leaks name, one for each that names none."""
        return sum(int(found[1]) if (found := re.search(r"(\d+) bytes", line)) else 1 for line in self.leaked)

    @property
    def missed(self) -> bool:
        """Whether the cell misses a target, or does not show what it should."""
        told = self.cell.role != "router" and self.errors
        return bool(self.lost or self.leaked or self.besides or told or not self.reached or self.service_s > TARGET_S)

    def judge(self, before: Iterable[Stream], during: Iterable[Stream], after: Iterable[Stream]) -> None:
        """Takes the answers to the same prompts: without a fault under another salt, with it, and when it was over.

        Whoever answers afterwards may use what the fault left in the caches, and the first ones may not.
        """
        for right, struck, later in zip(before, during, after, strict=True):
            told, then = struck.beside(right), later.beside(right)
            self.lost += told.startswith(LOST) + then.startswith(LOST)
            self.answered += not told
            self.errors += [told] * bool(told)
            self.besides += [f"before: {right.problem}"] * bool(right.problem) + [f"afterwards: {then}"] * bool(then)

    def join(self, other: Outcome) -> None:
        """Takes what came of the same cell played once more."""
        self.reached |= other.reached
        self.answered += other.answered
        self.errors += other.errors
        self.lost += other.lost
        self.besides += other.besides
        self.service_s = max(self.service_s, other.service_s)
        self.leaked += other.leaked


def cells() -> list[Cell]:
    """The matrix."""
    made = [Cell(role, fault, phase) for role in ROLES for fault in FAULTS for phase in PHASES]
    return made + [Cell("router", fault, "mid-decode") for fault in ROUTER_FAULTS]


def row(outcome: Outcome) -> str:
    """A line of the table."""
    cell = outcome.cell
    head = f"| {cell.role} | {cell.fault} | {cell.phase} "
    if outcome.skipped:
        return head + f"| not run: {outcome.skipped} | | | |"
    told = "; ".join(sorted({error[:80].replace("|", "/") for error in (*outcome.errors, *outcome.besides)})) or "none"
    head += "" if outcome.reached else "(not met) "
    figures = f"{outcome.lost} | {outcome.service_s:.1f} | {outcome.leaked_bytes} |"
    return head + f"| {len(outcome.errors)} of {len(outcome.errors) + outcome.answered} ({told}) | {figures}"


def page(outcomes: Sequence[Outcome]) -> str:
    """`docs/faults.md`."""
    played = [outcome for outcome in outcomes if not outcome.skipped]
    missed = [str(outcome.cell) for outcome in played if outcome.missed]
    today = dt.datetime.now(dt.UTC).date().isoformat()
    return "\n".join(
        (
            "# What faults cost",
            "",
            "Generated by `make faults` (`benchmarks/faults.py`); do not edit. Real processes, real gRPC and NIXL "
            "over TCP: a router, two prefill and two decode workers, each in a network namespace of its own. In each "
            f"cell {STREAMS} streams of {PROMPT_TOKENS} prompt and {OUTPUT_TOKENS} output tokens run. SIGSTOP lasts "
            "20 s, a cut or a slow link 5 s; what was killed is started again after 1 s, a restart follows at once on "
            "the same address.",
            "",
            "*Phase*, as the struck worker itself told right before: mid-prefill: of one of its hand-overs at most a "
            "third was computed (decode: had landed); mid-transfer: some of it was sent (had landed), but not all; "
            "mid-decode: all streams had begun, and on a decode worker some were running (a killed router: some were "
            "cut); idle: the streams begin right after the fault. A partition cuts a pair that had moved KV, in the "
            "middle phases one with a hand-over open between the two. A cell that was not met is played again, up to "
            "three times.",
            "",
            "*Errors*: streams whose client was told of an error. *Lost*: streams without an end, with a clean end too "
            "early, or with another text than the same prompt had before, without a fault and from no cache; the "
            "same prompts are asked once more when all is over, with whatever the fault left in the caches. "
            "*Service*: seconds from the replacement's first answer, or the end of the fault, until the router serves "
            "with every worker. *Leaked*: bytes held when all was over.",
            "",
            f"{today}, {platform.machine()}, Python {platform.python_version()}: "
            f"{len(played)} of {len(outcomes)} cells played; targets missed in: {', '.join(missed) or 'none'}.",
            "",
            "| role | fault | phase | errors | lost | service, s | leaked, bytes |",
            "|---|---|---|---|---|---|---|",
            *map(row, outcomes),
            "",
        )
    )
