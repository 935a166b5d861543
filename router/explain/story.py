"""What is remembered of one request, so that "why there?" can be answered: plans, refusals, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tandem.cluster import Candidate, Incarnation, Plan
from tandem.errors import TandemError, without_internals
from tandem.kv import BLOCK_TOKENS
from tandem.types import FinishReason, GenerateRequest, Usage

Json = dict[str, Any]
AddressOf = Callable[[Incarnation], str | None]

OWN_WAIT = ("queue", "prefill", "move", "admission")
"""Cost terms, in milliseconds, that are this request's own wait for its first token; others pay the rest."""
BASE_BYTES = 1500
ATTEMPT_BYTES = 400
CANDIDATE_BYTES = 750
"""What a story, an attempt and a candidate take up in memory, roughly and rather more than less."""
MAX_ATTEMPTS = 16
"""Attempts remembered of one request; the last one replaces the one before it from then on."""


@dataclass(slots=True)
class Attempt:
    """One plan, and what its decode worker answered to it."""

    plan: Plan
    at_s: float
    """When it was made: seconds since the request was received."""
    workers_matched: int
    """Workers believed to have anything of the prompt."""
    best_match: int
    """The longest prefix, in tokens, that any worker was believed to have."""
    refusal: str = ""
    """Why the decode worker did not take it, or did not go on with it."""
    taken_s: float | None = None
    """When the decode worker said that it takes it; seconds of the router's clock."""
    ended_s: float | None = None
    """When it went elsewhere; None for the attempt that the request ended with."""


@dataclass(slots=True)
class Copy:
    """A prefix of the prompt that is copied to another worker, because it is asked for often."""

    source: Incarnation
    target: Incarnation
    tokens: int
    terms: Mapping[str, float]
    """Why: see `router.replication.decide.Replica`."""
    state: str = "running"
    """Then done, failed or cancelled."""
    error: str = ""
    moved_tokens: int = 0
    bytes: int = 0
    ms: float = 0.0
    """From the first grant to the end."""


@dataclass(slots=True)
class Story:
    """One request. Times are seconds of the router's clock; `received` is Unix time."""

    request_id: str
    tenant: str
    prompt_tokens: int
    max_tokens: int
    choices: int
    received: float
    started_s: float
    attempts: list[Attempt] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    """Those that this request gave the occasion for."""
    siblings: tuple[str, ...] = ()
    """The other requests of the same HTTP request: a completion may have many prompts."""
    cached_at_start: int | None = None
    """Prompt tokens that the decode worker had when it took the request; None until one has."""
    asked_prefill: Incarnation | None = None
    """The prefill worker that the decode worker asked."""
    admitted_s: float | None = None
    """When it had its turn in the router's queue."""
    accepted_s: float | None = None
    first_token_s: float | None = None
    ended_s: float | None = None
    usage: dict[int, Usage] = field(default_factory=dict)
    """The latest counts of each choice."""
    finish: dict[int, FinishReason] = field(default_factory=dict)
    error: str = ""
    trace: tuple[str, str] | None = None
    """What the worker that it is sent to next belongs to (`traceparent`, `tracestate`); None where it is not traced."""

    @classmethod
    def of(cls, request: GenerateRequest, received: float, now: float) -> Story:
        """The beginning of a request's story."""
        sampling = request.sampling
        return cls(
            request.request_id,
            request.tenant,
            len(request.prompt),
            sampling.max_tokens,
            request.choices,
            received,
            now,
        )

    def planned(self, plan: Plan, matches: Mapping[Incarnation, int], now: float) -> None:
        """A plan was made from these matches (tokens by worker)."""
        if len(self.attempts) == MAX_ATTEMPTS:
            self.attempts.pop()
        best = max(matches.values(), default=0)
        self.attempts.append(Attempt(plan, now - self.started_s, len(matches), min(best, self.prompt_tokens - 1)))

    def refused(self, error: Exception) -> None:
        """The last plan's decode worker did not take the request."""
        if self.attempts:
            self.attempts[-1].refusal = str(error) or type(error).__name__

    def taken(self, cached: int, prefill: Incarnation | None, now: float) -> None:
        """The last plan's decode worker took the request; so many of its tokens were cached there."""
        self.cached_at_start, self.asked_prefill, self.accepted_s = cached, prefill, now
        if self.attempts:
            self.attempts[-1].taken_s = now

    def left(self, now: float) -> None:
        """The last plan is over; another one follows."""
        if self.attempts:
            self.attempts[-1].ended_s = now

    @property
    def bytes(self) -> int:
        """About what this takes up in memory."""
        candidates = sum(len(attempt.plan.candidates) for attempt in self.attempts)
        parts = len(self.attempts) + len(self.copies)
        return BASE_BYTES + ATTEMPT_BYTES * parts + CANDIDATE_BYTES * candidates

    @property
    def plan(self) -> Plan | None:
        """The last plan made."""
        return self.attempts[-1].plan if self.attempts else None


def predicted_first_token_ms(candidate: Candidate) -> float | None:
    """The wait for a first token that a policy expected of a pair; None where it does not count in milliseconds."""
    own = [candidate.costs[term] for term in OWN_WAIT if term in candidate.costs]
    return sum(own) if own else None


