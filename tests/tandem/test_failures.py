"""Errors cross a real gRPC call with class, text and param intact."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from tandem import errors
from tandem.errors import TandemError
from tandem.wire.failures import abort_with, error_of_rpc
from tandem.wire.v1 import decode_pb2, decode_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class _Refusing(decode_pb2_grpc.DecodeServicer):
    def __init__(self, error: TandemError) -> None:
        self._error = error

    async def Cancel(self, request: decode_pb2.CancelRequest, context: Context) -> decode_pb2.CancelReply:
        await abort_with(context, self._error)

    async def Submit(self, request: decode_pb2.SubmitRequest, context: Context) -> decode_pb2.SubmitReply:
        context.set_code(grpc.StatusCode.UNIMPLEMENTED)
        return decode_pb2.SubmitReply()

    async def Stream(
        self, request: decode_pb2.StreamRequest, context: Context
    ) -> AsyncIterator[decode_pb2.StepMessage]:
        yield decode_pb2.StepMessage()


async def _call(error: TandemError, method: str = "Cancel") -> TandemError:
    server = grpc.aio.server()
    decode_pb2_grpc.add_DecodeServicer_to_server(_Refusing(error), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = decode_pb2_grpc.DecodeStub(channel)
            call: Callable[[object], Awaitable[object]] = getattr(stub, method)
            request = decode_pb2.CancelRequest() if method == "Cancel" else decode_pb2.SubmitRequest()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(request)
            return error_of_rpc(caught.value)
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    "error",
    [
        errors.ContextTooLong("prompt is 9 tokens; at most 8 fit", param="messages"),
        errors.Overloaded("1,024 requests wait; limit 1024"),
        errors.Fenced("attempt 0 is older than 1"),
        errors.UnknownModel("model 'ä' is not served", param="mödel"),
        errors.Internal("see the log"),
    ],
)
def test_a_tandem_error_survives(error: TandemError) -> None:
    got = asyncio.run(_call(error))
    assert type(got) is type(error)
    assert str(got) == str(error)
    assert got.param == (None if error.param is None else error.param.encode("ascii", "backslashreplace").decode())


def test_failures_of_grpc_itself() -> None:
    assert type(asyncio.run(_call(errors.Internal("x"), "Submit"))) is errors.Internal  # UNIMPLEMENTED

    async def unreachable() -> TandemError:
        async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await decode_pb2_grpc.DecodeStub(channel).Cancel(decode_pb2.CancelRequest())
            return error_of_rpc(caught.value)

    assert type(asyncio.run(unreachable())) is errors.Unavailable
