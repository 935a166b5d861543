"""From a validated body to work for the cluster: prompts tokenised, lengths checked, defaults filled."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from router.openai import ChatBody, CompletionBody, GenerationBody, chat_turns, prompts, stop_strings
from tandem.cluster import new_id
from tandem.errors import BadRequest, ContextTooLong
from tandem.text.prompt import Prompt, PromptTokenizer
from tandem.types import MAX_CHOICES, GenerateRequest, ModelInfo, SamplingParams

COMPLETION_TOKENS = 16
"""Output tokens of /v1/completions when the client names no limit; OpenAI's default."""
MAX_TOTAL_CHOICES = 8 * MAX_CHOICES
"""Choices over all prompts of one body."""


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """How the tokens of a choice become the client's text."""

    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    """Stop strings are not looked for in this many first tokens."""
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a job is made for: the model and its tokeniser, and the id and name that answers carry."""

    job_id: str
    model: ModelInfo
    served_name: str
    text: PromptTokenizer


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
    echo: tuple[str, ...]
    """Text that each prompt's choices start with; empty strings unless the client asked for an echo."""
    options: OutputOptions


async def chat_job(body: ChatBody, to: Endpoint) -> Job:
    """Raises BadRequest naming the field at fault."""
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    turns = chat_turns(body.messages, to.text.tokenizer.knows_developer)
    prompt = await to.text.chat(turns, body.cache_salt or "")
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    return _job(body, to, [prompt], [""], limit, logprobs)


async def completion_job(body: CompletionBody, to: Endpoint) -> Job:
    """Raises BadRequest naming the field at fault."""
    given = prompts(body.prompt)
    if len(given) * (body.n or 1) > MAX_TOTAL_CHOICES:
        raise BadRequest(f"{len(given)} prompts times n exceed {MAX_TOTAL_CHOICES} choices", "n")
    tokenised = [await to.text.plain(each) if isinstance(each, str) else Prompt(tuple(each)) for each in given]
    echo = [""] * len(given)
    if body.echo:
        echo = [each if isinstance(each, str) else to.text.tokenizer.decode(each) for each in given]
    limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return _job(body, to, tokenised, echo, limit, body.logprobs)


def _job(
    body: GenerationBody,
    to: Endpoint,
    tokenised: Sequence[Prompt],
    echo: Sequence[str],
    limit: int | None,
    logprobs: int | None,
) -> Job:
    requests: list[GenerateRequest] = []
    model = to.model
    for prompt in tokenised:
        _check_ids(prompt.ids, model, "prompt")
        sampling = _sampling(body, model, _room(len(prompt.ids), limit, model), logprobs)
        requests.append(
            GenerateRequest(
                request_id=new_id() if requests else to.job_id,
                model=model.name,
                prompt=prompt.ids,
                sampling=sampling,
                choices=body.n or 1,
                salt=body.cache_salt or "",
                priority=body.priority or 0,
            )
        )
    options = OutputOptions(
        stop=stop_strings(body.stop),
        min_tokens=body.min_tokens or 0,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        logprobs=logprobs,
    )
    return Job(to.job_id, model, to.served_name, tuple(requests), tuple(tokenised), tuple(echo), options)


def _room(prompt_tokens: int, limit: int | None, model: ModelInfo) -> int:
    """Output tokens allowed: the client's limit, else what the prompt leaves of the context."""
    if prompt_tokens == 0:
        raise BadRequest("prompt is empty; at least 1 token is needed", "prompt")
    left = model.max_context - prompt_tokens
    if left < 1:
        raise ContextTooLong(
            f"the prompt has {prompt_tokens} tokens; the context of {model.name} is {model.max_context} tokens, "
            "of which at least 1 is needed for the output"
        )
    if limit is not None and limit > left:
        raise ContextTooLong(
            f"the prompt has {prompt_tokens} tokens and max_tokens is {limit}; together they exceed the context of "
            f"{model.name}, {model.max_context} tokens",
            "max_tokens",
        )
    return left if limit is None else limit


def _sampling(body: GenerationBody, model: ModelInfo, max_tokens: int, logprobs: int | None) -> SamplingParams:
    bias = _logit_bias(body.logit_bias or {}, model)
    stop_ids = tuple(dict.fromkeys(body.stop_token_ids or ()))
    _check_ids(stop_ids, model, "stop_token_ids")
    fields = {
        name: value
        for name in ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
        if (value := getattr(body, name)) is not None
    }
    try:
        return SamplingParams(
            **fields,
            top_k=max(body.top_k or 0, 0),
            logit_bias=bias,
            seed=secrets.randbits(64) if body.seed is None else body.seed % (1 << 64),
            max_tokens=max_tokens,
            min_tokens=body.min_tokens or 0,
            stop_token_ids=stop_ids,
            ignore_eos=bool(body.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=body.prompt_logprobs,
        )
    except ValueError as error:
        raise BadRequest(str(error), str(error).split(" ", 1)[0].split("[", 1)[0]) from None


def _logit_bias(bias: dict[str, float], model: ModelInfo) -> tuple[tuple[int, float], ...]:
    pairs: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise BadRequest(f"logit_bias has the key {key[:40]!r}; keys must be token ids", "logit_bias")
        pairs[int(key)] = value
    _check_ids(tuple(pairs), model, "logit_bias")
    return tuple(sorted(pairs.items()))


def _check_ids(ids: Sequence[int], model: ModelInfo, param: str) -> None:
    if ids and not 0 <= (worst := min(ids)) <= max(ids) < model.vocab_size:
        worst = worst if worst < 0 else max(ids)
        raise BadRequest(f"{param} has the token id {worst}; ids are 0 to {model.vocab_size - 1}", param)
