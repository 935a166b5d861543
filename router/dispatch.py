"""Takes requests to the decode worker a plan names, and their tokens back to who asked. Each ends exactly once."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import grpc
import grpc.aio
from prometheus_client.core import CounterMetricFamily, Metric

from router.admission.gate import Admission
from router.admission.quota import Quotas
from router.backend import Reader
from router.cache.prefix_index import PrefixIndex
from router.cache.tails import TailMemory
from router.dispatch_cancels import Cancels
from router.dispatch_stream import WorkerStream
from router.explain.ladder import HitLadder
from router.explain.recorder import Recorder
from router.open_request import Chain, OpenRequest
from router.placement import book
from router.policies import Policy, RequestInfo
from router.policies.cost import EXPECTED_OUTPUT
from router.quarantine import Quarantine
from router.workers.fleet import Fleet
from router.workers.fleet_link import Worker
from router.workers.pairs import PairHealth, avoiding
from router.workers.snapshot import Load, WorkerView
from tandem.cluster import Candidate, Incarnation, Plan, Role, Status, WorkerInfo
from tandem.config import RouterConfig
from tandem.errors import BadRequest, ContextTooLong, Fenced, Internal, Overloaded, TandemError, Unavailable, WorkerLost
from tandem.kv import BLOCK_TOKENS, HashRoot, block_hashes
from tandem.obs import REQUESTS_MOVED_TOTAL
from tandem.types import FinishReason, GenerateRequest, ModelInfo
from tandem.wire import codec
from tandem.wire.failures import error_of_rpc, was_refused
from tandem.wire.v1 import common_pb2, decode_pb2, decode_pb2_grpc

log = logging.getLogger(__name__)

SUBMIT_S = 10.0
"""A decode worker admits or refuses well within this."""
COMPILE_S = 60.0
"""Longer where it has to compile a grammar first, or to start its compiler."""
STREAM_S = 2.0
"""A new decode worker's token stream stands within this."""
MAX_MOVES = 8
"""Times that a request may go on elsewhere, whatever for."""
MAX_CRASHES = 2
"""Workers that may die over one request before it is refused: it may be what killed them."""
CLOSE_S = 2.0
"""What workers get to hear of cancellations when the router stops; their lease ends the rest."""

MAX_TAILS = 65_536
"""Finished sequences whose last, partial block is remembered."""

Elsewhere = (Overloaded, Unavailable, Fenced, WorkerLost, Internal)
"""Refusals that another worker may not share."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the decode worker answered when it took the request."""

    cached_tokens: int
    """Prompt tokens it really had cached."""
    prefill: Incarnation | None
    """The prefill worker it asked; None: it prefills itself."""


class Accepted:
    """A request that a decode worker has taken. As a context manager it cancels on exit what has not finished."""

    def __init__(self, record: OpenRequest, plan: Plan, reply: Reply, dispatcher: Dispatcher) -> None:
        self.plan = plan
        self.reply = reply
        self._record = record
        self._dispatcher = dispatcher

    async def follow(self, reader: Reader) -> None:
        """See `router.backend.Accepted`. One reader."""
        await self._record.follow(reader)

    async def cancel(self) -> None:
        """Ends all open choices, here at once and then on the worker; idempotent."""
        await self._dispatcher.cancel(self._record)

    async def __aenter__(self) -> Accepted:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cancel()


def _cost(request: GenerateRequest, chosen: Candidate) -> int:
    """Tokens that a request is expected to take of workers: what is known of it and not cached, and its answers."""
    missing = max(len(request.known) - max(chosen.decode_cached, chosen.prefill_cached), 0)
    left = request.sampling.max_tokens - len(request.made(request.lead))
    return missing + (request.choices - len(request.ended)) * min(left, EXPECTED_OUTPUT)


