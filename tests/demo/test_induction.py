"""The written induction circuit attends as it should before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.demo.induction import CONSTANT
from tandem.demo.tokenizer import train_tokenizer
from tandem.demo.train import Recipe, make_model


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["one two three"], 300)
    fresh: Any = make_model(Recipe(out=Path("unused")), tokenizer).eval()
    fresh.set_attn_implementation("eager")
    return fresh


@torch.no_grad()
def attentions(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out: tuple[torch.Tensor, ...] = model(ids[None], output_attentions=True).attentions
    return out


def test_head_of_layer_0_attends_to_the_previous_token(model: Any) -> None:
    ids = torch.randint(6, 262, (64,), generator=torch.Generator().manual_seed(1))
    weights = attentions(model, ids)[0][0, 0]
    assert torch.diagonal(weights, -1).mean() > 0.6


def test_heads_of_layer_1_attend_to_what_followed_the_current_token(model: Any) -> None:
    once = 6 + torch.randperm(250, generator=torch.Generator().manual_seed(2))[:24]
    weights = attentions(model, torch.cat([once, once]))[1][0]
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    # Row 24 + i holds token i again; what followed it stands at i + 1.
    for head in range(0, weights.shape[0], group):
        assert torch.diagonal(weights[head, 24:-1, 1:24]).mean() > 0.3


def test_constant_coordinate_is_equal_for_all_tokens(model: Any) -> None:
    column = model.model.embed_tokens.weight[:, CONSTANT]
    assert column.min() == column.max() > 0


def test_circuit_depends_on_the_seed(model: Any) -> None:
    tokenizer = train_tokenizer(["one two three"], 300)
    same, other = (make_model(Recipe(out=Path("unused"), seed=seed), tokenizer) for seed in (0, 1))
    assert torch.equal(same.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert not torch.equal(other.model.embed_tokens.weight, model.model.embed_tokens.weight)
