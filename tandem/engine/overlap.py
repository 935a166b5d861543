"""Steps in flight: what the device was told to do and the engine has not taken in yet.

With overlap a step is launched before the one in front of it is committed, so that a GPU never waits for Python (SGLang
calls it the overlap scheduler; NanoFlow, Zhu et al. 2024, arXiv:2408.12757, is where that is from). Where a sequence's
next input is the token that the step in flight samples, the token goes from there to its place on the device: a future
token. What is known without its value goes on as ever: positions, pages, noise, `min_tokens`, and whether it is the
last for `max_tokens`.

A sequence that ends with the step in flight, or is cancelled meanwhile, may have a row in the step behind it. That row
is dropped, and the sequence keeps its pages until then: the device writes to one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tandem.engine.scheduler import Plan
from tandem.engine.sequence import Batch, Row, Seq, SeqState


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched."""

    plan: Plan
    batch: Batch
    handle: Any
    """What the runner made of it; None for a step without rows."""
    started: float
    """When it was scheduled, seconds of the engine's clock."""
    schedule_s: float
    launch_s: float

    @property
    def idle(self) -> bool:
        """Whether nothing was launched and nothing is to be reported."""
        return not (self.batch.rows or self.plan.cached)

    def lift(self) -> None:
        """The step is launched: its sequences are on their way."""
        for row in self.batch.rows:
            row.seq.flying = row

    def land(self, row: Row) -> bool:
        """One of its rows is done; False where its sequence ended before, and the row is to be dropped."""
        if row.seq.flying is row:
            row.seq.flying = None
        return row.seq.state is not SeqState.FINISHED


def leads_on(flight: Flight) -> bool:
    """Whether a step can be launched behind this one before it is committed."""
    return bool(flight.batch.rows) and not any(_holds_up(row) for row in flight.batch.rows)


def _holds_up(row: Row) -> bool:
    """Whether what a row yields is needed on the host before its sequence can go on.

    So it is with a grammar, whose next mask depends on the token, and which may add others (jump-forward); and with
    penalties, which count tokens. (So it would be with drafts, but an engine that drafts does not overlap at all.)
    """
    seq = row.seq
    if seq.state is SeqState.FINISHED or not row.samples or not seq.future:
        return False
    return seq.constraint is not None or seq.sampling.penalised


def ended(flight: Flight | None) -> list[Seq]:
    """Sequences that have ended and keep their pages for a step in flight."""
    rows = () if flight is None else flight.batch.rows
    return [row.seq for row in rows if row.seq.state is SeqState.FINISHED]
