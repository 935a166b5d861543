"""Workers in this process, joined by real gRPC on loopback, with a client that speaks to them as a router does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from decode_worker.services import build as build_decode
from kvtransfer.backends import Chosen
from kvtransfer.backends.inproc import InprocBackend
from kvtransfer.base import Backend
from prefill_worker.services import build as build_prefill
from tandem.cluster import Role, new_id
from tandem.config import DecodeConfig, PrefillConfig
from tandem.types import Delta, FinishReason, GenerateRequest, SamplingParams, TokenLogprob, Usage
from tandem.wire import codec
from tandem.wire.v1 import decode_pb2, decode_pb2_grpc
from tandem.worker.process import WorkerProcess

ROUTER = "test"
"""The router id of the stream."""


@dataclass
class Answer:
    """What one choice gave."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish: FinishReason | None = None
    error: str = ""
    leaving: bool = False
    usage: Usage | None = None


class Pair:
    """One decode worker, any number of prefill workers, and a stream to the decode worker."""

    def __init__(self, decode: WorkerProcess, prefill: Sequence[WorkerProcess]) -> None:
        self.decode = decode
        self.prefill = list(prefill)
        self._gone: list[WorkerProcess] = []
        self._open: dict[str, list[Answer]] = {}
        self._attempts: dict[str, int] = {}
        self._ended: set[str] = set()
        self._arrived = asyncio.Event()
        self._broken: Exception | None = None
        self._dispatch = 0

    async def connect(self) -> None:
        """Opens the token stream; after `disconnect` it goes on where every open choice was left."""
        self._channel = grpc.aio.insecure_channel(self.decode.info.address)
        self.stub = decode_pb2_grpc.DecodeStub(self._channel)
        resume = [
            decode_pb2.ResumePoint(
                request_id=name, attempt=self._attempts[name], choice=index, next_index=len(answer.tokens)
            )
            for name, answers in self._open.items()
            for index, answer in enumerate(answers)
            if answer.finish is None
        ]
        call = self.stub.Stream(decode_pb2.StreamRequest(router_id=ROUTER, resume=resume))
        await call.read()
        self._reader = asyncio.create_task(self._read(call))

    async def disconnect(self) -> None:
        """Closes the stream, as a router does that dies."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close()

    async def _read(self, call: Any) -> None:
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                for delta in message.deltas:
                    self._take(codec.delta_from_wire(delta))
        except (AssertionError, KeyError, grpc.aio.AioRpcError) as error:
            self._broken = error
            self._arrived.set()

    def _take(self, delta: Delta) -> None:
        answers = self._open[delta.request_id]
        answer = answers[delta.choice]
        assert delta.first_index == len(answer.tokens), "tokens must come without a gap or a repeat"
        assert answer.finish is None, "a choice ends once"
        answer.tokens += delta.tokens
        answer.logprobs += delta.logprobs
        answer.prompt_logprobs = delta.prompt_logprobs or answer.prompt_logprobs
        answer.finish, answer.error, answer.usage = delta.finish, delta.error, delta.usage
        answer.leaving = delta.leaving
        if all(each.finish is not None for each in answers):
            self._ended.add(delta.request_id)
        self._arrived.set()

    async def submit(
        self, prompt: Sequence[int], sampling: SamplingParams, hand_over: bool = True, **fields: Any
    ) -> str:
        """Submits and returns the request id; with `hand_over` all prefill workers are named in order.

        fields: of GenerateRequest.
        """
        request = GenerateRequest(new_id(), "test", tuple(prompt), sampling, **fields)
        await self.send(request, hand_over)
        return request.request_id

    async def send(self, request: GenerateRequest, hand_over: bool = True) -> None:
        """Submits a request as it is; expects its tokens from the start."""
        self._dispatch += 1
        message = decode_pb2.SubmitRequest(
            router_id=ROUTER,
            dispatch=self._dispatch,
            incarnation=self.decode.info.incarnation,
            request=codec.generate_request_to_wire(request),
        )
        for worker in self.prefill if hand_over else ():
            message.prefill.add(incarnation=worker.info.incarnation, address=worker.info.address)
        answers = [Answer(list(request.made(choice))) for choice in range(request.choices)]
        for choice in request.ended:
            answers[choice].finish = FinishReason.STOP
        self._open.setdefault(request.request_id, answers)
        self._attempts[request.request_id] = request.attempt
        await self.stub.Submit(message)

    async def answer(self, request_id: str) -> list[Answer]:
        """Waits for the end of a request; one answer for each choice."""
        await self._until(lambda: request_id in self._ended)
        self._ended.remove(request_id)
        return self._open.pop(request_id)

    async def tokens(self, request_id: str, count: int) -> None:
        """Waits until every choice of a request has `count` tokens."""
        await self._until(lambda: all(len(answer.tokens) >= count for answer in self._open[request_id]))

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._broken is not None:
                raise self._broken
            self._arrived.clear()
            await self._arrived.wait()

    async def generate(self, prompt: Sequence[int], sampling: SamplingParams, **more: Any) -> list[Answer]:
        """`submit` and `answer`."""
        return await self.answer(await self.submit(prompt, sampling, **more))

    async def cancel(self, request_id: str) -> bool:
        """Cancels; whether the worker knew the request."""
        return bool((await self.stub.Cancel(decode_pb2.CancelRequest(request_id=request_id))).known)

    async def stop(self, worker: WorkerProcess) -> None:
        """Ends a worker in an orderly way; a prefill worker stays among those that are named."""
        self._gone.append(worker)
        await worker.stop()

    async def check_leaks(self, within_s: float = 5.0) -> None:
        """Raises AssertionError unless all workers soon hold nothing, and their stores are sound."""
        workers = [worker for worker in (self.decode, *self.prefill) if worker not in self._gone]
        deadline = asyncio.get_running_loop().time() + within_s
        while leaks := [leak for worker in workers for leak in await worker.leaks()]:
            assert asyncio.get_running_loop().time() < deadline, leaks
            await asyncio.sleep(0.02)
        for worker in workers:
            await worker.thread.call(worker.engine.check_integrity)


@contextlib.asynccontextmanager
async def pair(
    model: Path,
    prefill: int = 1,
    backend: Backend | None = None,
    decode_settings: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Pair]:
    """Starts the workers, connects, and at the end checks for leaks and stops everything.

    settings: of both roles (`WorkerConfig`); decode_settings: of the decode worker alone.
    """
    backend = backend or InprocBackend()
    transports = Chosen(backend, (backend,), "as set")
    shared: dict[str, Any] = {"model": str(model), "kv_mib": 8, "threads": 1, **settings}
    prefill_config = PrefillConfig(**shared)
    decode_config = DecodeConfig(**{"local_prefill_tokens": 0, **shared, **(decode_settings or {})})
    senders = [
        WorkerProcess(prefill_config, Role.PREFILL, backend.name, build_prefill(prefill_config, transports))
        for _ in range(prefill)
    ]
    decode = WorkerProcess(decode_config, Role.DECODE, backend.name, build_decode(decode_config, transports))
    started: list[WorkerProcess] = []
    made = Pair(decode, senders)
    try:
        for worker in (*senders, decode):
            await worker.start()
            started.append(worker)
        await made.connect()
        yield made
        await made.check_leaks()
    finally:
        if decode in started:
            await made.disconnect()
        for worker in reversed(started):
            if worker not in made._gone:
                await worker.stop()
