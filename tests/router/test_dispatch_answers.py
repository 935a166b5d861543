"""Workers that are lost, or give a request up, while their answer to it is on its way: it ends nowhere and goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tandem.testing.polling import eventually
from tandem.testing.workers import answer
from tandem.types import FinishReason
from tests.router.dispatch_cluster import STOP, cluster, read, request


async def test_a_worker_that_is_given_up_in_the_moment_of_its_answer_costs_only_a_retry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with cluster(decode=2) as made:
        submitter = made.dispatcher._placer._submitter
        gone: list[Any] = []
        call = submitter._call_submit

        async def answered_late(worker: Any, message: Any) -> Any:
            reply = await call(worker, message)
            if not gone:
                gone.extend(each for each in made.decode if each.info.incarnation == worker.incarnation)
                await gone[0].stop()
                await eventually(lambda: made.control.fleet.worker(worker.incarnation) is None)
            return reply

        monkeypatch.setattr(submitter, "_call_submit", answered_late)
        accepted, alive = await made.submit(request())
        assert alive is not gone[0]
        alive.send(answer(alive.submissions[0], [5], **STOP))
        assert [d.tokens for d in await read(accepted)] == [(5,)]


async def test_what_a_leaving_worker_gives_up_before_it_answered_goes_elsewhere() -> None:
    async with cluster(decode=2) as made:
        for worker in made.decode:
            worker.hold = asyncio.Event()
        task = asyncio.create_task(made.dispatcher.submit(request()))
        await eventually(lambda: any(worker.submissions for worker in made.decode))
        leaving, other = sorted(made.decode, key=lambda worker: not worker.submissions)
        (message,) = leaving.submissions
        leaving.send(answer(message, [], finish=FinishReason.ERROR, error="the worker ends", leaving=True))
        (record,) = made.dispatcher._requests
        await eventually(lambda: record.left)
        for worker in (leaving, other):
            assert worker.hold is not None
            worker.hold.set()
        accepted = await task
        assert accepted.plan.decode == other.info.incarnation
        assert record.losses == 0, "no crash"
        other.send(answer(other.submissions[0], [5], **STOP))
        assert [d.tokens for d in await read(accepted)] == [(5,)]
