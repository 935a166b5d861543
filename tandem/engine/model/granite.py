"""Granite 3: Llama's shape with multipliers of embeddings, scores, residuals and logits (muP, arXiv:2203.03466)."""

from __future__ import annotations

from dataclasses import replace

from tandem.engine.model import llama
from tandem.engine.model.config import ModelConfig
from tandem.engine.model.family import Family
from tandem.engine.model.fields import Fields

ARCHITECTURE = "GraniteForCausalLM"


def parse(fields: Fields) -> ModelConfig:
    """A multiplier that is missing is 1, that of scores too."""
    return replace(
        llama.parse(fields),
        architecture=ARCHITECTURE,
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        attention_scale=fields.number("attention_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_divisor=fields.number("logits_scaling", 1.0),
    )


FAMILY = Family(ARCHITECTURE, parse)
