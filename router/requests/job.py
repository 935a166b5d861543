"""From a validated body to work for the cluster: prompts tokenised, lengths checked, defaults filled."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from router.admission.tenants import NOBODY, Tenant
from router.requests.defaults import GenerationDefaults
from router.requests.echo import Echo, echo_of
from router.requests.formats import AssistantTurn, ModelFormats, assistant_turn, check_tools
from router.requests.messages import chat_turns
from router.requests.openai import ChatBody, CompletionBody, GenerationBody, StreamOptions, prompts, stop_strings
from router.requests.sampling import check_ids, output_room, sampling_params
from router.requests.structured import grammar_field, grammar_of
from router.requests.tool_grammar import calls_grammar
from router.requests.tools import ToolUse, template_values, tool_use
from tandem.cluster import new_id
from tandem.errors import BadRequest
from tandem.text.formats.answer import AnswerFormat
from tandem.text.prompt import Prompt, PromptTokenizer
from tandem.types import MAX_CHOICES, GenerateRequest, Grammar, ModelInfo

COMPLETION_TOKENS = 16
"""Output tokens of /v1/completions when the client names no limit; OpenAI's default."""
MAX_TOTAL_CHOICES = 8 * MAX_CHOICES
"""Choices over all prompts of one body."""
MAX_ECHOED = 1 << 21
"""Log-probabilities of echoed prompts in one answer: each choice of a prompt repeats the prompt's."""


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """How the tokens of a choice become the client's text."""

    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    """Stop strings are not looked for in this many first tokens."""
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    """Every chunk of a stream tells the usage so far."""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    """As the client asked for them; an echo's come with `logprobs`."""
    form: AnswerFormat | None = None
    """How tool calls and reasoning stand in the text; None: all of it is text."""
    special: frozenset[int] = frozenset()
    """Special tokens that are text nevertheless: `form` needs them."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a job is made for: the model and its tokeniser, and the id and name that answers carry."""

    job_id: str
    model: ModelInfo
    served_name: str
    text: PromptTokenizer
    defaults: GenerationDefaults
    formats: ModelFormats
    tenant: Tenant = NOBODY


@dataclass(frozen=True, slots=True)
class Asked:
    """What the endpoints call by different names, for every prompt of a body alike."""

    prompt_field: str
    limit_field: str
    limit: int | None
    """Output tokens; None where the client says nothing."""
    usual_limit: int | None
    """What the model's author recommends then; None leaves all of the context."""
    choices: int
    logprobs: int | None
    prompt_logprobs: int | None
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request: what to ask of the cluster, one `GenerateRequest` a prompt, and what to make of it."""

    job_id: str
    """What the client sees; also the first request's id."""
    model: ModelInfo
    served_name: str
    """The model's name in answers."""
    requests: tuple[GenerateRequest, ...]
    prompts: tuple[Prompt, ...]
    echo: tuple[Echo, ...]
    """What each prompt's choices start with; empty unless the client asked for it."""
    options: OutputOptions
    keep: int
    """Choices of each prompt that are answered; fewer than a request has where the best are wanted."""
    prompt_field: str
    """Where the client put its prompt, for errors about it."""
    grammar_field: str | None
    """Where it asked for structured output."""


async def chat_job(body: ChatBody, to: Endpoint) -> Job:
    """Raises BadRequest naming the field at fault."""
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    prompt, use, turn = await _chat_prompt(body, to, to.model.max_context - (1 if limit is None else limit))
    asked = Asked(
        prompt_field="messages",
        limit_field="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        limit=limit,
        usual_limit=to.defaults.max_new_tokens,
        choices=body.n or 1,
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
        grammar=_chat_grammar(body, to.formats, use, turn),
    )
    return Job(
        job_id=to.job_id,
        model=to.model,
        served_name=to.served_name,
        requests=(_request(body, to, prompt, asked, to.job_id),),
        prompts=(prompt,),
        echo=(Echo(),),
        options=_options(body, logprobs, turn),
        keep=asked.choices,
        prompt_field=asked.prompt_field,
        grammar_field=grammar_field(body),
    )


def _chat_grammar(body: ChatBody, formats: ModelFormats, use: ToolUse, turn: AssistantTurn) -> Grammar | None:
    grammar = grammar_of(body, turn.thoughts_end)
    if not use.tools:
        return grammar
    if grammar is not None:
        field = grammar_field(body)
        raise BadRequest(f"{field} together with tools is not supported yet", field)
    return calls_grammar(use, formats, turn.thoughts_end)


