"""One decode worker: admits requests, gets their prompts' KV, and gathers their tokens for the routers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from decode_worker.admission import Limits, check, wants_hand_over
from decode_worker.grammars import Grammars
from decode_worker.outbox import Outbox, ResumeAt
from decode_worker.prefill_client import PrefillClient
from decode_worker.requests import Choice, Request, RequestTrace, make_request
from decode_worker.tenants import TenantLedger
from kvtransfer.pairs import Target
from tandem.cluster import WorkerInfo
from tandem.config import DecodeConfig
from tandem.engine.engine import Engine
from tandem.engine.output import SeqOutput, StepOutput
from tandem.engine.sequence import SeqState
from tandem.errors import Fenced, Internal
from tandem.kv import HashRoot, block_hashes
from tandem.types import FinishReason, GenerateRequest
from tandem.worker.engine_thread import EngineThread
from tandem.worker.kv_sink import PageSink, Reservations
from tandem.worker.metrics import WorkerMetrics
from tandem.worker.publish import Publisher

log = logging.getLogger(__name__)

NO_NUMBERS = "the model's output for this request is not finite; its weights may be damaged"
DEAD_END = "no token of this model can continue a text of the grammar"


class DecodeWorker:
    """Owns every request it admits until each of its choices has ended. All methods run on the event loop."""

    def __init__(
        self,
        info: WorkerInfo,
        config: DecodeConfig,
        engine: Engine,
        thread: EngineThread,
        prefill: PrefillClient,
        metrics: WorkerMetrics,
        publisher: Publisher,
        grammars: Grammars,
    ) -> None:
        self.info = info
        self.trace: Callable[[GenerateRequest, str, float], RequestTrace] | None = None
        """Of a traced request, the sequence that leads it, and when it came; None where nothing is traced."""
        self.dispatches: dict[str, int] = {}
        self.draining = False
        self._config = config
        self._engine = engine
        self._thread = thread
        self._prefill = prefill
        self._metrics = metrics
        self._publisher = publisher
        self._grammars = grammars
        self._eos_ids = frozenset(info.model.eos_token_ids)
        self._root = HashRoot(config.cluster_key, info.model.fingerprint, info.kv_dtype)
        self._limits = Limits(info.model, engine.capacity_tokens, config.max_waiting + config.max_running)
        self._requests: dict[str, Request] = {}
        self._choices: dict[str, Choice] = {}
        self._outboxes: dict[str, Outbox] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._promises = publisher.promises
        self._reservations = Reservations(engine, thread)
        self.tenants = TenantLedger(asyncio.get_running_loop().time)
        self._loop = asyncio.get_running_loop()
        self._order = 0

    # Admission ------------------------------------------------------------------------------------------------------

    async def submit(
        self,
        request: GenerateRequest,
        router_id: str,
        dispatch: int,
        targets: Sequence[Target],
        expected_cached: int,
        planned_local: bool,
    ) -> tuple[int, str]:
        """Admits a request or raises. Returns the tokens cached here and the prefill worker asked ("" for none)."""
        received = self._loop.time()
        known = self._check(request, router_id)
        constrain = None
        if request.sampling.grammar is not None:
            constrain = await self._grammars.compile(request.sampling.grammar)
            known = self._check(request, router_id)  # much may have happened
        if known is not None:
            await self.cancel(request.request_id, known.request.attempt)
            if self._requests.get(request.request_id) is not known:
                raise Fenced(f"request {request.request_id} was submitted twice at once")
        root = replace(self._root, adapter=request.adapter, salt=request.salt).digest()
        record = make_request(request, router_id, root, self._eos_ids, self._order, self._loop.time(), constrain)
        self._order += request.choices
        if self.trace is not None and request.traceparent:
            record.spans = self.trace(request, record.lead.seq.seq_id, received)
        self._requests[request.request_id] = record
        self._choices.update((choice.seq.seq_id, choice) for choice in record.open_choices())
        self.tenants.admitted(request, router_id)
        known_tokens, cached = request.known, 0
        if request.sampling.prompt_logprobs is None:
            try:
                cached = await self._thread.call(self._engine.match_len, root, known_tokens)
            except BaseException:  # the router did not wait for the answer, or the engine has ended
                self._end(record, FinishReason.CANCELLED)
                raise
            if record.finished:
                raise Fenced(f"request {request.request_id} ended while it was being admitted")
        asked = (
            wants_hand_over(
                len(known_tokens), cached, expected_cached, planned_local, targets, self._config.local_prefill_tokens
            )
            and request.sampling.prompt_logprobs is None
        )
        # Without a cache nothing is ever stored, and no promise would be kept.
        if self._config.prefix_cache:
            self._promises.make(request.request_id, tuple(block_hashes(root, known_tokens)))
        self._publisher.poke()
        self._start(record, dispatch, targets if asked else ())
        return cached, targets[0].incarnation if asked else ""

    def _check(self, request: GenerateRequest, router_id: str) -> Request | None:
        """Raises what refuses the request now. Returns the record of an earlier attempt, if there is one."""
        known = self._requests.get(request.request_id)
        if known is not None and known.request.attempt >= request.attempt:
            raise Fenced(f"request {request.request_id} attempt {request.attempt} was submitted before")
        if router_id not in self._outboxes:
            raise Fenced("open the token stream before submitting")
        check(request, self._limits, len(self._choices), self.draining)
        return known

    def _start(self, record: Request, dispatch: int, targets: Sequence[Target]) -> None:
        request_id = record.request.request_id
        task = asyncio.create_task(self._prepare(record, dispatch, targets), name=f"prepare-{request_id}")
        self._tasks[request_id] = task

        def done(ended: asyncio.Task[None]) -> None:
            if self._tasks.get(request_id) is ended:
                del self._tasks[request_id]
            if ended.cancelled():  # here, since who cancelled it may be gone, too
                self._end(record, FinishReason.CANCELLED)
                return
            if isinstance(ended.exception(), Internal):
                return  # the engine has ended, and this process will: the router lets the request go on elsewhere
            if (error := ended.exception()) is not None:
                log.error("request %s cannot start", request_id, exc_info=error)
                self._end(record, FinishReason.ERROR, "the request could not be started")

        task.add_done_callback(done)

    async def _prepare(self, record: Request, dispatch: int, targets: Sequence[Target]) -> None:
        """Gives the leading choice its prompt's KV, or the task of computing it."""
        seq, spans, trace = record.lead.seq, record.spans, (record.request.traceparent, record.request.tracestate)
        if spans is not None:
            spans.prepared(self._loop.time())
            trace = spans.hand_over(self._loop.time()) if targets else trace
        if targets:
            seq.state = SeqState.WAITING_KV
        await self._thread.call(self._engine.add, seq)
        if (router_id := record.router_id) in self._outboxes:
            # Not before: a status that names it must include its load.
            self.dispatches[router_id] = max(dispatch, self.dispatches.get(router_id, 0))
            self._publisher.poke()
        if targets:
            sink = PageSink(seq, self._engine, self._thread, self._reservations.reserve)
            asked_at = self._loop.time()
            outcome = await self._prefill.fetch(record.request, record.request.known[:-1], targets, sink, trace)
            record.sender, record.hand_over_ms = outcome.sender, (self._loop.time() - asked_at) * 1000
            record.sender_cached = min(outcome.sender_cached, sink.landed)
            record.moved_tokens = sink.moved_tokens
            record.decode_cached = sink.cached
            if spans is not None:
                spans.landed(self._loop.time(), outcome, sink.moved_tokens)
            await self._thread.call(self._engine.landed, seq, sink.landed)
            self._reservations.changed()

    # Tokens ---------------------------------------------------------------------------------------------------------

    def on_step(self, output: StepOutput) -> None:
        """Takes over what a step produced; called on the event loop after every step."""
        now = self._loop.time()
        touched: set[str] = set()
        for made in output.outputs:
            choice = self._choices.get(made.seq.seq_id)
            if choice is None or choice.finish is not None:
                continue
            self._append(choice, made, now)
            touched.add(choice.request.router_id)
        for router_id in touched:
            if (outbox := self._outboxes.get(router_id)) is not None:
                outbox.flush()
        self._reservations.changed()

    def _append(self, choice: Choice, made: SeqOutput, now: float) -> None:
        record = choice.request
        if len(choice.tokens) == choice.resumed:
            if made.tokens and not choice.resumed:
                self._metrics.ttft.observe(now - record.admitted_at)
            choice.prompt_logprobs = tuple(choice.seq.prompt_logprobs)
            if choice is record.lead:
                record.first_token_at = now
                self._prompt_computed(record)
        elif made.tokens:
            self._metrics.inter_token.observe((now - choice.last_token_at) / len(made.tokens))
        choice.last_token_at = now
        choice.tokens.extend(made.tokens)
        self.tenants.made(record.request.tenant, record.router_id, len(made.tokens))
        self._metrics.forced_tokens.inc(made.forced)
        choice.logprobs.extend(made.logprobs)
        if made.finish is not None:
            choice.stop_token = made.stop_token
            self._close(choice, made.finish, _fault(choice) if made.finish is FinishReason.ERROR else "")
        if (outbox := self._outboxes.get(record.router_id)) is not None:
            outbox.mark(choice)

    def _prompt_computed(self, record: Request) -> None:
        """The prompt is in the cache now: the other choices find it there."""
        record.decode_cached = max(record.decode_cached, record.lead.seq.cached_tokens)
        self._metrics.prompt_tokens.inc(len(record.request.prompt))
        self._metrics.prefix_hits.labels("decode").inc(record.decode_cached)
        self._metrics.prefix_hits.labels("prefill").inc(max(record.cached_tokens - record.decode_cached, 0))
        for sibling in record.open_choices():
            if sibling is not record.lead:
                self._thread.post(self._engine.add, sibling.seq)

    # Ends -----------------------------------------------------------------------------------------------------------

    def _close(self, choice: Choice, reason: FinishReason, error: str = "") -> None:
        """Ends a choice, once; the request ends with its last one."""
        choice.finish, choice.error = reason, error
        self._choices.pop(choice.seq.seq_id, None)
        record = choice.request
        if record.finished:
            record.finished_at = self._loop.time()
            self.tenants.ended(record.request, record.router_id)
            self._promises.end(record.request.request_id)
            self._metrics.end_to_end.observe(record.finished_at - record.admitted_at)
            self._metrics.requests.labels(reason.value).inc()
            if record.spans is not None:
                record.spans.ended(record, record.finished_at)

    def _end(self, record: Request, reason: FinishReason, error: str = "", leaving: bool = False) -> bool:
        """Ends what is open of a request and tells its router. False when nothing was open.

        leaving: it could go on at another worker.
        """
        if record.finished:
            return False
        self._publisher.poke()
        outbox = self._outboxes.get(record.router_id)
        for choice in list(record.open_choices()):
            choice.leaving = leaving
            self._close(choice, reason, error)
            self._thread.post(self._engine.cancel, choice.seq.seq_id)
            if outbox is not None:
                outbox.mark(choice)
        if outbox is not None:
            outbox.flush()
        self._reservations.changed()
        return True

    async def cancel(self, request_id: str, attempt: int) -> bool:
        """Ends a request; returns when the engine has let go of it. False when it does not run here."""
        record = self._requests.get(request_id)
        if record is None or record.request.attempt > attempt or record.finished:
            return False
        task = self._tasks.get(request_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self._end(record, FinishReason.CANCELLED)
        await self._thread.call(lambda: None)
        return True

    # Routers --------------------------------------------------------------------------------------------------------

    def attach(self, router_id: str, resume: Sequence[ResumeAt]) -> tuple[Outbox, int]:
        """The router's outbox, rewound to where the router lost the stream, and a new reader: detach it at its end.

        What the router asks for and is not here is answered by an error.
        """
        outbox = self._outboxes.get(router_id)
        if outbox is None:
            outbox = self._outboxes[router_id] = Outbox(router_id, self._config.lease_s / 4)
        reader = outbox.attach()
        for point in resume:
            record = self._requests.get(point.request_id)
            if record is None or record.request.attempt != point.attempt or point.choice >= len(record.choices):
                outbox.lost(point)
                continue
            choice = record.choices[point.choice]
            choice.rewind(point.next_index)
            outbox.mark(choice)
        return outbox, reader

    async def sweep(self) -> None:
        """Forgets what ended a lease ago and cancels what a vanished router left behind; runs until cancelled."""
        lease = self._config.lease_s
        while True:
            await asyncio.sleep(lease / 4)
            now = self._loop.time()
            for outbox in list(self._outboxes.values()):
                if outbox.idle_since is not None and now - outbox.idle_since > lease:
                    await self._abandon(outbox.router_id)
            for request_id, record in list(self._requests.items()):
                if record.finished_at is not None and now - record.finished_at > lease:
                    del self._requests[request_id]

    async def _abandon(self, router_id: str) -> None:
        # First, so that nothing more is submitted. A router that comes back gets a new outbox, and hears of the end.
        del self._outboxes[router_id]
        self.dispatches.pop(router_id, None)
        self._metrics.lease_expiries.labels("router").inc()
        orphans = [r for r in self._requests.values() if r.router_id == router_id and not r.finished]
        if orphans:
            log.warning("router %s is silent for its lease: %d requests end", router_id, len(orphans))
        for record in orphans:
            await self.cancel(record.request.request_id, record.request.attempt)

    async def close(self) -> None:
        """Admits nothing more and gives every request up; routers let them go on elsewhere."""
        self.draining = True
        for record in list(self._requests.values()):
            if not record.finished:
                self._end(record, FinishReason.ERROR, "the worker is shutting down", leaving=True)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def pages_freed(self) -> None:
        """Somebody else gave pages back: a request that waits for them looks again, and routers are told soon."""
        self._reservations.changed()
        self._publisher.poke()

    @property
    def open_requests(self) -> int:
        """Requests admitted and not yet ended."""
        return sum(not record.finished for record in self._requests.values())

    @property
    def unsent(self) -> bool:
        """Whether a router that listens has not been sent everything."""
        return any(outbox.unsent for outbox in self._outboxes.values())

    @property
    def siblings_waiting(self) -> int:
        """Choices that start once their request's leading one has its prompt: the engine does not know of them."""
        leads = [choice.request.lead for choice in self._choices.values() if choice is not choice.request.lead]
        return sum(len(lead.tokens) == lead.resumed and lead.finish is None for lead in leads)

    def leaks(self) -> list[str]:
        """What is still held although nothing runs."""
        open_requests = [f"request {key} is open" for key, record in self._requests.items() if not record.finished]
        return open_requests + [f"task {name} runs" for name in self._tasks] + self._promises.leaks()


def _fault(choice: Choice) -> str:
    """Why there was nothing to sample from."""
    constraint = choice.seq.constraint
    return DEAD_END if constraint is not None and constraint.stuck else NO_NUMBERS
