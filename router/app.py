"""The HTTP front door: routes, errors in OpenAI's envelope, and the path of one request from body to answer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.answer import Answer
from router.backend import Dispatcher
from router.body import ClientGone, RefusedBody, read_body, while_connected
from router.job import Endpoint, Job, chat_job, completion_job
from router.metrics import CONTENT_TYPE, RequestTimer, RouterMetrics
from router.openai import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, chat_turns, parse, plain_text
from router.responses import DONE, ChatFormat, CompletionFormat, Format, Json, event, to_json
from router.sse import EventBuffer, EventStream, SlowClient
from router.stream import Piece
from tandem import obs
from tandem.cluster import new_id
from tandem.config import RouterConfig
from tandem.errors import BadRequest, Internal, Overloaded, TandemError, TooLarge, Unavailable, UnknownModel
from tandem.text.prompt import PromptTokenizer
from tandem.types import ModelInfo

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1
"""What clients are told to wait after 429 and 503."""


class TextSource(Protocol):
    """Where the tokeniser of a model comes from."""

    async def get(self, model: ModelInfo) -> PromptTokenizer:
        """The model's tokeniser, loaded when first asked for. Raises TandemError when that fails."""
        ...


def create_app(config: RouterConfig, dispatcher: Dispatcher, texts: TextSource, metrics: RouterMetrics) -> FastAPI:
    """The router's HTTP application."""
    app = FastAPI(title="Tandem", docs_url=None, redoc_url=None, redirect_slashes=False)
    api = Api(config, dispatcher, texts, metrics)
    for method, path, handler in (
        ("POST", "/v1/chat/completions", api.chat),
        ("POST", "/v1/completions", api.completion),
        ("GET", "/v1/models", api.models),
        ("GET", "/v1/models/{name:path}", api.model),
        ("POST", "/tokenize", api.tokenize),
        ("POST", "/detokenize", api.detokenize),
        ("GET", "/health", api.health),
        ("GET", "/ready", api.ready),
        ("GET", "/metrics", api.metrics_page),
    ):
        app.add_api_route(path, handler, methods=[method], response_model=None)
    app.add_exception_handler(TandemError, _on_tandem_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_defect)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_middleware(RequestIds)
    return app


