"""What the abort storm says when something stays held."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks import abort_storm
from benchmarks.abort_storm import KINDS, Storm, until_free
from tandem.testing.cluster import Cluster, Process


class Holding(Cluster):
    """A cluster of which a router says that some requests run."""

    def __init__(self, reads: int) -> None:
        """reads: after so many of the metrics, none does."""
        super().__init__(Process("router", [], 9, Path("log")))
        self.reads = reads

    def metric(self, name: str) -> float:
        """See `Cluster`."""
        self.reads -= 1
        return float(self.reads >= 0)


async def test_what_is_still_held_has_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 <= await until_free(Holding(reads=2)) < math.inf
    monkeypatch.setattr(abort_storm, "HELD_S", 0.0)
    assert await until_free(Holding(reads=1000)) == math.inf


@pytest.mark.parametrize("held", [False, True])
def test_it_fails_when_something_stays_held(
    held: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def play(*_: object) -> tuple[list[abort_storm.Asked], int]:
        return [abort_storm.Asked(True, 0.1, 0.5)], 0

    async def pinned(*_: object) -> float:
        return math.inf if held else 0.1

    async def free(_: object) -> float:
        return math.inf if held else 0.0

    monkeypatch.setattr(abort_storm, "play_round", play)
    monkeypatch.setattr(abort_storm, "pinned", pinned)
    monkeypatch.setattr(abort_storm, "until_free", free)
    monkeypatch.setattr(abort_storm, "make_checkpoint", lambda *_: Path())
    monkeypatch.setattr(abort_storm, "cluster", lambda *_: nullcontext(Holding(reads=0)))
    monkeypatch.setattr("sys.argv", ["abort_storm", "--rounds", "1"])
    assert abort_storm.main() == int(held)
    told = capsys.readouterr().out
    assert (f"still held after 30 s: {len(KINDS) + 1} times" in told) == held
    assert ("longest inf s" in told) == held


def test_a_storm_that_held_nothing_does_not_speak_of_it() -> None:
    storm = Storm({kind: [1.0] for kind in KINDS}, {kind: [0.1] for kind in KINDS}, 3, [0.2])
    assert "still held" not in storm.text()
