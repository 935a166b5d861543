"""What `tandem doctor` found: groups of checks, each with a fix unless it is fine; as a tree of lines, or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum

from rich.console import Console
from rich.text import Text


class State(Enum):
    """How a check went."""

    OK = "ok"
    WARNING = "warning"
    """It works, but not as well as it could."""
    ERROR = "error"
    """Something cannot work."""


STYLES = {State.OK: "green", State.WARNING: "yellow", State.ERROR: "bold red"}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    found: str
    state: State = State.OK
    fix: str = ""
    """What to do; there is one exactly where the state is not ok."""

    def __post_init__(self) -> None:
        assert bool(self.fix) is (self.state is not State.OK), f"{self.name}: a fix, and a state that needs one"


def ok_or(found: str, name: str, fine: bool, fix: str, otherwise: State = State.WARNING) -> Check:
    """A check that is ok where `fine`, and else needs `fix`."""
    return Check(name, found) if fine else Check(name, found, otherwise, fix)


@dataclass(frozen=True, slots=True)
class Group:
    """Checks of one kind."""

    name: str
    checks: Sequence[Check]


def failed(groups: Sequence[Group]) -> bool:
    """Whether there is an error."""
    return any(check.state is State.ERROR for group in groups for check in group.checks)


def as_json(groups: Sequence[Group]) -> dict[str, object]:
    """The report for programs: `ok` is false exactly where the exit code is 1."""
    listed = [
        {"name": group.name, "checks": [asdict(check) | {"state": check.state.value} for check in group.checks]}
        for group in groups
    ]
    return {"ok": not failed(groups), "groups": listed}


def show(title: str, groups: Sequence[Group], console: Console) -> None:
    """Prints the tree, and how many checks need attention. Lines are as long as they are: logs cut nothing off."""
    counts = dict.fromkeys(State, 0)
    console.print(Text(title, style="bold"))
    for number, group in enumerate(groups, start=1):
        last = number == len(groups)
        console.print(Text.assemble("└─ " if last else "├─ ", (group.name, "bold")))
        for check in group.checks:
            counts[check.state] += 1
            before = f"{'  ' if last else '│ '} "
            state = (f"{check.state.value:<8}", STYLES[check.state])
            console.print(Text.assemble(before, state, f"{check.name}: {check.found}"))
            if check.fix:
                console.print(Text(f"{before}{'':8}fix: {check.fix}", style="italic"))
    console.print(", ".join(f"{count} {state.value}" for state, count in counts.items()), highlight=False)
