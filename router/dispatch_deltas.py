"""What decode workers' token streams bring, for the requests that wait for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

from router.dispatch_cancels import Cancels
from router.moves import Moves
from router.open_requests import OpenRequests
from router.workers.fleet import Fleet
from tandem.cluster import Incarnation
from tandem.obs import about
from tandem.types import FinishReason
from tandem.wire import codec
from tandem.wire.v1 import common_pb2, decode_pb2

log = logging.getLogger(__name__)


class Deltas:
    """See `DeltaSink`."""

    def __init__(self, fleet: Fleet, requests: OpenRequests, cancels: Cancels, moves: Moves) -> None:
        self._fleet = fleet
        self._requests = requests
        self._cancels = cancels
        self._moves = moves

    def receive(self, incarnation: Incarnation, deltas: Iterable[common_pb2.Delta]) -> None:
        """New tokens of any requests of a worker; what nobody waits for is dropped, and cancelled if it goes on."""
        for message in deltas:
            record = self._requests.get(message.request_id)
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
                    leaves = delta.leaving or (delta.finish is FinishReason.ERROR and self._leaving(incarnation))
                    if leaves and not record.answered:
                        # Its answer comes, or the call fails: then another worker takes the request.
                        record.left |= delta.attempt == record.request.attempt
                        continue
                    if leaves:
                        record.push(replace(delta, finish=None, error="", leaving=False))
                        self._moves.go_on(record, delta.error, crashed=False)
                        continue
                    problem = record.push(delta)
            except ValueError as error:
                problem = f"the worker sent a malformed message: {error}"
            if problem:
                told = about(message.request_id, record.story.trace)
                log.warning("request %s is cut: %s", message.request_id, problem, extra=told)
                self._requests.end(record, FinishReason.ERROR, problem)
            elif not plain and record.finished and record.answered:
                self._requests.close(record)
            elif record.prefill_booking is not None and message.tokens:
                self._fleet.release(record.prefill_booking)
                record.prefill_booking = None

    def _leaving(self, incarnation: Incarnation) -> bool:
        """Whether a worker has said that it will end: what it gives up is not the request's fault."""
        return any(view.incarnation == incarnation and view.draining for view in self._fleet.snapshot().decode)

    def resume_points(self, incarnation: Incarnation) -> list[decode_pb2.ResumePoint]:
        """Where the requests that this worker has taken should go on; those not yet answered come later."""
        points = []
        for record in self._requests.taken_by(incarnation):
            record.resumed, request = True, record.request
            points += [
                decode_pb2.ResumePoint(
                    request_id=request.request_id, attempt=request.attempt, choice=choice, next_index=index
                )
                for choice, index in record.resume_points()
            ]
        return points

    def stream_lost(self, incarnation: Incarnation, reason: str) -> None:
        """What the worker runs for this router cannot go on."""
        for record in self._requests.taken_by(incarnation):
            self._cancels.send(incarnation, record.request.request_id, record.request.attempt)
            self._moves.go_on(record, f"the decode worker's token stream was lost: {reason}", crashed=False)
