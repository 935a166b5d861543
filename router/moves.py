"""Requests that go on at another decode worker, from their prompt and what was made of it."""

from __future__ import annotations

import asyncio
import logging

from router.open_request import OpenRequest
from router.open_requests import OpenRequests
from router.placer import MAX_CRASHES, Placer
from router.quarantine import Quarantine
from tandem.cluster import Incarnation
from tandem.errors import TandemError, WorkerLost
from tandem.obs import tell_request
from tandem.types import FinishReason

log = logging.getLogger(__name__)

MAX_MOVES = 8
"""Times that a request may go on elsewhere, whatever for."""


class Moves:
    """The moves under way."""

    def __init__(self, requests: OpenRequests, placer: Placer, quarantine: Quarantine) -> None:
        self._requests = requests
        self._placer = placer
        self._quarantine = quarantine
        self._tasks: set[asyncio.Task[None]] = set()
        self.moved = 0
        """Requests that went on at another decode worker."""

    def go_on(self, record: OpenRequest, reason: str, crashed: bool) -> None:
        """Lets another worker go on from the prompt and what was made of it, since the present one cannot.

        crashed: it may have died of this very request, which therefore gets no third one.
        """
        lost = record.decode
        self._requests.release(record)
        record.losses += crashed
        record.moves += 1
        if record.losses >= MAX_CRASHES:
            if crashed:
                self._quarantine.add(record.request)
            return self._give_up(record, f"{reason}; {record.losses} were lost over this request")
        if record.moves > MAX_MOVES:
            return self._give_up(record, f"{reason}; it was moved {MAX_MOVES} times before")
        record.story.refused(WorkerLost(reason))
        record.next_attempt()
        task = asyncio.create_task(self._move(record, lost, reason))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return None

    async def _move(self, record: OpenRequest, lost: Incarnation | None, reason: str) -> None:
        tell_request(record.request.request_id, *(record.story.trace or ())[:1])
        log.info("request %s goes on elsewhere: %s", record.request.request_id, reason)
        try:
            await self._placer.place(record, without=lost)
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
        self._requests.close(record)

    def close(self) -> None:
        """No more of them."""
        for task in self._tasks:
            task.cancel()
