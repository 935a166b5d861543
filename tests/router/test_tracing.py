"""The router's spans: a real router over scripted workers, and a real receiver of what it traces."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.control import ControlPlane
from router.http.api import Api
from router.http.app import create_app
from router.metrics import RouterMetrics
from router.requests.defaults import GenerationDefaults
from router.requests.openai import ChatBody, CompletionBody
from router.tracing.attributes import MAX_TEXT, MAX_TEXTS, input_messages
from tandem.cluster import Role
from tandem.config import RouterConfig
from tandem.errors import Overloaded
from tandem.testing.otlp import Collector, ReceivedSpan, collector
from tandem.testing.tokenizer import byte_level_tokenizer
from tandem.testing.workers import FakeWorker, answer
from tandem.text.prompt import PromptTokenizer
from tandem.text.tokenizer import Tokenizer
from tandem.types import FinishReason, ModelInfo, Usage

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BODY = {"model": "fake", "prompt": [5, 6, 7, 8], "max_tokens": 4}
ROUTER_CHAIN = ["receive", "tokenise", "queue", "plan", "attempt"]


class _Text:
    """A `TextSource`."""

    def __init__(self) -> None:
        self._text = PromptTokenizer(Tokenizer(byte_level_tokenizer()))

    async def get(self, model: ModelInfo) -> PromptTokenizer:
        return self._text

    async def defaults(self, model: ModelInfo) -> GenerationDefaults:
        return GenerationDefaults()


@dataclass
class Front:
    control: ControlPlane
    workers: list[FakeWorker]
    client: httpx.AsyncClient
    received: Collector

    async def taken(self, but: Sequence[FakeWorker] = ()) -> FakeWorker:
        """The worker that has a submission."""
        while True:
            for worker in self.workers:
                if worker.submissions and worker not in but:
                    return worker
            await asyncio.sleep(0.005)

    async def spans(self, roots: int = 1) -> list[ReceivedSpan]:
        """All that came, once so many requests have ended."""
        return await asyncio.to_thread(self.received.wait, lambda spans: sum(span.kind == 2 for span in spans) == roots)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")


@pytest.fixture
def received() -> Iterator[Collector]:
    with collector() as made:
        yield made


@asynccontextmanager
async def front(received: Collector, workers: int = 1, traced: bool = True, **settings: Any) -> AsyncIterator[Front]:
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(FakeWorker(Role.DECODE)) for _ in range(workers)]
        addresses = tuple(worker.info.address for worker in made)
        endpoint = received.url if traced else ""
        config = RouterConfig(control_port=0, lease_s=5.0, workers=addresses, otlp_endpoint=endpoint, **settings)
        control = await stack.enter_async_context(ControlPlane(config))
        timers = control.traces.start if control.traces is not None else None
        api = Api(
            config, control.dispatcher, _Text(), RouterMetrics(), control.recorder, control.callers, timers=timers
        )
        transport = httpx.ASGITransport(create_app(config, api), raise_app_exceptions=False)
        client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://router"))
        while len(control.fleet.snapshot().decode) < workers:
            await asyncio.sleep(0.005)
        yield Front(control, made, client, received)
        assert control.traces is None or not control.traces.open, "a timer is remembered for ever"


def end(worker: FakeWorker, tokens: Sequence[int], first: int = 0, **fields: Any) -> None:
    usage = Usage(4, first + len(tokens), 3, 3)
    worker.send(answer(worker.submissions[-1], tokens, first, finish=FinishReason.LENGTH, usage=usage, **fields))


def named(spans: Sequence[ReceivedSpan], name: str) -> list[ReceivedSpan]:
    return sorted((span for span in spans if span.name == name), key=lambda span: span.began)


async def test_one_request_is_one_trace_of_a_chain_without_gaps(received: Collector) -> None:
    async with front(received) as made:
        headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1"}
        asked = asyncio.create_task(made.client.post("/v1/completions", json=BODY, headers=headers))
        worker = await made.taken()
        end(worker, [9, 10, 11, 12])
        reply = await asked
        assert reply.status_code == 200, reply.text
        spans = await made.spans()
    root = next(span for span in spans if span.kind == 2)
    assert (root.name, root.service, root.instance) == (
        "completion fake",
        "tandem-router",
        made.control.fleet.router_id,
    )
    assert (root.trace_id, root.parent_id, root.state, root.failed) == (TRACE, SPAN, "vendor=1", False)
    said = root.attributes
    assert (said["gen_ai.operation.name"], said["gen_ai.provider.name"]) == ("text_completion", "tandem")
    assert (said["gen_ai.request.model"], said["gen_ai.request.max_tokens"]) == ("fake", 4)
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (4, 4)
    assert (said["gen_ai.usage.cache_read.input_tokens"], said["gen_ai.response.finish_reasons"]) == (3, ["length"])
    assert (said["tandem.outcome"], said["tandem.request_id"]) == ("ok", reply.headers["x-request-id"])
    assert "gen_ai.input.messages" not in said, "prompts are not asked for"
    chain = [named(spans, name)[0] for name in ROUTER_CHAIN]
    assert all(span.parent_id == root.span_id for span in chain)
    assert root.began == chain[0].began
    for before, after in pairwise(chain):
        assert after.began == pytest.approx(before.ended, abs=1e-6), (before.name, after.name)
    attempt, submit = chain[-1], named(spans, "submit")[0]
    assert (submit.parent_id, attempt.attributes["tandem.worker.decode"]) == (attempt.span_id, worker.info.incarnation)
    assert attempt.attributes["tandem.route"] == reply.headers["x-tandem-route"]
    assert worker.submissions[0].request.traceparent == f"00-{TRACE}-{attempt.span_id}-01"
    assert worker.submissions[0].request.tracestate == "vendor=1"
    assert [event[0] for event in root.events] == ["first token"] == [event[0] for event in attempt.events]
    told = said["gen_ai.response.time_to_first_chunk"]
    assert root.events[0][1] - root.began == pytest.approx(told, abs=1e-5)


async def test_a_refused_plan_is_an_event_and_an_attempt_of_its_own(received: Collector) -> None:
    async with front(received, workers=2) as made:
        for worker in made.workers:
            worker.refusal = Overloaded("no room here")
        refused = await made.client.post("/v1/completions", json=BODY)
        assert refused.status_code == 429
        spans = await made.spans()
    root = next(span for span in spans if span.kind == 2)
    attempts = named(spans, "attempt")
    assert [(span.failed, span.failure) for span in attempts] == [(True, "no room here")] * 2
    assert {span.attributes["tandem.worker.decode"] for span in attempts} == {
        worker.info.incarnation for worker in made.workers
    }
    (event,) = (event for event in root.events if event[0] == "refused")
    assert event[2]["tandem.reason"] == "no room here"
    assert (root.failed, root.attributes["error.type"]) == (True, "overloaded")
    assert root.failure == "refused: no room here"
    assert [span.failed for span in named(spans, "submit")] == [True, True]


async def test_a_moved_request_shows_both_attempts(received: Collector) -> None:
    async with front(received, workers=2) as made:
        asked = asyncio.create_task(made.client.post("/v1/completions", json=BODY))
        first = await made.taken()
        first.send(answer(first.submissions[0], [9, 10]))
        while not any(story.first_token_s for story in made.control.recorder.find(_name(first), None)):
            await asyncio.sleep(0.005)
        await first.stop()
        second = await made.taken(but=[first])
        end(second, [11, 12], first=2)
        assert (await asked).status_code == 200
        spans = await made.spans()
    root = next(span for span in spans if span.kind == 2)
    one, two = named(spans, "attempt")
    assert (one.attributes["tandem.attempt"], two.attributes["tandem.attempt"]) == (0, 1)
    assert (one.failed, two.failed, root.failed) == (True, False, False)
    assert "the decode worker was lost" in one.failure
    assert [event[0] for event in root.events if event[0] == "moved"] == ["moved"]
    assert one.trace_id == two.trace_id == root.trace_id
    assert one.ended <= two.began
    parents = [worker.submissions[0].request.traceparent.split("-")[2] for worker in (first, second)]
    assert parents == [one.span_id, two.span_id]
    assert named(spans, "plan")[1].began == pytest.approx(one.ended, abs=1e-6)


def _name(worker: FakeWorker) -> str:
    return worker.submissions[0].request.request_id


async def test_a_cancelled_request_says_so(received: Collector) -> None:
    async with front(received) as made:
        asked = asyncio.create_task(made.client.post("/v1/completions", json=BODY))
        await made.taken()
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        spans = await made.spans()
    root = next(span for span in spans if span.kind == 2)
    assert (root.failed, root.failure, root.attributes["tandem.outcome"]) == (True, "cancelled", "cancelled")
    assert root.attributes["error.type"] == "cancelled"


async def test_a_failed_request_says_why(received: Collector) -> None:
    async with front(received) as made:
        asked = asyncio.create_task(made.client.post("/v1/completions", json=BODY))
        worker = await made.taken()
        worker.send(answer(worker.submissions[0], [9], finish=FinishReason.ERROR, error="the numbers are not finite"))
        assert (await asked).status_code >= 500
        spans = await made.spans()
    root, attempt = next(span for span in spans if span.kind == 2), named(spans, "attempt")[0]
    assert root.failure == "failed: the numbers are not finite"
    assert attempt.failure == "the numbers are not finite"


async def test_bodies_that_are_refused_are_traced_without_what_they_said(received: Collector) -> None:
    async with front(received) as made:
        assert (await made.client.post("/v1/completions", json={"prompt": "secret text", "n": -1})).status_code == 400
        spans = await made.spans()
    assert [span.name for span in spans if span.kind == 2] == ["completion"]
    assert "secret text" not in str(spans)


async def test_what_the_caller_does_not_sample_leaves_no_trace(received: Collector) -> None:
    async with front(received) as made:
        headers = {"traceparent": f"00-{TRACE}-{SPAN}-00"}
        asked = asyncio.create_task(made.client.post("/v1/completions", json=BODY, headers=headers))
        worker = await made.taken()
        end(worker, [9, 10, 11, 12])
        assert (await asked).status_code == 200
        assert worker.submissions[0].request.traceparent == ""
    assert received.spans == []


async def test_when_it_is_off_messages_carry_nothing(received: Collector) -> None:
    async with front(received, traced=False) as made:
        headers = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
        asked = asyncio.create_task(made.client.post("/v1/completions", json=BODY, headers=headers))
        worker = await made.taken()
        end(worker, [9, 10, 11, 12])
        assert (await asked).status_code == 200
        fields = [field.name for field, _ in worker.submissions[0].request.ListFields()]
        assert not {"traceparent", "tracestate"} & {*fields}
    assert received.requests == 0


async def test_prompts_are_there_when_they_are_asked_for(received: Collector) -> None:
    async with front(received, trace_prompts=True) as made:
        asked = asyncio.create_task(made.client.post("/v1/completions", json={**BODY, "prompt": "a question"}))
        end(await made.taken(), [9, 10, 11, 12])
        assert (await asked).status_code == 200
        spans = await made.spans()
    root = next(span for span in spans if span.kind == 2)
    assert json.loads(root.attributes["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": "a question"}]}
    ]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"prompt": [1, 2]}, None),
        ({"prompt": ["a", "b"]}, [["a"], ["b"]]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url"}]}]},
            [["hi"]],
        ),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, [[]]),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, [["x" * 16_384]]),
    ],
)
def test_prompts_in_all_their_forms(body: dict[str, Any], told: list[list[str]] | None) -> None:
    kind = ChatBody if "messages" in body else CompletionBody
    made = input_messages(kind.model_validate(body))
    assert (
        None if made is None else [[part["content"] for part in each["parts"]] for each in json.loads(made)]
    ) == told


def test_the_newest_messages_fill_the_room() -> None:
    def told(*contents: Any) -> list[int]:
        body = {"messages": [{"role": "user" * 100, "content": each} for each in contents]}
        made = input_messages(ChatBody.model_validate(body))
        assert made is not None
        assert len(made) < 4 * MAX_TEXTS
        return [sum(len(part["content"]) for part in each["parts"]) for each in json.loads(made)]

    whole = "x" * MAX_TEXT
    sizes = told(*[whole] * 60, "yy")
    assert sizes[1:] == [MAX_TEXT, 2]
    assert MAX_TEXT * 0.9 < sizes[0] < MAX_TEXT, "of the oldest that has room there is a part"
    assert told(whole, [{"type": "text", "text": ""}] * 5000) == [0], "empty texts are not free"


def test_names_are_those_of_the_conventions() -> None:
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

    import router.tracing.attributes as ours

    text = Path(ours.__file__).read_text()
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    used = {part.split('"')[0] for part in text.split('"gen_ai.')[1:]}
    assert used
    assert {"gen_ai." + name for name in used} - known == set()
