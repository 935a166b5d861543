"""The decode worker's gRPC face towards routers. Thin: messages in, messages out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from decode_worker.outbox import ResumeAt
from decode_worker.worker import DecodeWorker
from kvtransfer.pairs import Target
from tandem.errors import Fenced, TandemError
from tandem.obs import tell_request
from tandem.wire import codec
from tandem.wire.failures import abort_with
from tandem.wire.v1 import decode_pb2, decode_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


def attach(server: grpc.aio.Server, worker: DecodeWorker) -> None:
    """Makes `server` answer the calls of `Decode`."""
    decode_pb2_grpc.add_DecodeServicer_to_server(DecodeService(worker), server)


class DecodeService(decode_pb2_grpc.DecodeServicer):
    """`Decode` of proto/tandem/wire/v1/decode.proto."""

    def __init__(self, worker: DecodeWorker) -> None:
        self._worker = worker

    async def Submit(self, request: decode_pb2.SubmitRequest, context: Context) -> decode_pb2.SubmitReply:
        """Admits a request or refuses it at once."""
        tell_request(request.request.request_id, request.request.traceparent)
        try:
            if request.incarnation != self._worker.info.incarnation:
                raise Fenced(f"this worker is {self._worker.info.incarnation}, not {request.incarnation}")
            cached, prefill = await self._worker.submit(
                codec.generate_request_from_wire(request.request),
                request.router_id,
                request.dispatch,
                [Target(target.incarnation, target.address) for target in request.prefill],
                request.expected_cached,
                request.planned_local,
            )
        except TandemError as error:
            await abort_with(context, error)
        return decode_pb2.SubmitReply(cached_tokens=cached, prefill=prefill)

    async def Stream(
        self, request: decode_pb2.StreamRequest, context: Context
    ) -> AsyncIterator[decode_pb2.StepMessage]:
        """All tokens of one router's requests."""
        resume = [ResumeAt(p.request_id, p.attempt, p.choice, p.next_index) for p in request.resume]
        outbox, reader = self._worker.attach(request.router_id, resume)
        incarnation = self._worker.info.incarnation
        try:
            # An empty message first: the router submits only once it knows that its stream stands.
            yield decode_pb2.StepMessage(incarnation=incarnation)
            async for deltas in outbox.messages(reader):
                yield decode_pb2.StepMessage(incarnation=incarnation, deltas=map(codec.delta_to_wire, deltas))
        finally:
            outbox.detach(reader)

    async def Cancel(self, request: decode_pb2.CancelRequest, context: Context) -> decode_pb2.CancelReply:
        """Ends a request; its own answer."""
        return decode_pb2.CancelReply(known=await self._worker.cancel(request.request_id, request.attempt))
