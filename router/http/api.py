"""The routes, and the path of one request from body to answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from router.admission.callers import Callers
from router.admission.quota import Visit
from router.admission.tenants import NOBODY, Tenant
from router.answers.answer import Answer
from router.answers.completion_format import CompletionFormat
from router.answers.responses import DONE, ChatFormat, Format, Json, event, list_json, to_json, with_usage
from router.answers.stream import Piece
from router.backend import Dispatcher
from router.explain.recorder import Recorder
from router.http.body import ClientGone, read_body, while_connected
from router.http.openapi import document
from router.http.problems import envelope, public
from router.http.sse import EventBuffer, EventStream, Flusher, SlowClient
from router.metrics import CONTENT_TYPE, RequestTimer, RouterMetrics
from router.requests.defaults import GenerationDefaults
from router.requests.formats import FormatChoice
from router.requests.job import Endpoint, Job, chat_job, completion_job
from router.requests.messages import chat_turns
from router.requests.openai import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
    parse,
    plain_text,
)
from router.requests.tools import declarations, template_values
from router.siblings import Siblings, merged
from tandem.config import RouterConfig
from tandem.errors import (
    BadRequest,
    ContextTooLong,
    Internal,
    NotFound,
    Overloaded,
    TandemError,
    Unavailable,
    UnknownModel,
)
from tandem.text.prompt import PromptTokenizer
from tandem.types import ModelInfo

log = logging.getLogger(__name__)

ANSWER_HEADERS = "answer_headers"
"""In a scope's state: a function of the headers that every answer to the request gets, an error too."""
ROUTE_HEADER = "x-tandem-route"
MANY = 4096
"""Tokens, or pieces of text, from which what is said of each is written in a thread."""
TEXT_WORK = 64
"""Characters of text that are as much work as one of those."""


JobFrom = Callable[[bytes, Tenant], Awaitable[tuple[Job, GenerationBody]]]
"""A validated job from a body."""


class TextSource(Protocol):
    """Where the tokeniser of a model comes from."""

    async def get(self, model: ModelInfo) -> PromptTokenizer:
        """The model's tokeniser, loaded when first asked for. Raises TandemError when that fails."""
        ...

    async def defaults(self, model: ModelInfo) -> GenerationDefaults:
        """The model's own sampling defaults. Raises as `get`."""
        ...


