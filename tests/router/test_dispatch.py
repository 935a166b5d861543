"""The dispatcher and the fleet against scripted workers on real gRPC servers."""

from __future__ import annotations

import asyncio

import pytest

from router.control import ControlPlane
from tandem.cluster import CacheEvent, EventKind, MoveStat, Role, new_id
from tandem.config import RouterConfig
from tandem.errors import BadRequest, ContextTooLong, Overloaded, Unavailable
from tandem.kv import BLOCK_TOKENS, HashRoot, block_hashes
from tandem.testing.polling import eventually
from tandem.testing.router import Deltas
from tandem.testing.workers import MODEL, FakeWorker, answer
from tandem.types import Delta, FinishReason, GenerateRequest, SamplingParams, TokenLogprob
from tests.router.dispatch_cluster import STOP, cluster, read, request


async def test_a_request_goes_to_the_decode_worker_and_its_tokens_come_back() -> None:
    async with cluster() as made:
        assert made.dispatcher.model == MODEL
        assert made.dispatcher.ready()
        asked = request()
        accepted, worker = await made.submit(asked)
        (message,) = worker.submissions
        assert (message.incarnation, message.dispatch, message.planned_local) == (worker.info.incarnation, 1, True)
        assert message.router_id == made.control.fleet.router_id
        assert tuple(message.request.prompt) == asked.prompt
        worker.send(answer(message, [7, 8]))
        worker.send(answer(message, [9], 2, **STOP))
        deltas = await read(accepted)
        assert [token for delta in deltas for token in delta.tokens] == [7, 8, 9]
        assert deltas[-1].finish is FinishReason.STOP
        await accepted.cancel()
        assert worker.cancelled == []


async def test_all_choices_end_before_the_iteration_does() -> None:
    async with cluster() as made:
        accepted, worker = await made.submit(request(choices=3))
        (message,) = worker.submissions
        worker.send(*(answer(message, [choice], choice=choice, **STOP) for choice in (2, 0, 1)))
        assert [(d.choice, d.tokens) for d in await read(accepted)] == [(2, (2,)), (0, (0,)), (1, (1,))]


async def test_repeated_tokens_and_old_attempts_are_dropped() -> None:
    async with cluster() as made:
        accepted, worker = await made.submit(request())
        (message,) = worker.submissions
        worker.send(answer(message, [1, 2]))
        worker.send(answer(message, [1, 2]), answer(message, [2, 3], 1))
        old = answer(message, [99], 3)
        worker.send(Delta(old.request_id, old.attempt + 1, 0, 3, (99,)))
        worker.send(answer(message, [4], 3, **STOP), answer(message, [5], 4, **STOP))
        deltas = await read(accepted)
        assert [(d.first_index, d.tokens) for d in deltas] == [(0, (1, 2)), (2, (3,)), (3, (4,))]


async def test_lost_tokens_end_the_request_with_an_error() -> None:
    async with cluster() as made:
        accepted, worker = await made.submit(request())
        (message,) = worker.submissions
        worker.send(answer(message, [1]), answer(message, [3], 2))
        deltas = await read(accepted)
        assert deltas[-1].finish is FinishReason.ERROR
        assert "tokens 1 to 1 were lost" in deltas[-1].error
        await worker.until(lambda: worker.cancelled)


async def test_cancel_ends_the_request_here_and_there_and_is_idempotent() -> None:
    async with cluster() as made:
        asked = request(choices=2)
        accepted, worker = await made.submit(asked)
        worker.send(answer(worker.submissions[0], [1], **STOP))
        deltas = Deltas(accepted.follow)
        await anext(deltas)
        await asyncio.gather(accepted.cancel(), accepted.cancel())
        await accepted.cancel()
        assert worker.cancelled == [(asked.request_id, 0)]
        assert [(d.choice, d.finish) async for d in deltas] == [(1, FinishReason.CANCELLED)]


