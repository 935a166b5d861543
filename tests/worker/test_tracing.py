"""What a worker remembers for traces, and the spans of a hand-over at its sender."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tandem.engine.output import Progress, StepOutput
from tandem.engine.sequence import Seq
from tandem.testing.otlp import Collector, collector
from tandem.tracing.otel import Tracer
from tandem.types import SamplingParams
from tandem.worker.tracing import MAX_CHUNKS, Chunk, StepLog, WorkerTraces

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def received() -> Iterator[Collector]:
    with collector() as made:
        yield made


def step(name: str, began: float, ended: float, computed: int) -> StepOutput:
    seq = Seq(name, [1, 2, 3], 3, SamplingParams(), b"", frozenset())
    return StepOutput((), (Progress(seq, computed),), (), computed, 0.0, 0.0, 0.0, began=began, ended=ended)


def test_steps_are_remembered_of_those_that_are_followed() -> None:
    log = StepLog()
    log.on_step(step("a", 0.0, 1.0, 1))
    log.follow("a")
    log.on_step(step("a", 1.0, 2.0, 2))
    log.on_step(step("b", 2.0, 3.0, 2))
    log.on_step(step("a", 3.0, 4.0, 3))
    assert log.take("a") == [Chunk(1.0, 2.0, 2), Chunk(3.0, 4.0, 3)]
    assert (log.take("a"), log.take("b"), len(log)) == ([], [], 0)


def test_steps_are_bounded() -> None:
    log = StepLog()
    log.follow("a")
    for n in range(MAX_CHUNKS + 9):
        log.on_step(step("a", float(n), n + 0.5, n))
    chunks = log.take("a")
    assert len(chunks) == MAX_CHUNKS
    assert chunks[-1] == Chunk(MAX_CHUNKS - 1.0, MAX_CHUNKS + 8.5, MAX_CHUNKS + 8)


async def test_a_ticket_is_a_queue_chunks_and_a_transfer(received: Collector) -> None:
    now = 100.0
    traces = WorkerTraces(Tracer(received.url, 0.0, "tandem-prefill", "i"), "prefill", lambda: now)
    ticket = traces.watch("t", f"00-{TRACE}-{SPAN}-01", "")
    now = 100.5
    ticket.accepted(5)
    traces.steps.on_step(step("t", 101.0, 102.0, 8))
    traces.steps.on_step(step("t", 102.5, 103.0, 9))
    now = 103.25
    ticket.wrote(0.25, 100)
    now = 104.0
    ticket.wrote(0.5, 10)
    now = 104.5
    ticket.ended("")
    failed = traces.watch("u", f"00-{TRACE}-{SPAN}-01", "")
    failed.ended("the way is broken")
    traces.close()
    assert len(traces.steps) == 0
    top, bad = [span for span in received.spans if span.name == "prefill worker"]
    assert (top.trace_id, top.parent_id, top.failed, top.kind) == (TRACE, SPAN, False, 2)
    assert top.attributes["tandem.cached_tokens"] == 5
    below = {span.name: span for span in received.spans if span.parent_id == top.span_id}
    assert sorted(below) == ["prefill", "queue", "transfer"]
    assert top.seconds == pytest.approx(4.5, abs=1e-5)
    assert below["queue"].seconds == pytest.approx(1.0, abs=1e-5)
    assert below["prefill"].seconds == pytest.approx(2.0, abs=1e-5)
    assert below["transfer"].seconds == pytest.approx(1.0, abs=1e-5)
    assert below["transfer"].attributes == {
        "tandem.moved_bytes": 110,
        "tandem.kv_spans": 2,
        "tandem.writing_ms": 750.0,
    }
    chunks = [span for span in received.spans if span.parent_id == below["prefill"].span_id]
    assert [span.attributes["tandem.computed_tokens"] for span in chunks] == [8, 9]
    assert (bad.failed, bad.failure) == (True, "the way is broken")
