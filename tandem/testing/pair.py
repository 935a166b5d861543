"""Workers in this process, joined by real gRPC on loopback and a transport of choice, with a client that speaks to them as a router does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
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


@dataclass
class Answer:
    """What one choice gave."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish: FinishReason | None = None
    error: str = ""
    usage: Usage | None = None


class Pair:
    """One decode worker, any number of prefill workers, and a stream to the decode worker."""

    def __init__(self, decode: WorkerProcess, prefill: Sequence[WorkerProcess]) -> None:
        self.decode = decode
        self.prefill = list(prefill)
        self._open: dict[str, list[Answer]] = {}
        self._done: dict[str, asyncio.Event] = {}
        self._dispatch = 0

    async def connect(self) -> None:
        """Opens the token stream."""
        self._channel = grpc.aio.insecure_channel(self.decode.info.address)
        self._stub = decode_pb2_grpc.DecodeStub(self._channel)
        call = self._stub.Stream(decode_pb2.StreamRequest(router_id="test"))
        await call.read()
        self._reader = asyncio.create_task(self._read(call))

    async def close(self) -> None:
        """Closes the stream."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close()

    async def _read(self, call: Any) -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            for delta in message.deltas:
                self._take(codec.delta_from_wire(delta))

    def _take(self, delta: Delta) -> None:
        answers = self._open[delta.request_id]
        answer = answers[delta.choice]
        assert delta.first_index == len(answer.tokens), "tokens must come without a gap or a repeat"
        assert answer.finish is None, "a choice ends once"
        answer.tokens += delta.tokens
        answer.logprobs += delta.logprobs
        answer.prompt_logprobs = delta.prompt_logprobs or answer.prompt_logprobs
        answer.finish, answer.error, answer.usage = delta.finish, delta.error, delta.usage
        if all(each.finish is not None for each in answers):
            self._done[delta.request_id].set()

    async def submit(
        self, prompt: Sequence[int], sampling: SamplingParams, choices: int = 1, hand_over: bool = True, salt: str = ""
    ) -> str:
        """Submits and returns the request id; with `hand_over` all prefill workers are named in order."""
        request = GenerateRequest(new_id(), "test", tuple(prompt), sampling, choices=choices, salt=salt)
        self._open[request.request_id] = [Answer() for _ in range(choices)]
        self._done[request.request_id] = asyncio.Event()
        self._dispatch += 1
        message = decode_pb2.SubmitRequest(
            router_id="test",
            dispatch=self._dispatch,
            incarnation=self.decode.info.incarnation,
            request=codec.generate_request_to_wire(request),
        )
        if hand_over:
            for worker in self.prefill:
                message.prefill.add(incarnation=worker.info.incarnation, address=worker.info.address)
        await self._stub.Submit(message)
        return request.request_id

    async def answer(self, request_id: str) -> list[Answer]:
        """Waits for the end of a request; one answer for each choice."""
        await self._done[request_id].wait()
        del self._done[request_id]
        return self._open.pop(request_id)

    async def generate(self, prompt: Sequence[int], sampling: SamplingParams, **more: Any) -> list[Answer]:
        """`submit` and `answer`."""
        return await self.answer(await self.submit(prompt, sampling, **more))

    async def cancel(self, request_id: str) -> bool:
        """Cancels; whether the worker knew the request."""
        return bool((await self._stub.Cancel(decode_pb2.CancelRequest(request_id=request_id))).known)

    async def check_leaks(self, within_s: float = 5.0) -> None:
        """Raises AssertionError unless all workers soon hold nothing, and their stores are sound."""
        workers = [self.decode, *self.prefill]
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
            await made.close()
        for worker in reversed(started):
            await worker.stop()