async def test_what_nobody_waits_for_any_more_is_cancelled_once_and_ends_are_not() -> None:
    """Such as requests of a worker that was stopped, given up, and continued."""
    async with cluster() as made:
        accepted, worker = await made.submit(request())
        (message,) = worker.submissions
        forgotten, ended = new_id(), new_id()
        worker.send(
            Delta(ended, 0, 0, 0, (1,), finish=FinishReason.LENGTH),
            Delta(forgotten, 3, 0, 0, (1,)),
            Delta(forgotten, 3, 0, 1, (1,)),
            answer(message, [7], **STOP),
        )
        await read(accepted)
        await worker.until(lambda: worker.cancelled)
        await eventually(lambda: made.dispatcher.leaks() == [])
        assert worker.cancelled == [(forgotten, 3)]


async def test_a_worker_that_dies_while_it_is_told_to_cancel_cancels_nobody_here() -> None:
    async with cluster() as made:
        accepted, worker = await made.submit(request())
        worker.hold_cancel = asyncio.Event()
        cancelling = asyncio.create_task(accepted.cancel())
        await worker.until(lambda: worker.cancelled)
        await made.control.fleet.close()
        await cancelling


async def test_leaving_the_context_cancels() -> None:
    async with cluster() as made:
        asked = request()
        async with await made.dispatcher.submit(asked):
            pass
        assert made.decode[0].cancelled == [(asked.request_id, 0)]


async def test_a_submission_given_up_is_cancelled_at_the_worker() -> None:
    async with cluster() as made:
        worker = made.decode[0]
        worker.hold = asyncio.Event()
        asked = request()
        task = asyncio.create_task(made.dispatcher.submit(asked))
        await worker.until(lambda: worker.submissions)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await worker.until(lambda: worker.cancelled == [(asked.request_id, 0)])


async def test_a_slow_reader_is_cut_alone() -> None:
    async with cluster(stream_queue=8) as made:
        slow, worker = await made.submit(request())
        quick, _ = await made.submit(request())
        first, second = worker.submissions
        reading = asyncio.create_task(read(quick))
        for index in range(20):
            scores = (TokenLogprob(index, -1.0),)
            worker.send(answer(first, [index], index, logprobs=scores), answer(second, [index], index, logprobs=scores))
        worker.send(answer(second, [20], 20, **STOP))
        assert len(await reading) == 21
        deltas = await read(slow)
        assert len(deltas) == 9
        assert deltas[-1].finish is FinishReason.ERROR
        assert "reads too slowly: more than 8 tokens" in deltas[-1].error
        # Tokens under way when the first Cancel was answered may ask for another: only this request, once or twice.
        await worker.until(lambda: set(worker.cancelled) == {(first.request.request_id, 0)})


@pytest.mark.parametrize("refusal", [Overloaded("full"), Unavailable("this worker is draining")])
async def test_a_refused_request_goes_to_another_worker(refusal: Exception) -> None:
    async with cluster(decode=2) as made:
        made.decode[0].refusal = made.decode[1].refusal = refusal  # type: ignore[assignment]
        task = asyncio.create_task(made.dispatcher.submit(request()))
        with pytest.raises(type(refusal), match=str(refusal)):
            await task
        assert [len(worker.submissions) for worker in made.decode] == [1, 1]
        attempts = {worker.submissions[0].request.attempt for worker in made.decode}
        assert attempts == {0, 1}
        made.decode[0].refusal = None
        accepted, worker = await made.submit(request())
        assert worker is made.decode[0]
        worker.send(answer(worker.submissions[-1], [1], **STOP))
        assert (await read(accepted))[-1].finish is FinishReason.STOP
        assert made.decode[0].cancelled == made.decode[1].cancelled == []


async def test_retries_are_bounded() -> None:
    async with cluster(decode=3, retries=1) as made:
        for worker in made.decode:
            worker.refusal = Overloaded("full")
        with pytest.raises(Overloaded):
            await made.dispatcher.submit(request())
        assert sum(len(worker.submissions) for worker in made.decode) == 2


async def test_a_bad_request_is_not_tried_elsewhere() -> None:
    async with cluster(decode=2) as made:
        for worker in made.decode:
            worker.refusal = ContextTooLong("9 tokens; at most 8 fit", param="messages")
        with pytest.raises(ContextTooLong, match="at most 8 fit") as caught:
            await made.dispatcher.submit(request())
        assert caught.value.param == "messages"
        assert sum(len(worker.submissions) for worker in made.decode) == 1
        with pytest.raises(BadRequest, match=r"prompt has token id 1000; it must be in \[0, 1000\)"):
            await made.dispatcher.submit(GenerateRequest(new_id(), "fake", (1, 1000), SamplingParams()))


