"""The HTTP front door: which route is served by what, and the id that each request gets."""

from __future__ import annotations

import logging

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.http import problems
from router.http.api import ANSWER_HEADERS, Api
from tandem import obs
from tandem.cluster import new_id
from tandem.config import RouterConfig

log = logging.getLogger(__name__)


def create_app(config: RouterConfig, api: Api) -> FastAPI:
    """The router's HTTP application."""
    app = FastAPI(title="Tandem", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    for method, path, handler in (
        ("POST", "/v1/chat/completions", api.chat),
        ("POST", "/v1/completions", api.completion),
        ("GET", "/v1/models", api.models),
        ("GET", "/v1/models/{name:path}", api.model_card),
        ("GET", "/v1/explain/{id}", api.explain),
        ("POST", "/tokenize", api.tokenize),
        ("POST", "/detokenize", api.detokenize),
        ("GET", "/health", api.health),
        ("GET", "/ready", api.ready),
        ("GET", "/metrics", api.metrics_page),
        ("GET", "/metrics/{page}", api.metrics_page),
        ("GET", "/openapi.json", api.openapi),
    ):
        methods = ["GET", "HEAD"] if method == "GET" else [method]
        app.add_api_route(path, handler, methods=methods, response_model=None)
    problems.add_handlers(app)
    app.add_middleware(RequestBoundary)
    if config.cors_origins:
        # Outermost: a browser shows its page an error only if that, too, allows the page's origin.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-tandem-request-id", "x-tandem-route", "retry-after"],
        )
    return app


MAX_CLIENT_ID = 128
"""Characters of a client's own `x-request-id` that are repeated; a longer one is not."""


def client_id(scope: Scope) -> bytes | None:
    """The client's own `x-request-id`, if it is fit for an answer's header and the log."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    fit = 0 < len(given) <= MAX_CLIENT_ID and all(0x21 <= byte <= 0x7E for byte in given)
    return given if fit else None


class RequestBoundary:
    """Middleware: draws each request's id, puts it into the answer's `x-request-id` and into log records.

    Also the last resort for defects: one log record with the traceback, and an answer that tells nothing of it. A
    client's own `x-request-id` comes back to it, but names nothing here: ids name work in the cluster, and two clients
    may choose the same. The request's own is then in `x-tandem-request-id`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_id()
        scope.setdefault("state", {})["request_id"] = request_id

        theirs = client_id(scope)
        ours = [(b"x-request-id", request_id.encode())]
        if theirs is not None:
            ours = [(b"x-request-id", theirs), (b"x-tandem-request-id", request_id.encode())]
            log.debug("request %s is the client's %s", request_id, theirs.decode(), extra=obs.about(request_id))
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                told = scope["state"].get(ANSWER_HEADERS, list)()
                message["headers"] = [*message.get("headers", ()), *ours, *told]
            await send(message)

        with obs.request_context(request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception as error:
                log.exception("a request met a defect")
                if started:
                    return  # without its end: the server cuts the connection
                await problems.response_for(error)(scope, receive, send_with_id)
