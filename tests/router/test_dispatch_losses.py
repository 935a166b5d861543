"""Broken streams and lost workers: what they ran goes on elsewhere without gap or repeat, or ends with a reason."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from router.dispatch_submit import cost_of
from tandem.cluster import Candidate, Role, new_id
from tandem.errors import Quarantined, WorkerLost
from tandem.testing.polling import eventually
from tandem.testing.router import Deltas
from tandem.testing.workers import FakeWorker, answer
from tandem.types import FinishReason
from tests.router.dispatch_cluster import STOP, cluster, read, request


async def test_what_a_stream_that_broke_before_the_answer_carried_is_asked_for_again() -> None:
    async with cluster() as made:
        (worker,) = made.decode
        worker.hold = asyncio.Event()
        task = asyncio.create_task(made.dispatcher.submit(request()))
        await worker.until(lambda: worker.submissions)
        worker.break_streams()
        await worker.until(lambda: len(worker.resumes) == 2)
        (message,) = worker.submissions
        await eventually(lambda: worker.streams == 1)
        worker.send(answer(message, [3], 2))
        worker.hold.set()
        accepted = await task
        await worker.until(lambda: len(worker.resumes) == 3)
        (point,) = worker.resumes[2]
        assert (point.request_id, point.next_index) == (message.request.request_id, 0)
        await eventually(lambda: worker.streams == 1)
        worker.send(answer(message, [1, 2, 3], **STOP))
        assert [d.tokens for d in await read(accepted)] == [(1, 2, 3)]


async def test_what_a_dead_worker_ran_goes_on_elsewhere_without_gap_or_repeat() -> None:
    async with cluster(decode=2) as made:
        running = [await made.submit(request(choices=2)) for _ in range(8)]
        dead, alive = made.decode
        assert dead.submissions
        before = len(alive.submissions)
        assert before
        for worker in made.decode:
            worker.send(*(answer(message, [1, 2]) for message in worker.submissions))
            worker.send(*(answer(message, [7], choice=1, **STOP) for message in worker.submissions))
        readers = [aiter(Deltas(accepted.follow)) for accepted, _ in running]
        for reader in readers:
            assert (await anext(reader)).tokens == (1, 2)
        await dead.stop()
        await alive.until(lambda: len(alive.submissions) == 8)
        for message in alive.submissions[before:]:
            assert message.request.attempt == 1
            assert [tuple(choice.tokens) for choice in message.request.generated] == [(1, 2), (7,)]
            assert list(message.request.ended) == [1]
            assert message.dispatch, "its load counts again"
        alive.send(*(answer(message, [3], 2, **STOP) for message in alive.submissions))
        async with asyncio.timeout(10):
            for reader in readers:
                rest = [(delta.choice, delta.first_index, delta.tokens) async for delta in reader]
                assert rest == [(1, 0, (7,)), (0, 2, (3,))]
        assert made.dispatcher.moves.moved == 8 - before


async def test_without_another_worker_the_stream_says_what_was_lost() -> None:
    async with cluster() as made:
        accepted, worker = await made.submit(request())
        worker.send(answer(worker.submissions[0], [1]))
        await worker.stop()
        *_, last = await read(accepted)
        assert last.finish is FinishReason.ERROR
        assert "the decode worker was lost" in last.error
        assert "nobody could go on: no decode worker is connected" in last.error


async def test_a_request_that_ended_two_workers_is_quarantined() -> None:
    async with cluster(decode=3) as made:
        asked = request()
        accepted, first = await made.submit(asked)
        first.send(answer(first.submissions[0], [1]))
        await first.stop()
        others = [worker for worker in made.decode if worker is not first]
        await eventually(lambda: made.dispatcher.moves.moved == 1)
        await next(worker for worker in others if worker.submissions).stop()
        *_, last = await read(accepted)
        assert "2 were lost over this request" in last.error
        assert sum(len(worker.submissions) for worker in made.decode) == 2
        with pytest.raises(Quarantined, match="workers were lost over a request like this one"):
            await made.dispatcher.submit(replace(asked, request_id=new_id(), sampling=replace(asked.sampling, seed=5)))
        innocent, worker = await made.submit(request(prompt_tokens=6))
        worker.send(answer(worker.submissions[0], [1], **STOP))
        assert [d.tokens for d in await read(innocent)] == [(1,)]


@pytest.mark.parametrize("said", [True, False])
async def test_what_a_leaving_worker_gives_up_goes_on_and_counts_as_no_crash(said: bool) -> None:
    async with cluster(decode=2) as made:
        accepted, leaving = await made.submit(request(choices=2))
        (other,) = (worker for worker in made.decode if worker is not leaving)
        (message,) = leaving.submissions
        if said:
            leaving.report(draining=True)
            await eventually(lambda: any(view.draining for view in made.control.fleet.snapshot().decode))
        fault: dict[str, Any] = {"finish": FinishReason.ERROR, "error": "the worker ends", "leaving": not said}
        leaving.send(answer(message, [4], **fault), answer(message, [], choice=1, **fault))
        await other.until(lambda: other.submissions)
        (again,) = other.submissions
        assert [tuple(choice.tokens) for choice in again.request.generated] == [(4,), ()]
        other.send(answer(again, [5], 1, **STOP), answer(again, [6], choice=1, **STOP))
        deltas = await read(accepted)
        assert sorted((d.choice, d.first_index, d.tokens) for d in deltas) == [(0, 0, (4,)), (0, 1, (5,)), (1, 0, (6,))]


async def test_what_a_moved_request_s_last_choice_ran_on_counts_for_no_more() -> None:
    async with cluster(decode=2) as made:
        accepted, dead = await made.submit(request(choices=3))
        (other,) = (worker for worker in made.decode if worker is not dead)
        dead.send(*(answer(dead.submissions[0], [1], choice=choice, **STOP) for choice in (0, 1)))
        await eventually(lambda: len(accepted._record.resume_points()) == 1)
        await dead.stop()
        await eventually(lambda: other.submissions and accepted._record.answered)
        (again,) = other.submissions
        other.report(running=5, dispatches={made.control.fleet.router_id: again.dispatch})
        await eventually(lambda: made.control.fleet.snapshot().decode[0].sequences == 5)
        other.send(answer(again, [2], choice=2, **STOP))
        await read(accepted)
        assert made.control.fleet.snapshot().decode[0].sequences == 4


async def test_a_client_that_leaves_while_its_request_moves_leaves_nothing_behind() -> None:
    async with cluster(decode=2) as made:
        accepted, dead = await made.submit(request())
        (other,) = (worker for worker in made.decode if worker is not dead)
        other.hold = asyncio.Event()
        await dead.stop()
        await other.until(lambda: other.submissions)
        await accepted.cancel()
        other.hold.set()
        await other.until(lambda: other.cancelled)
        assert (await read(accepted))[-1].finish is FinishReason.CANCELLED


async def test_a_worker_that_dies_before_it_answered_costs_only_a_retry() -> None:
    async with cluster(decode=2) as made:
        for worker in made.decode:
            worker.hold = asyncio.Event()
        task = asyncio.create_task(made.dispatcher.submit(request()))
        await eventually(lambda: any(worker.submissions for worker in made.decode))
        dead, alive = sorted(made.decode, key=lambda worker: not worker.submissions)
        assert alive.hold is not None
        alive.hold.set()
        # Tokens of the first attempt, not yet given to anyone, are not mixed with those of the second.
        dead.send(answer(dead.submissions[0], [9]))
        await dead.stop()
        accepted = await task
        assert accepted.plan.decode == alive.info.incarnation
        assert alive.submissions[0].request.attempt == 1
        alive.send(answer(alive.submissions[0], [5], **STOP))
        assert [d.tokens for d in await read(accepted)] == [(5,)]


async def test_a_broken_stream_is_resumed_by_index() -> None:
    async with cluster() as made:
        asked = request(choices=2)
        accepted, worker = await made.submit(asked)
        (message,) = worker.submissions
        worker.send(answer(message, [1, 2]), answer(message, [6], choice=1, **STOP))
        deltas = Deltas(accepted.follow)
        assert [(await anext(deltas)).tokens for _ in range(2)] == [(1, 2), (6,)]
        worker.break_streams()
        await worker.until(lambda: len(worker.resumes) == 2)
        (point,) = worker.resumes[1]
        assert (point.request_id, point.attempt, point.choice, point.next_index) == (asked.request_id, 0, 0, 2)
        worker.send(answer(message, [], 2))  # it has made nothing since; time by no tokens would be an endless speed
        worker.send(answer(message, [2, 3], 1, **STOP))
        assert (await anext(deltas)).tokens == (3,)


async def test_a_broken_connection_to_a_living_worker_costs_nothing() -> None:
    async with cluster() as made:
        first = made.decode[0]
        accepted, _ = await made.submit(request())
        (message,) = first.submissions
        first.send(answer(message, [1, 2]))
        deltas = Deltas(accepted.follow)
        assert (await anext(deltas)).tokens == (1, 2)
        await first.stop()
        async with FakeWorker(Role.DECODE, port=first.port, incarnation=first.info.incarnation) as same:
            await same.until(lambda: same.resumes)
            (point,) = same.resumes[0]
            assert (point.request_id, point.next_index) == (message.request.request_id, 2)
            await eventually(lambda: made.decoders_known() == 1)
            same.send(answer(message, [3], 2, **STOP))
            assert [d.tokens async for d in deltas] == [(3,)]


async def test_a_request_that_two_workers_died_of_is_refused() -> None:
    async with cluster(decode=3) as made:
        for worker in made.decode:
            worker.hold = asyncio.Event()
        poison = request()
        task = asyncio.create_task(made.dispatcher.submit(poison))

        def asked(attempt: int) -> list[FakeWorker]:
            return [w for w in made.decode if any(m.request.attempt == attempt for m in w.submissions)]

        for attempt in (0, 1):
            await eventually(partial(asked, attempt))
            await asked(attempt)[0].stop()
        with pytest.raises(WorkerLost, match="2 decode workers were lost"):
            await task
        assert asked(2) == []
        with pytest.raises(Quarantined, match="workers were lost over a request like this one"):
            await made.dispatcher.submit(replace(poison, request_id=new_id()))
        assert sum(len(worker.submissions) for worker in made.decode) == 2


async def test_when_all_workers_were_exchanged_the_others_model_is_served() -> None:
    async with cluster() as made:
        (old,) = made.decode
        assert made.dispatcher.model is not None
        await old.stop()
        await eventually(lambda: made.control.fleet.worker(old.info.incarnation) is None)
        other = replace(old.info.model, fingerprint="0bad", vocab_size=7)
        async with FakeWorker(Role.DECODE, port=old.port, model=other, kv_dtype="bfloat16") as later:
            await eventually(made.dispatcher.ready)
            assert (made.dispatcher.model.fingerprint, made.dispatcher.model.vocab_size) == ("0bad", 7)
            accepted = await made.dispatcher.submit(request())
            later.send(answer(later.submissions[0], [1, 2, 3], **STOP))
            assert [d.tokens for d in await read(accepted)] == [(1, 2, 3)]


async def test_a_worker_restarted_at_its_address_is_another_worker() -> None:
    async with cluster() as made:
        first = made.decode[0]
        accepted, _ = await made.submit(request())
        await first.stop()
        async with FakeWorker(Role.DECODE, port=first.port) as second:
            assert (await read(accepted))[-1].finish is FinishReason.ERROR
            await eventually(lambda: made.control.fleet.worker(second.info.incarnation) is not None)
            await eventually(lambda: made.decoders_known() == 1)
            async with await made.dispatcher.submit(request()) as again:
                assert again.plan.decode == second.info.incarnation


def test_a_moved_request_costs_what_is_left_of_it() -> None:
    asked = request(prompt_tokens=64, max_tokens=600, choices=2)
    moved = asked.again((tuple(range(500)), ()), ended=(1,))
    where = new_id()
    assert cost_of(asked, Candidate(where, None, 60, 0, {})) == 4 + 2 * 128
    assert cost_of(moved, Candidate(where, None, 512, 0, {})) == 52 + 100
    assert cost_of(moved, Candidate(where, None, 564, 0, {})) == 100
