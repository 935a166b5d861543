"""How a TandemError crosses gRPC: its code, its text, and its class and `param` in the trailing metadata."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
import grpc.aio

from tandem import errors
from tandem.errors import BY_GRPC_CODE, Internal, TandemError, Unavailable

ERROR_KEY = "tandem-error"
"""Trailing metadata: the class, because several share one gRPC code."""
PARAM_KEY = "tandem-param"

_BY_NAME: dict[str, type[TandemError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, TandemError)
}


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: TandemError) -> NoReturn:
    """Ends a servicer's call with `error`; `error_of_rpc` makes an equal one of it at the caller."""
    metadata: list[tuple[str, str | bytes]] = [(ERROR_KEY, type(error).__name__)]
    if error.param is not None:
        metadata.append((PARAM_KEY, error.param.encode("ascii", "backslashreplace").decode()))
    await context.abort(grpc.StatusCode[error.grpc_code], str(error), tuple(metadata))
    raise AssertionError("abort returned")


def was_refused(failure: grpc.aio.AioRpcError) -> bool:
    """Whether the servicer itself ended the call; otherwise it may have done what was asked."""
    return any(key == ERROR_KEY for key, _ in failure.trailing_metadata() or ())


def error_of_rpc(failure: grpc.aio.AioRpcError) -> TandemError:
    """The TandemError a servicer aborted with; for a failure of gRPC's own, the one of its code.

    A deadline or a cancelled connection is Unavailable; a code nobody sends on purpose is Internal.
    """
    sent = dict(failure.trailing_metadata() or ())
    text = failure.details() or failure.code().name
    kind = _BY_NAME.get(str(sent.get(ERROR_KEY, "")))
    if kind is None:
        if failure.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
            kind = Unavailable
        else:
            kind = BY_GRPC_CODE.get(failure.code().name, Internal)
    param = sent.get(PARAM_KEY)
    return kind(text, param=None if param is None else str(param))