def _larger_than(refusing: Incarnation, others: Sequence[WorkerView]) -> bool:
    """Whether some worker has room for more tokens than the one that refused a request as too long."""
    least = min((view.info.capacity_tokens for view in others if view.incarnation == refusing), default=0)
    return any(view.info.capacity_tokens > least and not view.draining for view in others)


def _refusal(errors: Sequence[TandemError]) -> TandemError:
    """What a client is told when nobody took its request: to come back later."""
    for kind in (Overloaded, ContextTooLong):
        for error in errors:
            if isinstance(error, kind):
                return error
    return errors[-1] if isinstance(errors[-1], Unavailable) else Unavailable(str(errors[-1]))


class Dispatcher:
    """The cluster as one endpoint: plans, submits, streams, cancels. All methods run on the event loop."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet,
        index: PrefixIndex,
        policy: Policy,
        recorder: Recorder,
        ladder: HitLadder,
        quotas: Quotas,
        clock: Callable[[], float],
    ) -> None:
        self.fleet = fleet
        self.tails = TailMemory(MAX_TAILS, clock)
        self._config = config
        self._index = index
        self._policy = policy
        self._recorder = recorder
        self._ladder = ladder
        self._clock = clock
        self._quotas = quotas
        self._pairs = PairHealth(clock)
        self._admission = Admission(config.max_inflight, config.max_queued, config.queue_s, self._room, clock)
        self._open: dict[str, OpenRequest] = {}
        self._streams: dict[Incarnation, WorkerStream] = {}
        self._cancels = Cancels(fleet)
        self._moves: set[asyncio.Task[None]] = set()
        self._quarantine = Quarantine(clock)
        self.moved = 0
        """Requests that went on at another decode worker."""
        self._ordinal = 0
        self._model: ModelInfo | None = None
        fleet.listener = self

    @property
    def model(self) -> ModelInfo | None:
        """The model served, under the name clients use; None until a decode worker is known."""
        return self._model

    @property
    def inflight(self) -> int:
        """Requests admitted and not yet ended."""
        return self._admission.inflight

    def address_of(self, incarnation: Incarnation) -> str | None:
        """host:port of a worker; None when it is gone."""
        worker = self.fleet.worker(incarnation)
        return None if worker is None else worker.info.address

    def ready(self) -> bool:
        """Whether a request could be served now."""
        return any(not view.draining for view in self.fleet.snapshot().decode)

    async def submit(self, request: GenerateRequest) -> Accepted:
        """Returns when a decode worker has taken the request.

        Raises BadRequest (and ContextTooLong), Overloaded or Unavailable; then no worker runs it.
        """
        reference = self._check(request)
        self._quarantine.check(request)
        story = self._recorder.begin(request)
        try:
            await self._admission.enter(request.request_id, request.priority, request.tenant)
        except BaseException as error:
            story.error, story.ended_s = str(error), self._clock()
            raise
        chain = self._chain(request, reference)
        record = OpenRequest(request, self._config.stream_queue, chain, story, self._clock)
        self._open[request.request_id] = record
        try:
            plan, reply = await self._place(record)
            self._admission.placed(request.request_id)
        except BaseException as error:
            record.story.error = str(error)
            self._close(record)
            raise
        return Accepted(record, plan, reply, self)

    def _room(self) -> float:
        """Requests that may be sent to decode workers before each has its backlog; without workers, waiting is vain."""
        views = [view for view in self.fleet.snapshot().decode if not view.draining]
        waiting = (max(view.sequences - view.status.running, 0) for view in views)
        return sum(max(self._config.worker_backlog - count, 0) for count in waiting) if views else math.inf

    def _check(self, request: GenerateRequest) -> WorkerInfo:
        reference = self.fleet.reference
        if reference is None:
            raise Unavailable("no worker is connected; try again later")
        vocabulary = reference.model.vocab_size
        for token in (min(request.prompt), max(request.prompt)):
            if not 0 <= token < vocabulary:
                raise BadRequest(f"prompt has token id {token}; it must be in [0, {vocabulary})", param="prompt")
        return reference

    def _chain(self, request: GenerateRequest, reference: WorkerInfo) -> Chain:
        root = HashRoot(
            cluster_key=self._config.cluster_key,
            model_fingerprint=reference.model.fingerprint,
            kv_dtype=reference.kv_dtype,
            adapter=request.adapter,
            salt=request.salt,
        ).digest()
        return Chain(root, tuple(block_hashes(root, request.prompt)))

    async def _place(self, record: OpenRequest, without: Incarnation | None = None) -> tuple[Plan, Reply]:
        """Finds a decode worker that takes the request: the plan's, then others, each planned anew.

        without: a worker not to be asked.
        """
        request = record.request
        self._ordinal += 1
        made = len(request.made(request.lead))
        info = RequestInfo(
            request.request_id,
            len(request.prompt) + made,
            request.sampling.max_tokens - made,
            request.choices - len(request.ended),
            self._ordinal,
        )
        # The prompt's log-probabilities need every position computed, and where sampling is: no cache, no hand-over.
        scores = request.sampling.prompt_logprobs is not None
        refused: dict[Incarnation, TandemError] = {}
        for _ in range(self._config.retries + 1):
            self._still_open(record)
            fleet = self.fleet.snapshot().without({*refused, *([without] if without else ())})
            if scores:
                fleet = replace(fleet, prefill=())
            if refused and all(view.draining for view in fleet.decode):
                break
            matches = {} if scores else self._matches(record)
            plan = avoiding(self._policy.plan(info, fleet, matches, self._clock()), self._pairs.broken())
            log.debug("plan of %s, cached %s: %s", request.request_id, matches, plan.candidates)
            self._recorder.planned(record.story, plan, matches)
            if record.rungs is None and self._ladder.on and not scores:
                best, capacity = max(matches.values(), default=0), fleet.capacity_tokens
                record.rungs = self._ladder.planned(record.chain.hashes, len(request.prompt), best, capacity)
            try:
                return plan, await self._submit(record, info, plan)
            except ContextTooLong as error:
                if not _larger_than(plan.decode, fleet.decode):
                    raise
                record.story.refused(error)
                refused[plan.decode] = error
                record.next_attempt()
            except Elsewhere as error:
                log.info("decode worker %s does not take %s: %s", plan.decode, request.request_id, error)
                record.story.refused(error)
                refused[plan.decode] = error
                record.losses += isinstance(error, WorkerLost)
                self._still_open(record)
                record.next_attempt()
            if record.losses >= MAX_CRASHES:
                raise WorkerLost(f"{MAX_CRASHES} decode workers were lost over this request")
        raise _refusal(list(refused.values()))

    def _matches(self, record: OpenRequest) -> dict[Incarnation, int]:
        """Tokens of prompt and output so far that each worker is believed to have cached."""
        chain, known = record.chain, record.request.known
        if len(known) > len(record.request.prompt):
            chain = Chain(chain.root, tuple(block_hashes(chain.root, known)))
        return self.tails.extend(self._index.match(chain.hashes), chain, known)

    async def _submit(self, record: OpenRequest, info: RequestInfo, plan: Plan) -> Reply:
        """One submission. Raises what the worker refused with; Unavailable when it cannot be reached."""
        worker, stream = self.fleet.worker(plan.decode), self._streams.get(plan.decode)
        if worker is None or stream is None:
            raise Unavailable(f"decode worker {plan.decode} is gone")
        await stream.ready(STREAM_S)
        self._still_open(record)
        record.decode, generation = plan.decode, stream.generation
        record.decode_booking, record.prefill_booking = book(self.fleet, info, plan.candidates[0], record.chain.hashes)
        try:
            reply = await self._call_submit(worker, self._submission(record, plan))
        except BaseException:
            self._release(record)
            raise
        record.answered = record.taken = True
        if record.gapped or stream.generation != generation:
            record.resumed = False
            stream.reopen()  # it broke meanwhile, and its resume points did not name this request yet
        record.story.taken(reply.cached_tokens, reply.prefill, self._clock())
        if plan.prefill is not None and reply.prefill != plan.prefill:
            self.fleet.release(record.prefill_booking)
        request_id = record.request.request_id
        if self._open.get(request_id) is not record:
            # It was ended here while the worker was taking it.
            self._cancels.send(worker.incarnation, request_id, record.request.attempt)
        elif record.finished:
            self._close(record)
        return reply

    def _still_open(self, record: OpenRequest) -> None:
        """Raises Unavailable for a request that ended while a worker was looked for, or before it said it took it."""
        if record.finished:
            self._close(record)
        if self._open.get(record.request.request_id) is not record:
            raise Unavailable("the request has ended")

    async def _call_submit(self, worker: Worker, message: decode_pb2.SubmitRequest) -> Reply:
        stub = decode_pb2_grpc.DecodeStub(worker.channel)
        request = message.request
        try:
            compiles = request.sampling.HasField("grammar")
            reply = await stub.Submit(message, timeout=SUBMIT_S + COMPILE_S if compiles else SUBMIT_S)
        except grpc.aio.AioRpcError as failure:
            if was_refused(failure):
                raise error_of_rpc(failure) from None
            self._cancels.send(worker.incarnation, request.request_id, request.attempt)
            if failure.code() is grpc.StatusCode.UNAVAILABLE:
                raise WorkerLost(f"decode worker {worker.incarnation} was lost") from None
            raise error_of_rpc(failure) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                # Closing a channel cancels its calls: the worker is gone, and nobody cancelled us.
                raise WorkerLost(f"decode worker {worker.incarnation} is gone") from None
            self._cancels.send(worker.incarnation, request.request_id, request.attempt)
            raise
        return Reply(reply.cached_tokens, reply.prefill or None)

    def _submission(self, record: OpenRequest, plan: Plan) -> decode_pb2.SubmitRequest:
        booking = record.decode_booking
        workers = [worker for name in plan.prefill_alternatives if (worker := self.fleet.worker(name)) is not None]
        message = codec.generate_request_to_wire(record.request)
        message.cost = _cost(record.request, plan.candidates[0])
        return decode_pb2.SubmitRequest(
            router_id=self.fleet.router_id,
            dispatch=0 if booking is None else booking.number,
            incarnation=plan.decode,
            request=message,
            prefill=[decode_pb2.PrefillTarget(incarnation=w.incarnation, address=w.info.address) for w in workers],
            expected_cached=plan.expected_cached,
            planned_local=plan.prefill is None,
        )

    # Load -----------------------------------------------------------------------------------------------------------

    def _release(self, record: OpenRequest) -> bool:
        """Ends the bookings; whether the decode worker's was open: its last status does not include the request."""
        unreported = self.fleet.release(record.decode_booking)
        self.fleet.release(record.prefill_booking)
        record.decode_booking = record.prefill_booking = None
        return unreported

    # Ends -----------------------------------------------------------------------------------------------------------

    def _close(self, record: OpenRequest) -> None:
        """Forgets a request; what it was sent stays readable."""
        unreported = self._release(record)
        request = record.request
        if self._open.get(request.request_id) is not record:
            return
        del self._open[request.request_id]
        self._admission.leave(request.request_id)
        record.story.ended_s = self._clock()
        self._climb(record)
        if record.answered and record.decode is not None and self.fleet.worker(record.decode) is not None:
            for sequence in record.sequences():
                # The last sampled token has no KV.
                self.tails.remember(record.decode, record.chain, len(request.prompt), sequence[:-1])
            if not unreported:
                self.fleet.ended(record.decode, Load(sequences=request.choices))

    def _climb(self, record: OpenRequest) -> None:
        """Puts an ended request on the hit ladder, and its answer among what could be reused."""
        usage = record.story.usage.get(0)
        if record.rungs is None or usage is None:
            return
        self._ladder.ended(record.rungs, usage.cached_tokens)
        known, chain = len(record.chain.hashes), record.chain
        for sequence in record.sequences():
            made = block_hashes(chain.root, sequence[known * BLOCK_TOKENS : -1], parent=(chain.hashes or (b"",))[-1])
            self._ladder.stored(made, self.fleet.snapshot().capacity_tokens)

    async def cancel(self, record: OpenRequest) -> None:
        """Ends a request here at once, and returns when its worker has let go of it; nothing if it has ended."""
        task = self._end(record, FinishReason.CANCELLED)
        if task is not None:
            # Unlike awaiting it: the worker hears of it even if who waits here is cancelled, and who waits here is not
            # cancelled when the worker's channel closes, which cancels its calls.
            await asyncio.wait([task])

    def _end(self, record: OpenRequest, reason: FinishReason, error: str = "") -> asyncio.Task[None] | None:
        """Ends a request that its worker still runs; None if it has ended."""
        if record.finished:
            return None
        record.end(reason, error)
        self._close(record)
        if record.decode is None:
            return None
        return self._cancels.send(record.decode, record.request.request_id, record.request.attempt)

    # What streams tell ----------------------------------------------------------------------------------------------

    def receive(self, incarnation: Incarnation, deltas: Iterable[common_pb2.Delta]) -> None:
        """New tokens of any requests of a worker; what nobody waits for is dropped, and cancelled if it goes on."""
        for message in deltas:
            record = self._open.get(message.request_id)
            if record is None or record.decode != incarnation:
                if not message.finish:
                    # The worker missed its Cancel, or it is back after it was silent and given up.
                    self._cancels.send(incarnation, message.request_id, message.attempt)
                continue
            plain = not (message.finish or message.logprobs or message.HasField("usage") or message.prompt_logprobs)
            try:
                if plain:
                    problem = record.push_tokens(message.attempt, message.choice, message.first_index, message.tokens)
                else:
                    delta = codec.delta_from_wire(message)
                    if delta.finish is FinishReason.ERROR and record.answered and self._leaving(incarnation):
                        record.push(replace(delta, finish=None, error=""))
                        self._go_on(record, delta.error, crashed=False)
                        continue
                    problem = record.push(delta)
            except ValueError as error:
                problem = f"the worker sent a malformed message: {error}"
            if problem:
                log.warning("request %s is cut: %s", message.request_id, problem)
                self._end(record, FinishReason.ERROR, problem)
            elif not plain and record.finished and record.answered:
                self._close(record)
            elif record.prefill_booking is not None and message.tokens:
                self.fleet.release(record.prefill_booking)
                record.prefill_booking = None

    def _leaving(self, incarnation: Incarnation) -> bool:
        """Whether a worker has said that it will end: what it gives up is not the request's fault."""
        return any(view.incarnation == incarnation and view.draining for view in self.fleet.snapshot().decode)

    def resume_points(self, incarnation: Incarnation) -> list[decode_pb2.ResumePoint]:
        """Where the requests that this worker has taken should go on; those not yet answered come later."""
        points = []
        for request_id, record in self._open.items():
            if record.decode == incarnation and record.answered:
                record.resumed, attempt = True, record.request.attempt
                points += [
                    decode_pb2.ResumePoint(request_id=request_id, attempt=attempt, choice=choice, next_index=index)
                    for choice, index in record.resume_points()
                ]
        return points

    def stream_lost(self, incarnation: Incarnation, reason: str) -> None:
        """What the worker runs for this router cannot go on."""
        for record in [r for r in self._open.values() if r.decode == incarnation and r.answered]:
            self._cancels.send(incarnation, record.request.request_id, record.request.attempt)
            self._go_on(record, f"the decode worker's token stream was lost: {reason}", crashed=False)

    # What the fleet tells -------------------------------------------------------------------------------------------

    def worker_up(self, worker: Worker) -> None:
        """Opens the token stream of a new decode worker."""
        if worker.info.role is Role.DECODE:
            if self._model is None:
                model, config = worker.info.model, self._config
                self._model = replace(
                    model, name=config.served_model_name or model.name, path=config.model or model.path
                )
            self._streams[worker.incarnation] = WorkerStream(worker, self.fleet.router_id, self.fleet.lease_s, self)

    def worker_reported(self, status: Status) -> None:
        """A worker has told its load, and what tenants use of it."""
        self._quotas.observe(status)
        self._pairs.observe(status)
        self._admission.wake()

    def worker_gone(self, incarnation: Incarnation, reason: str) -> None:
        """What it ran goes on elsewhere. What it had not answered yet does so when its call fails."""
        self._quotas.forget(incarnation)
        self._pairs.forget(incarnation)
        self._admission.wake()
        self.tails.drop(incarnation)
        stream = self._streams.pop(incarnation, None)
        if stream is not None:
            stream.close()
        for record in [r for r in self._open.values() if r.decode == incarnation and r.answered]:
            self._go_on(record, f"the decode worker was lost: {reason}", crashed=True)

    # Going on elsewhere ---------------------------------------------------------------------------------------------

    def _go_on(self, record: OpenRequest, reason: str, crashed: bool) -> None:
        """Lets another worker go on from the prompt and what was made of it, since the present one cannot.

        crashed: it may have died of this very request, which therefore gets no third one.
        """
        lost = record.decode
        self._release(record)
        record.losses += crashed
        record.moves += 1
        if record.losses >= MAX_CRASHES:
            if crashed:
                self._quarantine.add(record.request)
            return self._give_up(record, f"{reason}; {record.losses} were lost over this request")
        if record.moves > MAX_MOVES:
            return self._give_up(record, f"{reason}; it was moved {MAX_MOVES} times before")
        record.next_attempt()
        log.info("request %s goes on elsewhere: %s", record.request.request_id, reason)
        task = asyncio.create_task(self._move(record, lost, reason))
        self._moves.add(task)
        task.add_done_callback(self._moves.discard)
        return None

    async def _move(self, record: OpenRequest, lost: Incarnation | None, reason: str) -> None:
        try:
            await self._place(record, without=lost)
        except TandemError as error:
            self._give_up(record, f"{reason}; nobody could go on: {error}")
        except Exception:
            log.exception("request %s cannot go on", record.request.request_id)
            self._give_up(record, f"{reason}; it could not go on")
        else:
            self.moved += 1

    def _give_up(self, record: OpenRequest, error: str) -> None:
        """Ends a request that no worker runs."""
        record.decode = None
        record.end(FinishReason.ERROR, error)
        self._close(record)

    # End of all -----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Ends every request with an error and tells the workers."""
        for record in list(self._open.values()):
            self._end(record, FinishReason.ERROR, "the router is shutting down")
        for task in self._moves:
            task.cancel()
        await self._cancels.settle(CLOSE_S)
        for stream in self._streams.values():
            stream.close()

    def collect(self) -> Iterable[Metric]:
        """For the metrics page."""
        name = REQUESTS_MOVED_TOTAL.removesuffix("_total")
        yield CounterMetricFamily(name, "requests that went on at another decode worker", value=self.moved)

    def leaks(self) -> list[str]:
        """What is still held; empty when idle."""
        held = [f"request {request_id} is open" for request_id in self._open]
        held += [f"{count} {what}" for what, count in self._counters().items() if count]
        return held

    def _counters(self) -> dict[str, int]:
        return {
            "requests in flight": self._admission.inflight,
            "requests waiting": self._admission.queued,
            "bookings": self.fleet.bookings(),
            "predictions": len(self._index.predictions),
            "calls under way": len(self._cancels),
        }
