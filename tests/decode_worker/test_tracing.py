"""The spans of workers: two real ones in this process, and a real receiver of what they trace."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tandem.testing.otlp import Collector, ReceivedSpan, as_text, collector
from tandem.testing.pair import pair
from tandem.types import FinishReason, SamplingParams

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
PROMPT = tuple(range(40, 140))
GREEDY = SamplingParams(max_tokens=6, temperature=0.0)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")


@pytest.fixture
def received() -> Iterator[Collector]:
    with collector() as made:
        yield made


async def workers_spans(received: Collector, count: int) -> list[ReceivedSpan]:
    """All spans, once so many workers have told of their part."""
    return await asyncio.to_thread(received.wait, lambda spans: sum(span.kind == 2 for span in spans) >= count)


def below(spans: Sequence[ReceivedSpan], top: ReceivedSpan) -> dict[str, ReceivedSpan]:
    return {span.name: span for span in spans if span.parent_id == top.span_id}


async def test_a_hand_over_and_a_local_prompt(small_model: Path, received: Collector) -> None:
    async with pair(small_model, otlp_endpoint=received.url, max_batch_tokens=32) as workers:
        (answer,) = await workers.generate(PROMPT, GREEDY, traceparent=PARENT, tracestate="vendor=1")
        assert answer.finish is FinishReason.LENGTH
        spans = await workers_spans(received, 2)
        top = next(span for span in spans if span.name == "decode worker")
        parts = below(spans, top)
        assert sorted(parts) == ["admission", "decode", "first token", "hand-over", "waiting"], as_text(spans)
        assert (top.trace_id, top.parent_id, top.state, top.failed) == (TRACE, SPAN, "vendor=1", False)
        assert top.instance == workers.decode.info.incarnation
        assert top.attributes["gen_ai.usage.output_tokens"] == 6
        sender = below(spans, parts["hand-over"])
        assert sorted(sender) == ["landing", "prefill worker"]
        assert sender["prefill worker"].instance == workers.prefill[0].info.incarnation
        computed = below(spans, sender["prefill worker"])
        assert sorted(computed) == ["prefill", "queue", "transfer"]
        chunks = [span for span in spans if span.parent_id == computed["prefill"].span_id]
        assert [span.attributes["tandem.computed_tokens"] for span in chunks] == [32, 64, 96, 99]
        assert parts["hand-over"].attributes["tandem.moved_tokens"] == len(PROMPT) - 1
        moved = computed["transfer"].attributes["tandem.moved_bytes"]
        assert parts["hand-over"].attributes["tandem.moved_bytes"] == moved > 0
        del received.spans[:]
        await workers.generate(PROMPT[::-1], GREEDY, hand_over=False, traceparent=PARENT)
        spans = await workers_spans(received, 1)
        top = next(span for span in spans if span.name == "decode worker")
        parts = below(spans, top)
        assert sorted(parts) == ["admission", "decode", "first token", "local prefill", "waiting"], as_text(spans)
        assert parts["local prefill"].attributes["tandem.chunks"] == 4 == sum(span.name == "chunk" for span in spans)


async def test_a_hand_over_that_fails_says_who_and_why(small_model: Path, received: Collector) -> None:
    async with pair(small_model, prefill=2, otlp_endpoint=received.url) as workers:
        await workers.stop(workers.prefill[0])
        (answer,) = await workers.generate(PROMPT, GREEDY, traceparent=PARENT)
        assert answer.finish is FinishReason.LENGTH
        spans = await workers_spans(received, 2)
        hand_over = next(span for span in spans if span.name == "hand-over")
        (event,) = hand_over.events
        assert (event[0], event[2]["tandem.worker.prefill"]) == ("failed", workers.prefill[0].info.incarnation)
        assert event[2]["tandem.reason"]
        assert (hand_over.failed, hand_over.attributes["tandem.senders_tried"]) == (False, 2)
        assert hand_over.attributes["tandem.worker.prefill"] == workers.prefill[1].info.incarnation


async def test_a_cancelled_request_ends_its_spans(small_model: Path, received: Collector) -> None:
    async with pair(small_model, otlp_endpoint=received.url) as workers:
        name = await workers.submit(PROMPT, SamplingParams(max_tokens=100, ignore_eos=True), traceparent=PARENT)
        await workers.tokens(name, 1)
        assert await workers.cancel(name)
        await workers.answer(name)
        spans = await workers_spans(received, 2)
        top = next(span for span in spans if span.name == "decode worker")
        assert (top.failed, top.failure, top.attributes["gen_ai.response.finish_reasons"]) == (
            True,
            "cancelled",
            ["cancelled"],
        )


async def test_what_is_not_traced_leaves_nothing(small_model: Path, received: Collector) -> None:
    async with pair(small_model, otlp_endpoint=received.url) as workers:
        await workers.generate(PROMPT, GREEDY)
        assert len(workers.decode.services._traces.steps) == 0  # type: ignore[attr-defined]
    assert received.spans == []


async def test_a_worker_that_traces_nothing_hands_the_trace_on(small_model: Path, received: Collector) -> None:
    async with pair(small_model, otlp_endpoint=received.url, decode_settings={"otlp_endpoint": ""}) as workers:
        await workers.generate(PROMPT, GREEDY, traceparent=PARENT)
        spans = await workers_spans(received, 1)
        assert {span.service for span in spans} == {"tandem-prefill"}
        assert next(span for span in spans if span.name == "prefill worker").parent_id == SPAN
