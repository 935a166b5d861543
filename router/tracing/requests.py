"""One trace of each request: measured where metrics and stories are, made into spans when the request ends.

The root span is the HTTP request. Below it, once for each prompt: `queue`, then for each plan `plan` and `attempt`.
A decode worker's spans belong to the attempt that it was asked in.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from router.explain.recorder import Recorder
from router.explain.story import Attempt, Story
from router.metrics import RequestTimer, RouterMetrics
from router.requests.job import Job
from router.requests.openai import GenerationBody
from router.tracing.attributes import attempt_attributes, input_messages, plan_attributes, request_attributes
from tandem.cluster import Incarnation, Plan
from tandem.obs import tell_trace
from tandem.tracing.otel import Carried, Event, Span, SpanKind, Tracer, trace_id
from tandem.types import GenerateRequest

FIRST_TOKEN = "first token"  # noqa: S105 - the name of an event


class RequestTraces:
    """The requests that are traced and have not ended. Everything runs on the event loop."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.open: dict[str, TracedTimer] = {}
        """By the id of each of their prompts."""

    def start(self, metrics: RouterMetrics, endpoint: str, request: Request) -> RequestTimer:
        """The timer of a request that has just come; one that is not sampled costs nothing from here on."""
        headers, now = request.headers, time.monotonic()
        caller = headers.get("traceparent", ""), headers.get("tracestate", "")
        span = self.tracer.begin(endpoint, now, caller, kind=SpanKind.SERVER)
        if not span.is_recording():
            return metrics.start(endpoint)
        tell_trace(trace_id(span))
        return TracedTimer(self, metrics, endpoint, request, span, now)

    def recorder(self, *bounds: Any) -> Recorder:
        """Remembers requests as `Recorder` does, and lets their timers know of them."""
        return _TracedRecorder(self, *bounds)

    def close(self) -> None:
        """Sends what there is, for two seconds at most. Blocks."""
        self.tracer.close()


class TracedTimer(RequestTimer):
    """Times one request, and makes its spans when it ends."""

    def __init__(
        self,
        traces: RequestTraces,
        metrics: RouterMetrics,
        endpoint: str,
        request: Request,
        span: Span,
        now: float,
    ) -> None:
        """now: seconds, monotonic."""
        super().__init__(metrics, endpoint)
        self._traces = traces
        self._tracer = traces.tracer
        self._operation = endpoint
        self._name = str(request.state.request_id)
        self._path = request.url.path
        self._span = span
        self._began = now
        self._read: float | None = None
        self._tokenised: float | None = None
        self._job: Job | None = None
        self._prompt: str | None = None
        self._stories: list[Story] = []
        self._attempts: list[tuple[Story, Attempt, Span]] = []

    def received(self) -> None:
        """See `RequestTimer`."""
        self._read = time.monotonic()

    def tokenised(self, job: Job, body: GenerationBody) -> None:
        """See `RequestTimer`."""
        self._tokenised, self._job = time.monotonic(), job
        if self._tracer.prompts:
            self._prompt = input_messages(body)
        for request in job.requests:
            self._traces.open[request.request_id] = self

    def begun(self, story: Story) -> None:
        """The dispatcher has one of its prompts."""
        self._stories.append(story)

    def planned(self, story: Story) -> Carried:
        """It is about to be sent to a worker; what that worker's spans belong to."""
        attempt = story.attempts[-1]
        at = story.started_s + attempt.at_s
        span = self._tracer.begin("attempt", at, self._span, kind=SpanKind.CLIENT)
        self._attempts.append((story, attempt, span))
        return self._tracer.carried(span)

    def end(self, outcome: str, failure: str | None = None) -> None:
        """See `RequestTimer`."""
        super().end(outcome, failure)
        now = time.monotonic()
        for request in self._job.requests if self._job is not None else ():
            self._traces.open.pop(request.request_id, None)
        read = now if self._read is None else self._read
        self._tracer.add("receive", (self._began, read), self._span)
        if self._tokenised is not None and self._job is not None:
            prompts = self._job.prompts
            counts = {
                "tandem.prompt_tokens": sum(len(prompt.ids) for prompt in prompts),
                "tandem.spliced_tokens": sum(prompt.reused for prompt in prompts),
            }
            self._tracer.add("tokenise", (read, self._tokenised), self._span, counts)
        for story in self._stories:
            self._queue(story, now)
        events = [event for story in self._stories for event in self._tried(story, now)]
        self._span.update_name(f"{self._operation} {self._job.served_name}" if self._job else self._operation)
        said = request_attributes(self._operation, self._name, self._path, self._began, self._job, self._stories)
        said |= {"gen_ai.input.messages": self._prompt, "tandem.outcome": outcome}
        reason = None
        if outcome != "ok":
            told = next((story.error for story in self._stories if story.error), "")
            reason = f"{outcome}: {told}" if told else outcome
            said["error.type"] = failure or outcome
        self._tracer.end(self._span, now, said, events, reason)

    def _queue(self, story: Story, now: float) -> None:
        """From the prompt's tokens to its turn."""
        begin = story.started_s if self._tokenised is None else self._tokenised
        entered = story.admitted_s
        end = entered if entered is not None else story.ended_s or now
        named = {"tandem.request_id": story.request_id}
        self._tracer.add("queue", (begin, end), self._span, named, failure=story.error if entered is None else None)

    def _tried(self, story: Story, now: float) -> list[Event]:
        """Makes the spans of a prompt's plans; returns what the request's own span is to tell of them."""
        events: list[Event] = []
        before = story.started_s if story.admitted_s is None else story.admitted_s
        mine = [(attempt, span) for owner, attempt, span in self._attempts if owner is story]
        for number, (attempt, span) in enumerate(mine):
            planned = story.started_s + attempt.at_s
            ended = attempt.ended_s or story.ended_s or now
            self._tracer.add("plan", (before, planned), self._span, plan_attributes(story, attempt))
            last = number + 1 == len(mine)
            failure = attempt.refusal or (story.error if last else "") or None
            taken = attempt.taken_s
            refused = failure if taken is None else None
            self._tracer.add("submit", (planned, ended if taken is None else taken), span, failure=refused)
            happened = _first_token(story, planned, ended)
            self._tracer.end(span, ended, attempt_attributes(story, attempt, number, last), happened, failure)
            events += happened
            if not last:
                why = {"tandem.worker.decode": attempt.plan.decode, "tandem.reason": attempt.refusal}
                events.append(Event("refused" if taken is None else "moved", ended, why))
            before = ended
        return events


def _first_token(story: Story, begin: float, end: float) -> list[Event]:
    at = story.first_token_s
    return [Event(FIRST_TOKEN, at)] if at is not None and begin <= at <= end else []


class _TracedRecorder(Recorder):
    """Tells the timers of traced requests what becomes of them."""

    def __init__(self, traces: RequestTraces, *bounds: Any) -> None:
        super().__init__(*bounds)
        self._traces = traces

    def begin(self, request: GenerateRequest) -> Story:
        """See `Recorder`."""
        story = super().begin(request)
        if (timer := self._traces.open.get(request.request_id)) is not None:
            timer.begun(story)
        return story

    def planned(self, story: Story, plan: Plan, matches: Mapping[Incarnation, int]) -> None:
        """See `Recorder`."""
        super().planned(story, plan, matches)
        timer = self._traces.open.get(story.request_id)
        story.trace = None if timer is None else timer.planned(story)