async def test_a_larger_worker_is_asked_when_a_smaller_one_finds_a_request_too_long() -> None:
    async with FakeWorker(Role.DECODE) as small, FakeWorker(Role.DECODE, total_pages=512) as large:
        small.refusal = ContextTooLong("at most 8 fit", param="messages")
        config = RouterConfig(control_port=0, workers=(small.info.address, large.info.address), policy="round_robin")
        async with ControlPlane(config) as control:
            await eventually(lambda: len(control.fleet.snapshot().decode) == 2)
            for _ in range(2):
                accepted = await control.dispatcher.submit(request())
                assert accepted.plan.decode == large.info.incarnation
                await accepted.cancel()
            assert (len(small.submissions), len(large.submissions)) == (1, 2)
            large.refusal = ContextTooLong("at most 16 fit", param="messages")
            with pytest.raises(ContextTooLong, match="fit"):
                await control.dispatcher.submit(request())


async def test_a_pair_whose_hand_over_failed_is_avoided_for_a_while() -> None:
    async with cluster(prefill=1, policy="longest_prefix") as made:
        (worker,), (prefill,) = made.decode, made.prefill
        names = prefill.info.incarnation, worker.info.incarnation
        worker.report(free_pages=256, total_pages=256)
        for failures in (0, 1):
            stat = MoveStat(*names, "tcp", failures=failures)
            worker.report(free_pages=256, total_pages=256, moves=(stat,))
            await eventually(lambda stat=stat: made.control.fleet.moves() == [stat])  # type: ignore[misc]
            accepted, _ = await made.submit(request(prompt_tokens=300, salt=str(failures)))
            assert accepted.plan.prefill == (None if failures else prefill.info.incarnation)
            assert accepted.plan.prefill_alternatives == (prefill.info.incarnation,)
            await accepted.cancel()


async def test_a_submission_carries_tenant_priority_and_cost() -> None:
    async with cluster() as made:
        accepted, worker = await made.submit(request(200, tenant="a", priority=3, max_tokens=16, choices=2))
        (message,) = worker.submissions
        assert (message.request.tenant, message.request.priority, message.request.cost) == ("a", 3, 200 + 2 * 16)
        await accepted.cancel()


async def test_requests_wait_at_the_router_while_every_worker_has_enough_waiting() -> None:
    async with cluster(worker_backlog=8) as made:
        (worker,) = made.decode
        worker.report(waiting=8, free_pages=256, total_pages=256)
        await eventually(lambda: made.control.fleet.snapshot().decode[0].status.waiting == 8)
        tasks = [asyncio.create_task(made.dispatcher.submit(request(priority=rank))) for rank in (0, 1)]
        await eventually(lambda: "2 requests waiting" in made.dispatcher.leaks())
        assert worker.submissions == []
        worker.report(waiting=7, free_pages=256, total_pages=256)
        high = await tasks[1]
        assert [message.request.priority for message in worker.submissions] == [1]
        worker.report(waiting=0, dispatches={made.control.fleet.router_id: 1}, free_pages=256, total_pages=256)
        for accepted in (high, await tasks[0]):
            await accepted.cancel()


async def test_who_waits_gets_the_place_of_a_request_that_ends_and_not_a_status_later() -> None:
    async with cluster(worker_backlog=1) as made:
        (worker,) = made.decode
        first = await made.dispatcher.submit(request())
        worker.report(waiting=1, dispatches={made.control.fleet.router_id: 1}, free_pages=256, total_pages=256)
        await eventually(lambda: made.control.fleet.snapshot().decode[0].status.waiting == 1)
        second = asyncio.create_task(made.dispatcher.submit(request()))
        await eventually(lambda: "1 requests waiting" in made.dispatcher.leaks())
        await first.cancel()
        async with asyncio.timeout(3):
            await (await second).cancel()


async def test_a_request_that_is_placed_counts_once_for_those_who_wait() -> None:
    async with cluster(worker_backlog=2) as made:
        (worker,) = made.decode
        worker.hold = asyncio.Event()
        first = asyncio.create_task(made.dispatcher.submit(request()))
        await eventually(lambda: len(worker.submissions) == 1)
        second = asyncio.create_task(made.dispatcher.submit(request()))
        await eventually(lambda: "1 requests waiting" in made.dispatcher.leaks())
        worker.hold.set()
        async with asyncio.timeout(3):
            for accepted in (await first, await second):
                await accepted.cancel()


