"""Who is refused and who computes the prompt."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from decode_worker.admission import Limits, check, wants_hand_over
from tandem.errors import BadRequest, ContextTooLong, Overloaded, TandemError, Unavailable
from tandem.types import GenerateRequest, ModelInfo, OutputKind, SamplingParams

MODEL = ModelInfo("m", "/m", "f", vocab_size=100, max_context=64)
LIMITS = Limits(MODEL, capacity_tokens=48, max_requests=4)


def request(prompt: int = 10, max_tokens: int = 8, **fields: Any) -> GenerateRequest:
    return GenerateRequest("0" * 32, "m", tuple(range(prompt)), SamplingParams(max_tokens=max_tokens), **fields)


@pytest.mark.parametrize(
    ("asked", "open_requests", "draining", "error", "text"),
    [
        (request(), 0, True, Unavailable, "draining"),
        (request(output_kind=OutputKind.EMBEDDING), 0, False, BadRequest, "output kind embedding"),
        (request(adapter="x"), 0, False, BadRequest, "adapter 'x' is not loaded"),
        (request(41, 8), 0, False, ContextTooLong, "has 41 tokens and max_tokens is 8, 49 together; at most 48 fit"),
        (
            replace(request(), prompt=(3, 100)),
            0,
            False,
            BadRequest,
            "token id 100 is not below the vocabulary size 100",
        ),
        (request(), 4, False, Overloaded, "4 sequences are open here; at most 4"),
        (request(choices=2), 3, False, Overloaded, "at most 4"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    asked: GenerateRequest, open_requests: int, draining: bool, error: type[TandemError], text: str
) -> None:
    with pytest.raises(error, match=re.escape(text)):
        check(asked, LIMITS, open_requests, draining)


def test_the_log_probabilities_of_a_prompt_are_bounded_because_they_come_in_one_message() -> None:
    limits = Limits(replace(MODEL, max_context=1 << 20), capacity_tokens=1 << 20, max_requests=4)
    for tokens, fits in (((1 << 22) // 21, True), ((1 << 22) // 21 + 1, False)):
        sampling = SamplingParams(max_tokens=0, prompt_logprobs=20)
        asked = replace(request(), prompt=(5,) * tokens, sampling=sampling)
        if fits:
            check(asked, limits, 0, draining=False)
            continue
        with pytest.raises(BadRequest, match=f"{tokens} prompt tokens and 20 alternatives") as refused:
            check(asked, limits, 0, draining=False)
        assert refused.value.param == "logprobs"


@pytest.mark.parametrize(("asked", "open_requests"), [(request(40, 8), 0), (request(), 3), (request(choices=2), 2)])
def test_what_just_fits_is_taken(asked: GenerateRequest, open_requests: int) -> None:
    check(asked, LIMITS, open_requests, draining=False)


def test_the_model_s_context_limits_where_pages_are_ample() -> None:
    roomy = replace(LIMITS, capacity_tokens=1000)
    check(request(56, 8), roomy, 0, draining=False)
    with pytest.raises(ContextTooLong, match="65 together; at most 64 fit"):
        check(request(57, 8), roomy, 0, draining=False)


@pytest.mark.parametrize(
    ("prompt", "cached", "expected", "planned_local", "targets", "local", "wanted"),
    [
        (200, 0, 0, False, 1, 32, True),  # as planned
        (200, 0, 0, False, 0, 32, False),  # nobody to ask
        (34, 0, 0, False, 1, 32, True),  # 33 missing
        (33, 0, 0, False, 1, 32, False),  # 32 missing: the last token is computed here anyway
        (200, 167, 0, False, 1, 32, False),  # nearly all of it is here
        (1, 0, 0, False, 1, 0, False),  # only the last token
        (2, 0, 0, False, 1, 0, True),
        (200, 0, 0, True, 1, 32, False),  # the plan expected no cache
        (200, 190, 190, True, 1, 32, False),
        (200, 125, 190, True, 1, 32, True),  # 74 missing, where 9 were expected: more than a block too many
        (200, 126, 190, True, 1, 32, False),  # just a block too many
        (200, 0, 500, True, 1, 32, True),  # a plan that expected more than there is
    ],
)
def test_who_computes_the_prompt(
    prompt: int, cached: int, expected: int, planned_local: bool, targets: int, local: int, wanted: bool
) -> None:
    assert wants_hand_over(prompt, cached, expected, planned_local, ["p"] * targets, local) is wanted