async def _chat_prompt(body: ChatBody, to: Endpoint, room: int) -> tuple[Prompt, ToolUse, AssistantTurn]:
    tokenizer = to.text.tokenizer
    use = tool_use(body)
    check_tools(use, to.formats)
    turns = chat_turns(body.messages, to.formats.can)
    values = template_values(body.chat_template_kwargs, tokenizer.template_names)
    rendered = await tokenizer.render_async(turns, use.tools or None, values)
    turn = assistant_turn(body, use, to.formats, rendered, tokenizer.encode)
    salt = to.tenant.salt_of(body.cache_salt or "")
    return await to.text.rendered(rendered + turn.prefill, salt, room), use, turn


async def completion_job(body: CompletionBody, to: Endpoint) -> Job:
    """Raises BadRequest naming the field at fault."""
    given, keep = prompts(body.prompt), body.n or 1
    made = max(body.best_of or 1, keep)
    if len(given) * made > MAX_TOTAL_CHOICES:
        raise BadRequest(f"{len(given)} prompts times n or best_of exceed {MAX_TOTAL_CHOICES} choices", "n")
    scored = bool(body.echo) and body.logprobs is not None
    # The best are known by their log-probabilities.
    logprobs = body.logprobs if made == keep else body.logprobs or 0
    asked = Asked(
        prompt_field="prompt",
        limit_field="max_tokens",
        limit=COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
        usual_limit=None,
        choices=made,
        logprobs=logprobs,
        prompt_logprobs=max(body.logprobs or 0, body.prompt_logprobs or 0) if scored else body.prompt_logprobs,
        grammar=grammar_of(body),
    )
    requests: list[GenerateRequest] = []
    tokenised, echo = [], []
    add_special, echoed = body.add_special_tokens is not False, 0
    for each in given:
        await asyncio.sleep(0)  # short texts are tokenised at once, and there may be many
        prompt = await to.text.plain(each, add_special) if isinstance(each, str) else Prompt(tuple(each))
        requests.append(_request(body, to, prompt, asked, new_id() if requests else to.job_id))
        tokenised.append(prompt)
        echoed += len(prompt.ids) * made * ((body.logprobs or 0) + 1) if scored else 0
        if echoed > MAX_ECHOED:
            raise BadRequest(f"echo with logprobs has more than {MAX_ECHOED} values over all choices", "logprobs")
        echo.append(await echo_of(each, prompt.ids, to.text.tokenizer, scored) if body.echo else Echo())
    return Job(
        job_id=to.job_id,
        model=to.model,
        served_name=to.served_name,
        requests=tuple(requests),
        prompts=tuple(tokenised),
        echo=tuple(echo),
        options=_options(body, body.logprobs),
        keep=keep,
        prompt_field=asked.prompt_field,
        grammar_field=grammar_field(body),
    )


def _request(body: GenerationBody, to: Endpoint, prompt: Prompt, asked: Asked, request_id: str) -> GenerateRequest:
    room = output_room(len(prompt.ids), asked.limit, to.model, asked.prompt_field, asked.limit_field)
    check_ids(prompt.ids, to.model, asked.prompt_field)
    if asked.limit is None and asked.usual_limit is not None:
        room = min(room, asked.usual_limit)
    return GenerateRequest(
        request_id=request_id,
        model=to.model.name,
        prompt=prompt.ids,
        sampling=replace(
            sampling_params(body, to.model, to.defaults, room, asked.logprobs, asked.prompt_logprobs),
            grammar=asked.grammar,
        ),
        choices=asked.choices,
        salt=to.tenant.salt_of(body.cache_salt or ""),
        priority=to.tenant.priority_of(body.priority),
        tenant=to.tenant.name,
        follows=request_id != to.job_id,
    )


def _options(body: GenerationBody, logprobs: int | None, turn: AssistantTurn | None = None) -> OutputOptions:
    wanted, turn = body.stream_options or StreamOptions(), turn or AssistantTurn()
    return OutputOptions(
        stop=stop_strings(body.stop),
        min_tokens=body.min_tokens or 0,
        stream=bool(body.stream),
        include_usage=bool(wanted.include_usage),
        continuous_usage=bool(wanted.include_usage and wanted.continuous_usage_stats),
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
        form=turn.form,
        special=turn.special,
    )