class Api:
    """The routes. Holds what they share; keeps no state of its own."""

    def __init__(
        self,
        config: RouterConfig,
        dispatcher: Dispatcher,
        texts: TextSource,
        metrics: RouterMetrics,
        stories: Recorder,
        callers: Callers,
        siblings: Siblings | None = None,
        timers: Callable[[RouterMetrics, str, Request], RequestTimer] | None = None,
    ) -> None:
        """siblings: the other processes of this router. timers: make those of requests, where these are traced."""
        self._siblings = siblings
        self._timers = timers or (lambda metrics, endpoint, request: metrics.start(endpoint))
        self._config = config
        self._dispatcher = dispatcher
        self._texts = texts
        self._metrics = metrics
        self._stories = stories
        self._callers = callers
        self._formats = FormatChoice(config)
        self._document: tuple[tuple[bool, str | None], bytes] | None = None
        """The OpenAPI document, and what it was made for; making it takes milliseconds."""
        self._flusher = Flusher()
        self._max_body = int(config.max_body_mib * (1 << 20))

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`"""

        async def job(raw: bytes, tenant: Tenant) -> tuple[Job, GenerationBody]:
            body = parse(ChatBody, raw)
            return await chat_job(body, await self._endpoint(request, body.model, tenant)), body

        return await self._generate(request, "chat", job, ChatFormat)

    async def completion(self, request: Request) -> Response:
        """`POST /v1/completions`"""

        async def job(raw: bytes, tenant: Tenant) -> tuple[Job, GenerationBody]:
            body = parse(CompletionBody, raw)
            return await completion_job(body, await self._endpoint(request, body.model, tenant)), body

        return await self._generate(request, "completion", job, CompletionFormat)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`"""
        self._callers.tenant(request.headers)
        model = self._dispatcher.model
        return _json({"object": "list", "data": [self._card(model)] if model else []})

    async def model_card(self, request: Request) -> Response:
        """`GET /v1/models/{name}`"""
        self._callers.tenant(request.headers)
        return _json(self._card(self._known(request.path_params["name"])))

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`: ids of a text, or of messages under the chat template."""
        return await self._visited(request, self._tokenize)

    async def _visited(self, request: Request, work: Callable[[Request, bytes], Awaitable[Response]]) -> Response:
        """Counts as a request of the caller's while it is worked on."""
        tenant = self._callers.tenant(request.headers)
        raw = await read_body(request, self._max_body)
        with self._enter(request, tenant):
            return await work(request, raw)

    async def _tokenize(self, request: Request, raw: bytes) -> Response:
        body = parse(TokenizeBody, raw)
        to = await self._endpoint(request, body.model)
        tokenizer = to.text.tokenizer
        if (body.prompt is None) == (body.messages is None):
            raise BadRequest("exactly one of prompt and messages is needed", "prompt")
        values = template_values(body.chat_template_kwargs, tokenizer.template_names)
        tools = declarations(body.tools) or None
        if body.messages is not None:
            turns = chat_turns(body.messages, to.formats.can)
            rendered = await tokenizer.render_async(turns, tools, values, body.add_generation_prompt is not False)
            ids = await tokenizer.encode_rendered(rendered, bool(body.add_special_tokens))
        else:
            text = plain_text(body.prompt or "", "prompt")
            ids = await tokenizer.encode_async(text, body.add_special_tokens is not False)
        head = to_json({"count": len(ids), "max_model_len": to.model.max_context})[:-1]

        def page() -> bytes:
            spelled = [tokenizer.token(token) for token in ids] if body.return_token_strs else None
            strings = b"" if spelled is None else b',"token_strs":' + list_json(spelled)
            return head + b',"tokens":' + list_json(ids) + strings + b"}"

        return _body(await asyncio.to_thread(page) if len(ids) >= MANY else page())

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`: text of ids."""
        return await self._visited(request, self._detokenize)

    async def _detokenize(self, request: Request, raw: bytes) -> Response:
        body = parse(DetokenizeBody, raw)
        to = await self._endpoint(request, body.model)
        worst = max(body.tokens, default=0)
        if worst >= to.model.vocab_size:
            raise BadRequest(f"tokens has the id {worst}; ids are 0 to {to.model.vocab_size - 1}", "tokens")
        return _json({"prompt": await to.text.tokenizer.decode_async(body.tokens, bool(body.skip_special_tokens))})

    async def health(self, request: Request) -> Response:
        """`GET /health`: the process lives."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """`GET /ready`: a request could be served now."""
        if self._dispatcher.ready():
            return _json({"status": "ready"})
        return _json({"status": "not ready", "reason": "no decode worker can take a request"}, 503)

    async def explain(self, request: Request) -> Response:
        """`GET /v1/explain/{id}`: why a recent request went where it went, and what came of it."""
        tenant, name = self._callers.tenant(request.headers), request.path_params["id"]
        sees_all = tenant.operator or not tenant.name
        said = self._stories.told(name, None if sees_all else tenant.name, self._dispatcher.address_of)
        if said is None and self._siblings is not None:
            others = await self._siblings.ask("explain", name, *([] if sees_all else [tenant.name]))
            said = next((each for each in others.values() if each), None)
        if said is None:
            why = "only recent ones are remembered, and another router may have served it: ask each"
            raise NotFound(f"nothing is known of a request {name[:64]!r} here; {why}", "id")
        return _body(said)

    async def openapi(self, request: Request) -> Response:
        """`GET /openapi.json`"""
        model = self._dispatcher.model
        about = not self._callers.open, None if model is None else self._served_name(model)
        if self._document is None or self._document[0] != about:
            self._document = about, to_json(document("Tandem", *about))
        return _body(self._document[1])

    async def metrics_page(self, request: Request) -> Response:
        """`GET /metrics` and what is below it: of all processes of this router."""
        self._callers.check_metrics(request.headers)
        name = request.path_params.get("page", "")
        page = self._metrics.page(name)
        said = page.make()
        if self._siblings is not None and page.media_type == CONTENT_TYPE:
            said = merged({self._siblings.index: said, **await self._siblings.ask("metrics", name)})
        return Response(said, media_type=page.media_type)

    async def tell_sibling(self, asked: list[str]) -> bytes:
        """What another process of this router wants to know."""
        match asked:
            case ["metrics", name]:
                return self._metrics.page(name).make()
            case ["explain", name, *tenant]:
                return self._stories.told(name, tenant[0] if tenant else None, self._dispatcher.address_of) or b""
        raise ValueError(f"another process asked for {asked}")

    async def _generate(
        self, request: Request, endpoint: str, job_from: JobFrom, form: Callable[..., Format]
    ) -> Response:
        timer = self._timers(self._metrics, endpoint, request)
        try:
            tenant = self._callers.tenant(request.headers)
            raw = await read_body(request, self._max_body)
            timer.visit = self._enter(request, tenant)
            timer.received()
            answer, out = await while_connected(request.receive, self._start(raw, job_from, form, timer))
            if answer.job.options.stream:
                produce, limit = Streaming(answer, out, timer).produce, self._config.stream_queue
                events = EventStream(produce, limit, self._flusher, len(answer.choices))
                events.headers[ROUTE_HEADER] = answer.route()
                return events
            whole = await while_connected(request.receive, _collect(answer, out))
        except BaseException as error:
            _account(timer, error)
            raise
        usage = answer.usage()
        timer.prompt(usage.prompt_tokens, usage.cached_tokens)
        timer.end("ok")
        response = _body(whole)
        response.headers[ROUTE_HEADER] = answer.route()
        return response

    def _enter(self, request: Request, tenant: Tenant) -> Visit:
        request.scope["state"][ANSWER_HEADERS] = lambda: self._callers.limits(tenant)
        return self._callers.enter(tenant)

    async def _start(
        self, raw: bytes, job_from: JobFrom, form: Callable[..., Format], timer: RequestTimer
    ) -> tuple[Answer, Format]:
        visit = timer.visit
        assert visit is not None
        job, body = await job_from(raw, visit.tenant)
        timer.tokenised(job, body)
        text = await self._texts.get(job.model)
        visit.prompt(sum(len(prompt.ids) for prompt in job.prompts))
        self._metrics.spliced_tokens.inc(sum(prompt.reused for prompt in job.prompts))
        self._metrics.encoded_tokens.inc(sum(len(prompt.ids) - prompt.reused for prompt in job.prompts))
        try:
            answer = await Answer.start(job, self._dispatcher, text, timer)
        except TandemError as error:
            visit.refused()
            # A worker does not know what the client called its prompt and its grammar.
            if isinstance(error, ContextTooLong):
                error.param = job.prompt_field
            elif error.param == "response_format":
                error.param = job.grammar_field
            raise
        timer.accepted()
        if len(job.requests) > 1:
            self._stories.link([each.request_id for each in job.requests])
        return answer, form(job, text.tokenizer)

    async def _endpoint(self, request: Request, name: str | None, tenant: Tenant = NOBODY) -> Endpoint:
        model = self._known(name)
        text, defaults = await self._texts.get(model), await self._texts.defaults(model)
        formats, served = self._formats.of(text.tokenizer), self._served_name(model)
        return Endpoint(request.state.request_id, model, served, text, defaults, formats, tenant)

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

    def _card(self, model: ModelInfo) -> Json:
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
        self._put: Callable[[bytes], None]

    def piece(self, piece: Piece) -> None:
        """See `Give`."""
        made = self._out.chunk(piece)
        self._put(with_usage(made, self._answer.usage()) if self._answer.job.options.continuous_usage else made)

    def text(self, choice: int, text: str) -> None:
        """See `Give`."""
        self._put(self._out.text_chunk(choice, text))

    async def produce(self, buffer: EventBuffer) -> None:
        """Puts all events of the answer. Raises SlowClient and cancellation only; the work has ended then too."""
        self._put = buffer.put
        try:
            # One event, however many choices: nothing may be refused before `run`, which ends the work.
            if opening := b"".join(self._out.opening()):
                buffer.put(opening)
            await self._answer.run(self)
            usage = self._answer.usage()
            if self._answer.job.options.include_usage:
                buffer.put(self._out.usage_chunk(usage))
            buffer.put(DONE)
        except Exception as error:
            _account(self._timer, error)
            if isinstance(error, SlowClient):
                log.warning("cut a client that reads slower than its tokens come")
                raise
            if not isinstance(error, TandemError):
                log.exception("a stream met a defect")
            buffer.put(event(envelope(public(error))))
        except BaseException as error:
            _account(self._timer, error)
            raise
        else:
            self._timer.prompt(usage.prompt_tokens, usage.cached_tokens)
            self._timer.end("ok")


class _Collected:
    """All pieces of an answer that is given whole. Text by the token is one piece up to the next of others."""

    def __init__(self, choices: int) -> None:
        self.pieces: list[list[Piece]] = [[] for _ in range(choices)]
        self._texts: list[list[str]] = [[] for _ in range(choices)]

    def piece(self, piece: Piece) -> None:
        """See `Give`. A choice's end is one, too."""
        if texts := self._texts[piece.choice]:
            self.pieces[piece.choice].append(Piece(piece.choice, "".join(texts)))
            texts.clear()
        self.pieces[piece.choice].append(piece)

    def text(self, choice: int, text: str) -> None:
        """See `Give`."""
        self._texts[choice].append(text)


async def _collect(answer: Answer, out: Format) -> bytes:
    collected = _Collected(len(answer.choices))
    await answer.run(collected)
    pieces, repeated = collected.pieces, answer.job.requests[0].choices  # each choice may echo its prompt
    work = sum(
        1 + len(piece.text) // TEXT_WORK + len(piece.logprobs) + repeated * len(piece.prompt_logprobs)
        for mine in pieces
        for piece in mine
    )
    if work >= MANY:
        return await asyncio.to_thread(lambda: to_json(out.whole(pieces, answer.usage())))
    return to_json(out.whole(pieces, answer.usage()))


def _account(timer: RequestTimer, error: BaseException) -> None:
    """Counts the end of a request that did not succeed."""
    match error:
        case SlowClient():
            timer.end("slow_client", "slow_client")
        case BadRequest() | Overloaded():
            timer.end("refused", error.code or error.type)
        case TandemError():
            log.warning("a request failed: %s", error)
            timer.end("failed", error.code or error.type)
        case Exception() if not isinstance(error, ClientGone):
            timer.end("failed", Internal.type)
        case _:
            timer.end("cancelled")


def _json(value: Json, status: int = 200) -> Response:
    return _body(to_json(value), status)


def _body(page: bytes, status: int = 200) -> Response:
    return Response(page, status, media_type="application/json")
