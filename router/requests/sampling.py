"""A request's sampling: the client's fields, else the model's defaults, else Tandem's; and how long it may get."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from router.requests.defaults import GenerationDefaults
from router.requests.openai import GenerationBody
from tandem.errors import BadRequest, ContextTooLong
from tandem.types import ModelInfo, SamplingParams

NUMBERS = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


def output_room(prompt_tokens: int, limit: int | None, model: ModelInfo, prompt_field: str, limit_field: str) -> int:
    """Output tokens allowed: the client's limit, else what the prompt leaves of the context.

    Raises BadRequest naming `prompt_field` or `limit_field`, with all numbers.
    """
    if prompt_tokens == 0:
        raise BadRequest(f"{prompt_field} is empty; at least 1 token is needed", prompt_field)
    context = f"this model's maximum context length is {model.max_context} tokens"
    left = model.max_context - prompt_tokens
    if left < (0 if limit == 0 else 1):
        least = "" if limit == 0 else ", of which at least 1 is needed for the output"
        # Clients tell this refusal from others by one of these two phrases.
        raise ContextTooLong(
            f"the prompt is too long: {prompt_field} has {prompt_tokens} tokens, and {context}{least}", prompt_field
        )
    if limit is not None and limit > left:
        raise ContextTooLong(
            f"{context}; {prompt_field} has {prompt_tokens} and {limit_field} is {limit}, "
            f"{prompt_tokens + limit} together",
            limit_field,
        )
    return left if limit is None else limit


def sampling_params(
    body: GenerationBody,
    model: ModelInfo,
    defaults: GenerationDefaults,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """Raises BadRequest naming the field at fault."""
    bias = _logit_bias(body.logit_bias or {}, model)
    stop_ids = tuple(dict.fromkeys(body.stop_token_ids or ()))
    check_ids(stop_ids, model, "stop_token_ids")
    fields: dict[str, Any] = {name: value for name in NUMBERS if (value := _chosen(body, defaults, name)) is not None}
    try:
        return SamplingParams(
            **fields,
            top_k=max(int(_chosen(body, defaults, "top_k") or 0), 0),
            logit_bias=bias,
            seed=secrets.randbits(64) if body.seed is None else body.seed % (1 << 64),
            max_tokens=max_tokens,
            min_tokens=body.min_tokens or 0,
            stop_token_ids=stop_ids,
            ignore_eos=bool(body.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
    except ValueError as error:
        raise BadRequest(str(error), str(error).split(" ", 1)[0].split("[", 1)[0]) from None


def _chosen(body: GenerationBody, defaults: GenerationDefaults, name: str) -> float | None:
    value: float | None = getattr(body, name)
    return getattr(defaults, name, None) if value is None else value


def _logit_bias(bias: dict[str, float], model: ModelInfo) -> tuple[tuple[int, float], ...]:
    pairs: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise BadRequest(f"logit_bias has the key {key[:40]!r}; keys must be token ids", "logit_bias")
        pairs[int(key)] = value
    check_ids(tuple(pairs), model, "logit_bias")
    return tuple(sorted(pairs.items()))


def check_ids(ids: Sequence[int], model: ModelInfo, param: str) -> None:
    """Raises BadRequest naming `param` when an id is outside the vocabulary."""
    if ids and not 0 <= (worst := min(ids)) <= max(ids) < model.vocab_size:
        worst = worst if worst < 0 else max(ids)
        raise BadRequest(f"{param} has the token id {worst}; ids are 0 to {model.vocab_size - 1}", param)
