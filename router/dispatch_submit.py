"""One submission of a request to the decode worker that a plan names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc
import grpc.aio

from router.dispatch_cancels import Cancels
from router.dispatch_stream import WorkerStream
from router.open_request import OpenRequest
from router.open_requests import OpenRequests
from router.placement import book
from router.policies import RequestInfo
from router.policies.cost import EXPECTED_OUTPUT
from router.workers.fleet import Fleet
from router.workers.fleet_link import Worker
from tandem.cluster import Candidate, Incarnation, Plan
from tandem.errors import Unavailable, WorkerLost
from tandem.types import GenerateRequest
from tandem.wire import codec
from tandem.wire.failures import error_of_rpc, was_refused
from tandem.wire.v1 import decode_pb2, decode_pb2_grpc

SUBMIT_S = 10.0
"""A decode worker admits or refuses well within this."""
COMPILE_S = 60.0
"""Longer where it has to compile a grammar first, or to start its compiler."""
STREAM_S = 2.0
"""A new decode worker's token stream stands within this."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the decode worker answered when it took the request."""

    cached_tokens: int
    """Prompt tokens it really had cached."""
    prefill: Incarnation | None
    """The prefill worker it asked; None: it prefills itself."""


def cost_of(request: GenerateRequest, chosen: Candidate) -> int:
    """Tokens that a request is expected to take of workers: what is known of it and not cached, and its answers."""
    missing = max(len(request.known) - max(chosen.decode_cached, chosen.prefill_cached), 0)
    left = request.sampling.max_tokens - len(request.made(request.lead))
    return missing + (request.choices - len(request.ended)) * min(left, EXPECTED_OUTPUT)


class Submitter:
    """Submits, and books what was submitted. streams: of tokens, by decode worker. clock: seconds."""

    def __init__(
        self,
        fleet: Fleet,
        requests: OpenRequests,
        cancels: Cancels,
        streams: Mapping[Incarnation, WorkerStream],
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._requests = requests
        self._cancels = cancels
        self._streams = streams
        self._clock = clock

    async def submit(self, record: OpenRequest, info: RequestInfo, plan: Plan) -> Reply:
        """One submission. Raises what the worker refused with; Unavailable when it cannot be reached."""
        worker, stream = self._fleet.worker(plan.decode), self._streams.get(plan.decode)
        if worker is None or stream is None:
            raise Unavailable(f"decode worker {plan.decode} is gone")
        await stream.ready(STREAM_S)
        self._requests.check_open(record)
        record.decode, generation = plan.decode, stream.generation
        record.decode_booking, record.prefill_booking = book(self._fleet, info, plan.candidates[0], record.chain.hashes)
        try:
            reply = await self._call_submit(worker, self._submission(record, plan))
            if not record.finished and (record.left or self._fleet.worker(plan.decode) is not worker):
                # Nobody watches a worker that was given up in the very moment of its answer.
                raise (Unavailable if record.left else WorkerLost)(f"decode worker {plan.decode} is gone")
        except BaseException:
            self._requests.release(record)
            raise
        record.answered = record.taken = True
        if record.gapped or stream.generation != generation:
            record.resumed = False
            stream.reopen()  # it broke meanwhile, and its resume points did not name this request yet
        record.story.taken(reply.cached_tokens, reply.prefill, self._clock())
        if plan.prefill is not None and reply.prefill != plan.prefill:
            self._fleet.release(record.prefill_booking)
        if not self._requests.has(record):
            # It was ended here while the worker was taking it.
            self._cancels.send(worker.incarnation, record.request.request_id, record.request.attempt)
        elif record.finished:
            self._requests.close(record)
        return reply

    async def _call_submit(self, worker: Worker, message: decode_pb2.SubmitRequest) -> Reply:
        stub = decode_pb2_grpc.DecodeStub(worker.channel)
        request = message.request
        try:
            reply = await stub.Submit(message, timeout=SUBMIT_S + COMPILE_S * request.sampling.HasField("grammar"))
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
        workers = [worker for name in plan.prefill_alternatives if (worker := self._fleet.worker(name)) is not None]
        message = codec.generate_request_to_wire(record.request)
        message.cost = cost_of(record.request, plan.candidates[0])
        message.traceparent, message.tracestate = record.story.trace or ("", "")
        return decode_pb2.SubmitRequest(
            router_id=self._fleet.router_id,
            dispatch=0 if booking is None else booking.number,
            incarnation=plan.decode,
            request=message,
            prefill=[decode_pb2.PrefillTarget(incarnation=w.incarnation, address=w.info.address) for w in workers],
            expected_cached=plan.expected_cached,
            planned_local=plan.prefill is None,
        )
