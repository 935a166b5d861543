"""The router's side: a stream that is lost and comes back, a router that vanishes, and submissions that are fenced."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from tandem.cluster import new_id
from tandem.errors import ContextTooLong, Fenced, Overloaded, TandemError
from tandem.testing.pair import Answer, Pair, pair
from tandem.types import Delta, FinishReason, GenerateRequest, SamplingParams
from tandem.wire import codec
from tandem.wire.failures import error_of_rpc
from tandem.wire.v1 import decode_pb2

PROMPT = tuple(range(10, 110))
GREEDY = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True, logprobs=1)
LONG = SamplingParams(temperature=0.0, max_tokens=1500, ignore_eos=True)


async def refusal(sending: object) -> TandemError:
    """The error that a submission ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await sending  # type: ignore[misc]
    return error_of_rpc(caught.value)


def message(workers: Pair, request: GenerateRequest, **fields: object) -> decode_pb2.SubmitRequest:
    values = {"router_id": "test", "dispatch": 1, "incarnation": workers.decode.info.incarnation, **fields}
    return decode_pb2.SubmitRequest(request=codec.generate_request_to_wire(request), **values)  # type: ignore[arg-type]


async def read_deltas(stream: Any) -> list[Delta]:
    """The next message's."""
    return [codec.delta_from_wire(delta) for delta in (await stream.read()).deltas]


async def test_a_lost_stream_is_resumed_without_gap_or_repeat(small_model: Path) -> None:
    """The client checks every index; also tokens that were on their way when the stream broke come again."""
    async with pair(small_model) as workers:
        (expected,) = await workers.generate(PROMPT, GREEDY)
        name = await workers.submit(PROMPT, GREEDY, choices=2)
        for count in (1, 20, 40):
            await workers.tokens(name, count)
            await workers.disconnect()
            await workers.connect()
        for answer in await workers.answer(name):
            assert (answer.tokens, answer.finish) == (expected.tokens, FinishReason.LENGTH)
            assert [entry.token for entry in answer.logprobs] == expected.tokens


async def test_what_ended_while_the_router_was_away_is_told_when_it_is_back(small_model: Path) -> None:
    async with pair(small_model, prefill=0) as workers:
        name = await workers.submit(PROMPT, GREEDY)
        await workers.tokens(name, 5)
        await workers.disconnect()
        while (await workers.decode.thread.call(workers.decode.engine.status)).running:
            await asyncio.sleep(0.005)
        await workers.connect()
        (answer,) = await workers.answer(name)
        assert (len(answer.tokens), len(answer.logprobs), answer.finish) == (200, 200, FinishReason.LENGTH)


async def test_a_second_stream_takes_over_and_ends_the_first(small_model: Path) -> None:
    async with pair(small_model, prefill=0) as workers:
        request = GenerateRequest(new_id(), "m", PROMPT, GREEDY)
        former = workers.stub.Stream(decode_pb2.StreamRequest(router_id="raw"))
        await former.read()
        await workers.stub.Submit(message(workers, request, router_id="raw"))
        tokens = list((await read_deltas(former))[0].tokens)
        point = decode_pb2.ResumePoint(request_id=request.request_id, next_index=len(tokens))
        newer = workers.stub.Stream(decode_pb2.StreamRequest(router_id="raw", resume=[point]))
        await newer.read()
        while await former.read() is not grpc.aio.EOF:
            continue  # what had been sent to it before
        while len(tokens) < 200:
            for delta in await read_deltas(newer):
                assert delta.first_index == len(tokens)
                tokens += delta.tokens
        newer.cancel()
    assert len(tokens) == 200


async def test_a_vanished_router_s_requests_end_after_its_lease(small_model: Path) -> None:
    async with pair(small_model, lease_s=0.4) as workers:
        name = await workers.submit(PROMPT, LONG)
        other = await workers.submit(PROMPT, LONG, choices=2)
        await workers.tokens(name, 1)
        engine = workers.decode.engine
        engine.has_work = lambda: False  # type: ignore[method-assign] # however fast it is, it is not done before
        await workers.disconnect()
        record = workers.decode.services.worker._requests[name]  # type: ignore[attr-defined]
        while not record.finished:
            await asyncio.sleep(0.01)
        assert {choice.finish for choice in record.choices} == {FinishReason.CANCELLED}
        del engine.has_work
        await workers.check_leaks()
        await workers.connect()
        for request in (name, other):
            for answer in await workers.answer(request):
                assert answer.finish in (FinishReason.CANCELLED, FinishReason.ERROR)
        (after,) = await workers.generate(PROMPT, GREEDY)
        assert after.finish is FinishReason.LENGTH


async def test_a_router_that_is_back_within_the_lease_loses_nothing(small_model: Path) -> None:
    async with pair(small_model, prefill=0, lease_s=30.0) as workers:
        name = await workers.submit(PROMPT, GREEDY)
        await workers.disconnect()
        await workers.connect()
        (answer,) = await workers.answer(name)
        assert (len(answer.tokens), answer.finish) == (200, FinishReason.LENGTH)


async def test_records_are_kept_for_a_lease_and_then_forgotten(small_model: Path) -> None:
    async with pair(small_model, prefill=0, lease_s=0.2) as workers:
        request = GenerateRequest(new_id(), "m", PROMPT, SamplingParams(max_tokens=1))
        await workers.send(request)
        await workers.answer(request.request_id)
        records = workers.decode.services.worker._requests  # type: ignore[attr-defined]
        assert isinstance(await refusal(workers.stub.Submit(message(workers, request))), Fenced)
        while request.request_id in records:
            await asyncio.sleep(0.01)