class Api:
    """The routes. Holds what they share; keeps no state of its own."""

    def __init__(
        self, config: RouterConfig, dispatcher: Dispatcher, texts: TextSource, metrics: RouterMetrics
    ) -> None:
        self._config = config
        self._dispatcher = dispatcher
        self._texts = texts
        self._metrics = metrics
        self._max_body = int(config.max_body_mib * (1 << 20))

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`"""

        async def job(raw: bytes) -> Job:
            body = parse(ChatBody, raw)
            return await chat_job(body, await self._endpoint(request, body.model))

        return await self._generate(request, "chat", job, ChatFormat)

    async def completion(self, request: Request) -> Response:
        """`POST /v1/completions`"""

        async def job(raw: bytes) -> Job:
            body = parse(CompletionBody, raw)
            return await completion_job(body, await self._endpoint(request, body.model))

        return await self._generate(request, "completion", job, CompletionFormat)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`"""
        model = self._dispatcher.model
        return _json({"object": "list", "data": [self._model_card(model)] if model else []})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{name}`"""
        return _json(self._model_card(self._known(request.path_params["name"])))

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`: ids of a text, or of messages under the chat template."""
        body = parse(TokenizeBody, await read_body(request, self._max_body))
        to = await self._endpoint(request, body.model)
        tokenizer = to.text.tokenizer
        if (body.prompt is None) == (body.messages is None):
            raise BadRequest("exactly one of prompt and messages is needed", "prompt")
        if body.messages is not None:
            turns = chat_turns(body.messages, tokenizer.knows_developer)
            rendered = tokenizer.render(turns, body.add_generation_prompt is not False)
            ids = await tokenizer.encode_async(rendered, bool(body.add_special_tokens))
        else:
            text = plain_text(body.prompt or "", "prompt")
            ids = await tokenizer.encode_async(text, body.add_special_tokens is not False)
        answer: Json = {"count": len(ids), "max_model_len": to.model.max_context, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [tokenizer.token(token) for token in ids]
        return _json(answer)

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`: text of ids."""
        body = parse(DetokenizeBody, await read_body(request, self._max_body))
        to = await self._endpoint(request, body.model)
        worst = max(body.tokens, default=0)
        if worst >= to.model.vocab_size:
            raise BadRequest(f"tokens has the id {worst}; ids are 0 to {to.model.vocab_size - 1}", "tokens")
        return _json({"prompt": to.text.tokenizer.decode(body.tokens, bool(body.skip_special_tokens))})

    async def health(self, request: Request) -> Response:
        """`GET /health`: the process lives."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """`GET /ready`: a request could be served now."""
        if self._dispatcher.ready():
            return _json({"status": "ready"})
        return _json({"status": "not ready", "reason": "no decode worker can take a request"}, 503)

    async def metrics_page(self, request: Request) -> Response:
        """`GET /metrics`"""
        return Response(self._metrics.page(), media_type=CONTENT_TYPE)

    async def _generate(
        self,
        request: Request,
        endpoint: str,
        job_from: Callable[[bytes], Awaitable[Job]],
        form: Callable[..., Format],
    ) -> Response:
        timer = self._metrics.start(endpoint)
        try:
            raw = await read_body(request, self._max_body)
            answer, out = await while_connected(request.receive, self._start(raw, job_from, form, timer))
            if answer.job.options.stream:
                return EventStream(Streaming(answer, out, timer).produce, self._config.stream_queue)
            whole = await while_connected(request.receive, _collect(answer, out))
        except BaseException as error:
            _account(timer, error)
            raise
        usage = answer.usage()
        timer.prompt(usage.prompt_tokens, usage.cached_tokens)
        timer.end("ok")
        return _json(whole)

    async def _start(
        self, raw: bytes, job_from: Callable[[bytes], Awaitable[Job]], form: Callable[..., Format], timer: RequestTimer
    ) -> tuple[Answer, Format]:
        job = await job_from(raw)
        text = await self._texts.get(job.model)
        answer = await Answer.start(job, self._dispatcher, text, timer)
        timer.accepted()
        return answer, form(job, text.tokenizer)

    async def _endpoint(self, request: Request, name: str | None) -> Endpoint:
        model = self._known(name)
        return Endpoint(request.state.request_id, model, self._served_name(model), await self._texts.get(model))

    def _known(self, name: str | None) -> ModelInfo:
        model = self._dispatcher.model
        if model is None:
            raise Unavailable("no decode worker has registered yet")
        served = self._served_name(model)
        if name is not None and name != served:
            raise UnknownModel(f"the model {name[:200]!r} is not served here; {served!r} is", "model")
        return model

    def _served_name(self, model: ModelInfo) -> str:
        return self._config.served_model_name or model.name

    def _model_card(self, model: ModelInfo) -> Json:
        return {
            "id": self._served_name(model),
            "object": "model",
            "created": 0,
            "owned_by": "tandem",
            "max_model_len": model.max_context,
        }


class Streaming:
    """One streamed answer. Its end is always told: `[DONE]` after success, an error event otherwise."""

    def __init__(self, answer: Answer, out: Format, timer: RequestTimer) -> None:
        self._answer = answer
        self._out = out
        self._timer = timer

    async def produce(self, buffer: EventBuffer) -> None:
        """Puts all events of the answer. Raises SlowClient and cancellation only; the work has ended then too."""
        try:
            for chunk in self._out.opening():
                buffer.put(chunk)
            await self._answer.run(lambda piece: buffer.put(self._out.chunk(piece)))
            usage = self._answer.usage()
            if self._answer.job.options.include_usage:
                buffer.put(self._out.usage_chunk(usage))
            buffer.put(DONE)
        except Exception as error:
            _account(self._timer, error)
            if isinstance(error, SlowClient):
                log.warning("cut a client that reads slower than its tokens come")
                raise
            buffer.put(event(_envelope(_public(error))))
        except BaseException as error:
            _account(self._timer, error)
            raise
        else:
            self._timer.prompt(usage.prompt_tokens, usage.cached_tokens)
            self._timer.end("ok")


async def _collect(answer: Answer, out: Format) -> Json:
    pieces: list[list[Piece]] = [[] for _ in answer.choices]
    await answer.run(lambda piece: pieces[piece.choice].append(piece))
    return out.whole(pieces, answer.usage())


def _account(timer: RequestTimer, error: BaseException) -> None:
    """Counts the end of a request that did not succeed."""
    match error:
        case SlowClient():
            timer.end("slow_client", "slow_client")
        case BadRequest() | Overloaded():
            timer.end("refused", error.code or error.type)
        case TandemError():
            timer.end("failed", error.code or error.type)
        case Exception() if not isinstance(error, ClientGone):
            log.error("a request met a defect", exc_info=error)
            timer.end("failed", Internal.type)
        case _:
            timer.end("cancelled")


def _public(error: Exception) -> TandemError:
    """The error as clients may see it: details of defects stay in the log."""
    return error if isinstance(error, TandemError) else Internal("an internal error; the log has the details")


def _envelope(error: TandemError) -> Json:
    return {"error": {"message": str(error), "type": error.type, "param": error.param, "code": error.code}}


def _json(value: Json, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")


async def _on_tandem_error(request: Request, error: Exception) -> Response:
    public = _public(error)
    kind = RefusedBody if isinstance(public, TooLarge) else Response
    response = kind(to_json(_envelope(public)), public.http_status, media_type="application/json")
    if public.http_status in (429, 503):
        response.headers["retry-after"] = str(RETRY_AFTER_S)
    return response


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is no route {request.url.path[:200]}",
        405: f"{request.method} is not allowed on {request.url.path[:200]}",
    }.get(error.status_code, str(error.detail))
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    response = _json(body, error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _on_defect(request: Request, error: Exception) -> Response:
    public = _public(error)
    return _json(_envelope(public), public.http_status)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    """Nobody reads this; 499 is nginx's number for it."""
    return Response(status_code=499)


class RequestIds:
    """Middleware: draws each request's id, puts it into the answer's `x-request-id` and into log records.

    A client's own id is not taken over: ids name work in the cluster, and two clients may choose the same.
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

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        with obs.request_context(request_id):
            await self._app(scope, receive, send_with_id)
