"""Ranges of a request, enforced once and for all where it is built."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from tandem.types import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_IDS,
    Delta,
    GenerateRequest,
    SamplingParams,
)

LIMITS: tuple[tuple[str, tuple[Any, ...], tuple[Any, ...]], ...] = (
    # field, values at the limits, values beyond them
    ("temperature", (0.0, 0.7, 100.0), (-0.01, 100.1, math.nan, math.inf)),
    ("top_p", (0.001, 1.0), (0.0, -0.1, 1.01, math.nan)),
    ("top_k", (0, 1, 1 << 31), (-1, (1 << 31) + 1)),
    ("min_p", (0.0, 1.0), (-0.1, 1.1, math.nan)),
    ("frequency_penalty", (-2.0, 2.0), (-2.1, 2.1, math.nan)),
    ("presence_penalty", (-2.0, 2.0), (-2.1, 2.1, -math.inf)),
    ("repetition_penalty", (0.01, 1.0, 10.0), (0.0, -1.0, 10.1, math.nan)),
    ("seed", (0, (1 << 64) - 1), (-1, 1 << 64)),
    ("max_tokens", (0, 1 << 31), (-1, (1 << 31) + 1)),
    ("min_tokens", (0, 16), (-1, 17)),
    ("logprobs", (None, 0, MAX_LOGPROBS), (-1, MAX_LOGPROBS + 1)),
    ("prompt_logprobs", (None, 0, MAX_LOGPROBS), (-1, MAX_LOGPROBS + 1)),
)
ACCEPTED = [(name, value) for name, values, _ in LIMITS for value in values]
REFUSED = [(name, value) for name, _, values in LIMITS for value in values]


def request(**given: Any) -> GenerateRequest:
    defaults: dict[str, Any] = {"request_id": "0" * 32, "model": "m", "prompt": (1,), "sampling": SamplingParams()}
    return GenerateRequest(**defaults | given)


@pytest.mark.parametrize(("name", "value"), ACCEPTED)
def test_a_value_at_the_limit_is_accepted(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_value_beyond_the_limit_names_field_value_and_limit(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is \S+; it must be in [\[(]\S+, \S+\]$") as caught:
        SamplingParams(**{name: value})
    assert str(value) in str(caught.value)


def test_every_number_has_a_limit() -> None:
    numbers = {
        field.name for field in dataclasses.fields(SamplingParams) if field.type in ("int", "float", "int | None")
    }
    assert numbers == {name for name, _, _ in LIMITS}


@pytest.mark.parametrize("bias", [-100.0, 0.0, 100.0])
def test_a_bias_within_its_range_is_accepted(bias: float) -> None:
    assert SamplingParams(logit_bias=((7, bias),)).logit_bias == ((7, bias),)


@pytest.mark.parametrize("bias", [-100.1, 100.1, math.nan])
def test_a_bias_beyond_its_range_names_the_token(bias: float) -> None:
    with pytest.raises(ValueError, match=r"^logit_bias\[7\] is "):
        SamplingParams(logit_bias=((3, 0.0), (7, bias)))


def test_lists_are_bounded() -> None:
    SamplingParams(logit_bias=((1, 0.0),) * MAX_LOGIT_BIAS, stop_token_ids=(1,) * MAX_STOP_IDS)
    with pytest.raises(ValueError, match=r"^logit_bias has 1025 entries; at most 1024 are allowed$"):
        SamplingParams(logit_bias=((1, 0.0),) * (MAX_LOGIT_BIAS + 1))
    with pytest.raises(ValueError, match=r"^stop_token_ids has 65 ids; at most 64 are allowed$"):
        SamplingParams(stop_token_ids=(1,) * (MAX_STOP_IDS + 1))


def test_only_temperature_zero_is_greedy() -> None:
    assert SamplingParams(temperature=0.0).greedy
    assert not SamplingParams(temperature=1e-6).greedy


def test_a_request_needs_a_prompt_and_a_sane_number_of_choices() -> None:
    assert request(choices=MAX_CHOICES).choices == MAX_CHOICES
    with pytest.raises(ValueError, match=r"^prompt is empty"):
        request(prompt=())
    for choices in (0, -1, MAX_CHOICES + 1):
        with pytest.raises(ValueError, match=rf"^n is {choices}; it must be in \[1, 128\]$"):
            request(choices=choices)


def test_another_attempt_is_the_same_request() -> None:
    first = request(prompt=(1, 2, 3), salt="tenant", adapter="lora", priority=3, choices=2)
    again = first.again().again()
    assert again.attempt == 2
    assert dataclasses.replace(again, attempt=0) == first


def test_nouns_are_frozen() -> None:
    for noun in (SamplingParams(), request(), Delta("r", 0, 0, 0)):
        name = dataclasses.fields(noun)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(noun, name, None)