async def test_more_than_the_bound_is_refused() -> None:
    async with cluster(max_inflight=1, max_queued=0) as made:
        async with await made.dispatcher.submit(request()):
            with pytest.raises(Overloaded, match="1 requests are in flight and 0 wait"):
                await made.dispatcher.submit(request())
        async with await made.dispatcher.submit(request()):
            assert made.dispatcher.inflight == 1


async def test_without_workers_the_answer_is_unavailable() -> None:
    async with cluster(decode=0) as made:
        assert made.dispatcher.model is None
        assert not made.dispatcher.ready()
        with pytest.raises(Unavailable, match="no worker is connected"):
            await made.dispatcher.submit(request())


async def test_draining_workers_get_nothing_new() -> None:
    async with cluster(decode=2) as made:
        made.decode[0].report(draining=True)
        await eventually(lambda: any(view.draining for view in made.control.fleet.snapshot().decode))
        for _ in range(4):
            async with await made.dispatcher.submit(request()) as accepted:
                assert accepted.plan.decode == made.decode[1].info.incarnation
        made.decode[1].report(draining=True)
        await eventually(lambda: not made.dispatcher.ready())
        with pytest.raises(Unavailable, match="every decode worker is draining"):
            await made.dispatcher.submit(request())


async def test_a_cached_conversation_returns_to_its_decode_worker() -> None:
    async with cluster(decode=3, prefill=2) as made:
        asked = request(10 * BLOCK_TOKENS)
        root = HashRoot("tandem", MODEL.fingerprint, "float32")
        hashes = tuple(block_hashes(root.digest(), asked.prompt))
        made.decode[1].publish(CacheEvent(EventKind.STORED, hashes))
        await eventually(lambda: made.control.index.match(hashes))
        async with await made.dispatcher.submit(asked) as accepted:
            assert accepted.plan.decode == made.decode[1].info.incarnation
            assert accepted.plan.prefill is None
            message = made.decode[1].submissions[0]
            assert message.planned_local
            assert message.expected_cached == 10 * BLOCK_TOKENS - 1
            assert {t.incarnation for t in message.prefill} == {w.info.incarnation for w in made.prefill}
        # Another tenant's salt has other hashes: nothing is cached for it.
        salted = GenerateRequest(new_id(), "fake", asked.prompt, asked.sampling, salt="other")
        async with await made.dispatcher.submit(salted) as accepted:
            assert accepted.plan.expected_cached == 0


async def test_a_long_new_prompt_goes_to_a_prefill_worker_when_decode_is_busy() -> None:
    async with cluster(decode=1, prefill=2, policy="cost") as made:
        made.decode[0].report(running=20, free_pages=256, total_pages=256)
        await eventually(lambda: made.control.fleet.snapshot().decode[0].status.running == 20)
        async with await made.dispatcher.submit(request(900)) as accepted:
            target = made.decode[0].submissions[0].prefill[0]
            assert target.incarnation == accepted.plan.prefill == accepted.reply.prefill
            assert target.address in {worker.info.address for worker in made.prefill}


async def test_a_prompt_to_be_scored_is_planned_local_and_as_if_nothing_were_cached() -> None:
    async with cluster(decode=1, prefill=2) as made:
        made.decode[0].report(running=20, free_pages=256, total_pages=256)
        await eventually(lambda: made.control.fleet.snapshot().decode[0].status.running == 20)
        asked = request(900)
        scored = GenerateRequest(new_id(), "fake", asked.prompt, SamplingParams(max_tokens=0, prompt_logprobs=1))
        async with await made.dispatcher.submit(asked), await made.dispatcher.submit(scored) as accepted:
            assert accepted.plan.prefill is None
            assert accepted.plan.expected_cached == 0
            assert [message.planned_local for message in made.decode[0].submissions] == [False, True]


async def test_closing_the_router_ends_requests_with_an_error() -> None:
    async with cluster() as made:
        accepted, worker = await made.submit(request())
        await made.dispatcher.close()
        assert (await read(accepted))[-1].error == "the router is shutting down"
        assert worker.cancelled