async def test_a_repeated_or_older_attempt_is_fenced(small_model: Path) -> None:
    async with pair(small_model, prefill=0) as workers:
        request = GenerateRequest(new_id(), "m", PROMPT, LONG, attempt=1)
        await workers.send(request)
        for attempt in (1, 0):
            again = GenerateRequest(request.request_id, "m", PROMPT, LONG, attempt=attempt)
            error = await refusal(workers.stub.Submit(message(workers, again)))
            assert isinstance(error, Fenced)
            assert f"attempt {attempt} was submitted before" in str(error)
        assert await workers.cancel(request.request_id) is False  # that of attempt 0
        cancel = decode_pb2.CancelRequest(request_id=request.request_id, attempt=1)
        assert (await workers.stub.Cancel(cancel)).known


async def test_a_newer_attempt_replaces_the_older_one(small_model: Path) -> None:
    async with pair(small_model, prefill=0) as workers:
        stream = workers.stub.Stream(decode_pb2.StreamRequest(router_id="raw"))
        await stream.read()
        first = GenerateRequest(new_id(), "m", PROMPT, LONG)
        second = replace(first, sampling=GREEDY, attempt=1)
        tokens: dict[int, list[int]] = {0: [], 1: []}
        ends: dict[int, FinishReason] = {}
        replaced = False
        await workers.stub.Submit(message(workers, first, router_id="raw"))
        while 1 not in ends:
            for delta in await read_deltas(stream):
                assert delta.first_index == len(tokens[delta.attempt])
                tokens[delta.attempt] += delta.tokens
                if delta.finish is not None:
                    ends[delta.attempt] = delta.finish
            if tokens[0] and not replaced:
                replaced = True
                await workers.stub.Submit(message(workers, second, router_id="raw"))
        assert ends == {0: FinishReason.CANCELLED, 1: FinishReason.LENGTH}
        assert tokens[1][: len(tokens[0])] == tokens[0][:200]
        stream.cancel()


async def test_another_incarnation_s_request_is_refused(small_model: Path) -> None:
    async with pair(small_model, prefill=0) as workers:
        request = GenerateRequest(new_id(), "m", PROMPT, LONG)
        error = await refusal(workers.stub.Submit(message(workers, request, incarnation="f" * 32)))
        assert isinstance(error, Fenced)
        assert workers.decode.info.incarnation in str(error)


async def test_without_a_stream_nothing_is_admitted(small_model: Path) -> None:
    async with pair(small_model, prefill=0) as workers:
        request = GenerateRequest(new_id(), "m", PROMPT, LONG)
        error = await refusal(workers.stub.Submit(message(workers, request, router_id="other")))
        assert isinstance(error, Fenced)
        assert "stream" in str(error)


async def test_bounds_are_refused_with_their_own_errors(small_model: Path) -> None:
    async with pair(small_model, prefill=0, max_running=1, max_waiting=1, pages=16) as workers:
        long = GenerateRequest(new_id(), "m", PROMPT, SamplingParams(max_tokens=200))
        error = await refusal(workers.stub.Submit(message(workers, long)))
        assert isinstance(error, ContextTooLong)
        assert "300 together; at most 256 fit" in str(error)
        names = [await workers.submit(PROMPT, SamplingParams(max_tokens=150, ignore_eos=True)) for _ in range(2)]
        third = GenerateRequest(new_id(), "m", PROMPT, SamplingParams(max_tokens=1))
        assert isinstance(await refusal(workers.stub.Submit(message(workers, third))), Overloaded)
        for name in names:
            assert (await workers.answer(name))[0].finish is FinishReason.LENGTH


async def test_status_names_the_last_dispatch_of_each_router(small_model: Path) -> None:
    async with pair(small_model, prefill=0) as workers:
        for dispatch in (5, 3):
            request = GenerateRequest(new_id(), "m", PROMPT, SamplingParams(max_tokens=1))
            workers._open[request.request_id] = [Answer()]
            await workers.stub.Submit(message(workers, request, dispatch=dispatch))
            await workers.answer(request.request_id)
        assert workers.decode.services.report().dispatches == {"test": 5}


async def test_a_dispatch_is_named_only_once_the_engine_has_its_load(small_model: Path) -> None:
    """Else a worker whose step takes long looks idle to the router that just sent it something."""
    async with pair(small_model, prefill=0) as workers:
        services: Any = workers.decode.services
        worker, step = services.worker, threading.Event()
        workers.decode.thread.post(step.wait)
        submitting = asyncio.create_task(workers.submit(PROMPT, SamplingParams(max_tokens=1)))
        while not worker.open_requests:
            await asyncio.sleep(0.005)
        assert worker.dispatches == {}
        step.set()
        await workers.answer(await submitting)
        assert worker.dispatches == {"test": 1}


async def test_a_status_counts_choices_that_wait_for_the_first_one(small_model: Path) -> None:
    """The router booked a sequence for each choice, and forgets that once the status includes the request."""
    async with pair(small_model, prefill=0) as workers:
        step = threading.Event()
        workers.decode.thread.post(step.wait)
        submitting = asyncio.create_task(workers.submit(PROMPT, SamplingParams(max_tokens=2, temperature=0), choices=4))
        while workers.decode.services.report().waiting != 3:
            await asyncio.sleep(0.005)
        step.set()
        await workers.answer(await submitting)
        assert workers.decode.services.report().waiting == 0
