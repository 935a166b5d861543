"""Whether a decode worker takes a request, and who computes its prompt: pure decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.errors import BadRequest, ContextTooLong, Overloaded, Unavailable
from tandem.kv import BLOCK_TOKENS
from tandem.types import GenerateRequest, ModelInfo, OutputKind

MAX_SCORE_VALUES = 1 << 22
"""Log-probabilities of one prompt; they come in one message, of at most 64 MiB."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What this worker can take."""

    model: ModelInfo
    capacity_tokens: int
    max_requests: int
    """Requests admitted and not yet finished."""


def check(request: GenerateRequest, limits: Limits, open_requests: int, draining: bool) -> None:
    """Raises the error that refuses the request, or returns."""
    if draining:
        raise Unavailable("this worker is draining")
    if request.output_kind is not OutputKind.TOKENS:
        raise BadRequest(f"output kind {request.output_kind.value} is not served", param="output_kind")
    if request.adapter:
        raise BadRequest(f"adapter {request.adapter!r} is not loaded", param="adapter")
    needed = len(request.prompt) + request.sampling.max_tokens
    most = min(limits.model.max_context, limits.capacity_tokens)
    if needed > most:
        raise ContextTooLong(
            f"the prompt has {len(request.prompt)} tokens and max_tokens is {request.sampling.max_tokens}, "
            f"{needed} together; at most {most} fit",
            param="messages",
        )
    scores = request.sampling.prompt_logprobs
    if scores is not None and (values := len(request.prompt) * (scores + 1)) > MAX_SCORE_VALUES:
        raise BadRequest(
            f"log-probabilities of {len(request.prompt)} prompt tokens and {scores} alternatives each are {values}; "
            f"at most {MAX_SCORE_VALUES} are allowed",
            param="logprobs",
        )
    largest = max(request.prompt)
    if largest >= limits.model.vocab_size:
        raise BadRequest(
            f"token id {largest} is not below the vocabulary size {limits.model.vocab_size}", param="prompt"
        )
    if open_requests + request.choices > limits.max_requests:
        raise Overloaded(f"{open_requests} sequences are open here; at most {limits.max_requests} are taken")


def wants_hand_over(
    prompt_len: int,
    cached: int,
    expected_cached: int,
    planned_local: bool,
    targets: Sequence[object],
    local_tokens: int,
) -> bool:
    """Whether a prefill worker computes the prompt.

    The plan decides, unless what is really missing here is tiny (then it is computed here), or the plan counted on a
    cache that is gone (then a prefill worker of the plan is asked although it said local). The last prompt token is
    always computed here.
    """
    missing = prompt_len - 1 - cached
    if not targets or missing <= local_tokens:
        return False
    if planned_local:
        return missing > max(prompt_len - 1 - expected_cached, 0) + BLOCK_TOKENS
    return True
