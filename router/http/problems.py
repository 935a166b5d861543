"""Errors as clients see them: OpenAI's envelope, from one line of text each."""

from __future__ import annotations

import math

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from router.answers.responses import Json, to_json
from router.http.body import ClientGone, RefusedBody
from tandem.errors import Internal, Quarantined, TandemError, TooLarge, Unauthorized, without_internals

RETRY_AFTER_S = 1
"""What clients are told to wait after 429 and 503 when nothing better is known."""


def add_handlers(app: FastAPI) -> None:
    """Makes every error that a route can raise, and routing's own, an answer in the envelope."""
    app.add_exception_handler(TandemError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientGone, _on_client_gone)


def public(error: Exception) -> TandemError:
    """The error as clients may see it: details of defects stay in the log."""
    return error if isinstance(error, TandemError) else Internal("an internal error; the log has the details")


def envelope(error: TandemError) -> Json:
    """OpenAI's error object."""
    return {
        "error": {"message": without_internals(error), "type": error.type, "param": error.param, "code": error.code}
    }


async def _on_error(request: Request, error: Exception) -> Response:
    return response_for(error)


def response_for(error: Exception) -> Response:
    """The answer to a request that met `error`."""
    shown = public(error)
    kind = RefusedBody if isinstance(shown, TooLarge | Unauthorized) else Response
    response = kind(to_json(envelope(shown)), shown.http_status, media_type="application/json")
    if shown.http_status in (429, 503):
        response.headers["retry-after"] = str(max(math.ceil(shown.retry_s or RETRY_AFTER_S), 1))
    if isinstance(shown, Quarantined):
        response.headers["x-should-retry"] = "false"
    if isinstance(shown, Unauthorized):
        response.headers["www-authenticate"] = "Bearer"
    return response


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is no route {request.url.path[:200]}",
        405: f"{request.method} is not allowed on {request.url.path[:200]}",
    }.get(error.status_code, str(error.detail))
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return Response(to_json(body), error.status_code, dict(error.headers or {}), "application/json")


async def _on_client_gone(request: Request, error: Exception) -> Response:
    """Nobody reads this; 499 is nginx's number for it."""
    return Response(status_code=499)
