"""Mistral and Ministral: Llama's shape with a sliding window, in alternating layers of Ministral (arXiv:2310.06825)."""

from __future__ import annotations

from tandem.engine.model.config import FULL, SLIDING, ModelConfig, parse_decoder, windowed
from tandem.engine.model.family import Family
from tandem.engine.model.fields import Fields

MISTRAL, MINISTRAL = "MistralForCausalLM", "MinistralForCausalLM"


def parse(fields: Fields, architecture: str = MISTRAL) -> ModelConfig:
    """A window in every layer unless `layer_types` says otherwise; null is none, a missing field is 4096."""
    fields = fields.over(sliding_window=4096)
    config = parse_decoder(fields, architecture)
    kind = SLIDING if fields.has("sliding_window") else FULL
    return windowed(config, fields, [kind] * config.num_layers)


def parse_ministral(fields: Fields) -> ModelConfig:
    """As Mistral; the name says that layers differ."""
    return parse(fields, MINISTRAL)


FAMILY = Family(MISTRAL, parse)
MINISTRAL_FAMILY = Family(MINISTRAL, parse_ministral)
