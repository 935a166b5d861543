"""What spans of the router say: OpenTelemetry's semantic conventions for generative AI, and Tandem's own names.

The conventions (gen_ai.*) are at the status Development, as of semantic-conventions 1.43.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from router.explain.story import Attempt, Story, predicted_first_token_ms, route
from router.requests.job import Job
from router.requests.openai import ChatBody, CompletionBody, GenerationBody

OPERATIONS = {"chat": "chat", "completion": "text_completion"}
PROVIDER = "tandem"
MAX_MESSAGES = 64
MAX_TEXT = 16_384
"""Characters of a text; what is longer is cut."""
MAX_TEXTS = 32_768
"""Characters of all of a request's texts, the newest messages first; older ones are left out."""
BESIDE = 32
"""Characters that each text and each message counts in addition: an empty one is not free."""
MAX_ROLE = 32
"""Characters of a role."""

Attributes = dict[str, Any]


def request_attributes(
    operation: str, request_id: str, path: str, began: float, job: Job | None, stories: Sequence[Story]
) -> Attributes:
    """Of the root span. began: seconds, monotonic. job: None where the request was refused before it was one."""
    said: Attributes = {
        "gen_ai.operation.name": OPERATIONS[operation],
        "gen_ai.provider.name": PROVIDER,
        "http.request.method": "POST",
        "url.path": path,
        "tandem.request_id": request_id,
    }
    if job is None:
        return said
    request = job.requests[0]
    sampling = request.sampling
    usages = [usage for story in stories for usage in story.usage.values()]
    first = min((story.first_token_s for story in stories if story.first_token_s is not None), default=None)
    return said | {
        "gen_ai.request.model": job.served_name,
        "gen_ai.response.model": job.served_name,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k or None,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty or None,
        "gen_ai.request.presence_penalty": sampling.presence_penalty or None,
        "gen_ai.request.choice.count": job.keep if job.keep != 1 else None,
        "gen_ai.request.stream": job.options.stream,
        "gen_ai.usage.input_tokens": sum(len(each.prompt) for each in job.requests),
        "gen_ai.usage.output_tokens": sum(usage.completion_tokens for usage in usages),
        "gen_ai.usage.cache_read.input_tokens": sum(_cached(story) for story in stories),
        "gen_ai.response.finish_reasons": _finish_reasons(stories) or None,
        "gen_ai.response.time_to_first_chunk": None if first is None else first - began,
        "tandem.tenant": request.tenant or None,
        "tandem.priority": request.priority or None,
    }


def _cached(story: Story) -> int:
    """Prompt tokens that nobody had to compute."""
    return min((usage.cached_tokens for usage in story.usage.values()), default=story.cached_at_start or 0)


def _finish_reasons(stories: Sequence[Story]) -> list[str]:
    return [reason.value for story in stories for _, reason in sorted(story.finish.items())]


def plan_attributes(story: Story, attempt: Attempt) -> Attributes:
    """Of a plan: what it knew."""
    return {
        "tandem.request_id": story.request_id,
        "tandem.policy": attempt.plan.policy,
        "tandem.plan.candidates": len(attempt.plan.candidates),
        "tandem.plan.workers_matched": attempt.workers_matched,
        "tandem.plan.best_match_tokens": attempt.best_match,
    }


def attempt_attributes(story: Story, attempt: Attempt, number: int, last: bool) -> Attributes:
    """Of an attempt: where it went, what was predicted, and, of the last one, what came of it."""
    plan = attempt.plan
    chosen = plan.candidates[0]
    said: Attributes = {
        "tandem.request_id": story.request_id,
        "tandem.attempt": number,
        "tandem.worker.decode": plan.decode,
        "tandem.worker.prefill": plan.prefill,
        "tandem.predicted.cached_tokens": max(chosen.decode_cached, chosen.prefill_cached),
        "tandem.predicted.first_token_ms": predicted_first_token_ms(chosen),
    }
    if not last or attempt.taken_s is None:
        return said
    usages = list(story.usage.values())
    first = story.first_token_s
    return said | {
        "tandem.worker.prefill": story.asked_prefill,
        "tandem.route": route(plan, story.cached_at_start or 0, story.prompt_tokens, story.asked_prefill),
        "tandem.cached_tokens": _cached(story),
        "tandem.decode_cached_tokens": min((usage.decode_cached_tokens for usage in usages), default=None),
        "tandem.moved_tokens": max((usage.moved_tokens for usage in usages), default=None),
        "tandem.hand_over_ms": max((usage.hand_over_ms for usage in usages), default=None),
        "tandem.first_token_ms": None if first is None else (first - story.started_s) * 1000,
    }


def input_messages(body: GenerationBody) -> str | None:
    """A body's prompt as `gen_ai.input.messages`: of the newest what there is room for. None where it is token ids."""
    told: list[dict[str, Any]] = []
    room = MAX_TEXTS
    for role, content in reversed(_said(body)[-MAX_MESSAGES:]):
        parts = []
        for text in _texts(content):
            parts.append({"type": "text", "content": text[: max(0, min(MAX_TEXT, room))]})
            room -= len(parts[-1]["content"]) + BESIDE
            if room <= 0:
                break
        told.insert(0, {"role": role[:MAX_ROLE], "parts": parts})
        room -= BESIDE
        if room <= 0:
            break
    return json.dumps(told, ensure_ascii=False) if told else None


def _said(body: GenerationBody) -> list[tuple[str, object]]:
    """Role and content of each message."""
    if isinstance(body, ChatBody):
        return [(each.role, each.content) for each in body.messages]
    prompt = body.prompt if isinstance(body, CompletionBody) else None
    texts = [prompt] if isinstance(prompt, str) else prompt or ()
    return [("user", text) for text in texts if isinstance(text, str)]


def _texts(content: object) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and isinstance(text := part.get("text"), str):
            yield text