def explanation(story: Story, address_of: AddressOf | None) -> Json:
    """The story as JSON. address_of: where a worker is reached; None hides it from whoever asks."""

    def worker(incarnation: Incarnation | None) -> Json | None:
        if incarnation is None:
            return None
        return {"id": incarnation} | ({} if address_of is None else {"address": address_of(incarnation)})

    def candidate(each: Candidate) -> Json:
        return {
            "decode": worker(each.decode),
            "prefill": worker(each.prefill),
            "decode_cached_tokens": each.decode_cached,
            "decode_matched_blocks": each.decode_cached // BLOCK_TOKENS,
            "prefill_cached_tokens": each.prefill_cached,
            "prefill_matched_blocks": each.prefill_cached // BLOCK_TOKENS,
            "costs": {term: round(cost, 4) for term, cost in each.costs.items()},
            "cost": round(each.cost, 4),
        }

    def attempt(each: Attempt) -> Json:
        return {
            "at_ms": _ms(each.at_s),
            "policy": each.plan.policy,
            "workers_matched": each.workers_matched,
            "best_match_tokens": each.best_match,
            "refusal": _told(each.refusal),
            "candidates": [candidate(one) for one in each.plan.candidates],
        }

    return {
        "id": story.request_id,
        "received": round(story.received, 3),
        "prompt_tokens": story.prompt_tokens,
        "max_tokens": story.max_tokens,
        "choices": story.choices,
        "attempts": [attempt(each) for each in story.attempts],
        "copies": [_copy(each, worker) for each in story.copies],
        "predicted": _predicted(story),
        "happened": _happened(story) | {"prefill": worker(_sender(story)), "decode": worker(_owner(story))},
    }


def _copy(copy: Copy, worker: Callable[[Incarnation], Json | None]) -> Json:
    return {
        "source": worker(copy.source),
        "target": worker(copy.target),
        "tokens": copy.tokens,
        "terms": {term: round(value, 4) for term, value in copy.terms.items()},
        "state": copy.state,
        "moved_tokens": copy.moved_tokens,
        "bytes": copy.bytes,
        "ms": round(copy.ms, 3),
        "error": _told(copy.error),
    }


def _predicted(story: Story) -> Json | None:
    plan = story.plan
    if plan is None:
        return None
    chosen = plan.candidates[0]
    first = predicted_first_token_ms(chosen)
    return {
        "cached_tokens": max(chosen.decode_cached, chosen.prefill_cached),
        "decode_cached_tokens": chosen.decode_cached,
        "first_token_ms": None if first is None else round(first, 3),
        "hand_over_ms": None if chosen.prefill is None else _hand_over_ms(chosen.costs),
    }


def _hand_over_ms(costs: Mapping[str, float]) -> float | None:
    """Queue, prefill and move on the way through a prefill worker."""
    known = [costs[term] for term in ("queue", "prefill", "move") if term in costs]
    return round(sum(known), 3) if known else None


def _happened(story: Story) -> Json:
    usages = list(story.usage.values())
    return {
        "state": _state(story),
        "cached_tokens_at_start": story.cached_at_start,
        "cached_tokens": min((usage.cached_tokens for usage in usages), default=None),
        "decode_cached_tokens": min((usage.decode_cached_tokens for usage in usages), default=None),
        "moved_tokens": max((usage.moved_tokens for usage in usages), default=None),
        "hand_over_ms": max((usage.hand_over_ms for usage in usages), default=0.0) or None,
        "completion_tokens": sum(usage.completion_tokens for usage in usages),
        "accepted_ms": _since(story, story.accepted_s),
        "first_token_ms": _since(story, story.first_token_s),
        "end_ms": _since(story, story.ended_s),
        "finish": [reason.value for _, reason in sorted(story.finish.items())],
        "error": _told(story.error),
    }


def _told(reason: str) -> str | None:
    """Tenants read it, too."""
    return without_internals(TandemError(reason)) if reason else None


def _state(story: Story) -> str:
    if story.ended_s is None:
        return "running" if story.accepted_s is not None else "queued"
    if story.accepted_s is None:
        return "refused"
    return "failed" if FinishReason.ERROR in story.finish.values() else "finished"


def _owner(story: Story) -> Incarnation | None:
    return None if story.accepted_s is None or story.plan is None else story.plan.decode


def _sender(story: Story) -> Incarnation | None:
    """Who handed over the prompt's KV, and until that is known who was asked for it."""
    sent = next((usage.sender for usage in story.usage.values() if usage.sender), None)
    return sent or (None if story.usage else story.asked_prefill)


def _since(story: Story, at: float | None) -> float | None:
    return None if at is None else _ms(at - story.started_s)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


SHORT_ID = 8
"""Digits of an incarnation that tell workers apart: what a header says of them."""


def route(plan: Plan, cached: int, prompt_tokens: int, asked_prefill: Incarnation | None) -> str:
    """The `x-tandem-route` of one request: short ids only, no address and nothing of the prompt.

    cached: prompt tokens that the decode worker had when it took the request.
    """
    prefill = "local" if asked_prefill is None else asked_prefill[:SHORT_ID]
    expected = max(plan.candidates[0].decode_cached, plan.candidates[0].prefill_cached if asked_prefill else 0)
    return (
        f"decode={plan.decode[:SHORT_ID]};prefill={prefill};cached={cached};expected={expected};"
        f"prompt={prompt_tokens};policy={plan.policy}"
    )
