"""The exception tree, and the one table that maps it to HTTP and gRPC.

TandemError
├── BadRequest            the client's fault: 400
│   ├── ContextTooLong
│   ├── UnknownModel      404
│   ├── NotFound          404
│   ├── Unauthorized      401
│   ├── TooLarge          413
│   └── Quarantined       workers died of it
├── Overloaded            429: try again later
│   └── RateLimited
├── Unavailable           503: no worker can serve this now
├── WorkerLost            502: the worker died and the request could not go on
├── Fenced                a message of an old attempt or incarnation
├── CheckpointError       start-up: the checkpoint cannot be served
├── ConfigError           start-up: a setting is wrong
└── Internal              500
"""

from __future__ import annotations

import re
from typing import ClassVar


class TandemError(Exception):
    """Base of all errors that Tandem raises on purpose. `str()` is one line fit for a client."""

    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"
    type: ClassVar[str] = "internal_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, param: str | None = None, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.param = param
        """The request field or setting at fault, when there is one."""
        self.retry_s = retry_s
        """Seconds after which trying again may help, when that is known."""


class BadRequest(TandemError):
    """The request itself is wrong; sending it again cannot help."""

    http_status = 400
    grpc_code = "INVALID_ARGUMENT"
    type = "invalid_request_error"


class ContextTooLong(BadRequest):
    """Prompt plus output exceed what the model or the worker's pages hold."""

    code = "context_length_exceeded"


class UnknownModel(BadRequest):
    """The model named is not served here."""

    http_status = 404
    grpc_code = "NOT_FOUND"
    code = "model_not_found"


class NotFound(BadRequest):
    """What the path names is not known here."""

    http_status = 404
    grpc_code = "NOT_FOUND"
    code = "not_found"


class Unauthorized(BadRequest):
    """The request carries no API key, or one that is not known."""

    http_status = 401
    code = "invalid_api_key"


class TooLarge(BadRequest):
    """The body exceeds the limit."""

    http_status = 413
    code = "request_too_large"


class Quarantined(BadRequest):
    """Workers died while they ran a request like this one."""

    code = "quarantined"


class Overloaded(TandemError):
    """A bound was reached; the client may retry later."""

    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"
    type = "rate_limit_error"
    code = "overloaded"


class RateLimited(Overloaded):
    """The tenant has used up what it may use."""

    code = "rate_limit_exceeded"


class Unavailable(TandemError):
    """No worker can take this now."""

    http_status = 503
    grpc_code = "UNAVAILABLE"
    type = "service_unavailable"
    code = "unavailable"


class WorkerLost(TandemError):
    """The worker that owned the request is gone and the request cannot go on."""

    http_status = 502
    grpc_code = "ABORTED"
    type = "worker_lost"
    code = "worker_lost"


class Fenced(TandemError):
    """A message names an attempt or an incarnation that is no longer current."""

    http_status = 409
    grpc_code = "FAILED_PRECONDITION"
    type = "fenced"


class CheckpointError(TandemError):
    """A checkpoint cannot be served; the text says which file, tensor or field and what was expected."""


class ConfigError(TandemError):
    """A setting is wrong; the text names it and the limit."""


class Internal(TandemError):
    """A defect of Tandem's own; details are in the log only."""


_MEMORY = re.compile(r"0x[0-9a-fA-F]{5,}")
_HEX = r"[0-9A-Fa-f]{1,4}"
_HEXES = rf"{_HEX}(?::{_HEX})*"
_WHERE = re.compile(
    # IPv6 without a port, then host:port; gRPC writes the brackets of IPv6 as %5B and %5D.
    rf"(?<![\w:])(?:ipv6:)?(?:(?:{_HEX}:){{7}}{_HEX}|(?:{_HEXES})?::(?:{_HEXES})?)(?:\.[0-9]{{1,3}}){{0,3}}(?:%\w+)?(?!\w|:[\w:])"
    r"|(?:ipv[46]:|unix:)?(?:(?:\[|%5[Bb])[0-9A-Fa-f:.]+(?:%(?!5[Dd])\w+)?(?:\]|%5[Dd])"
    r"|[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*):[0-9]{2,5}\b"
    r"|\b[0-9]{1,3}(?:\.[0-9]{1,3}){3}\b"
    r"|(?<![\w./])(?:/[\w.@+~-]+){2,}/?"  # a path
)
_LONGEST = 400


def without_internals(error: TandemError) -> str:
    """The text of an error as clients may see it: one short line without addresses of any kind, paths or tracebacks.

    What a client got wrong is told in its own words, paths included.
    """
    text = " ".join(str(error)[: 2 * _LONGEST].split("Traceback (most recent call last)")[0].split())
    text = _MEMORY.sub("0x?", text)
    if not isinstance(error, BadRequest):
        text = _WHERE.sub("?", text)
    text = text or "an internal error; the log has the details"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


BY_GRPC_CODE: dict[str, type[TandemError]] = {
    kind.grpc_code: kind for kind in (Internal, Fenced, WorkerLost, Unavailable, Overloaded, UnknownModel, BadRequest)
}
