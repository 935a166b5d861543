"""Qwen 3 (dense): no biases, a norm on each head of queries and keys; windows as in Qwen 2."""

from __future__ import annotations

from dataclasses import replace

from tandem.engine.model.config import ModelConfig, parse_decoder
from tandem.engine.model.family import Family
from tandem.engine.model.fields import Fields
from tandem.engine.model.qwen2 import with_windows

ARCHITECTURE = "Qwen3ForCausalLM"


def parse(fields: Fields) -> ModelConfig:
    """The size of a head is 128 unless named, whatever the hidden size."""
    fields = fields.over(head_dim=128)
    bias = fields.flag("attention_bias", False)
    config = replace(parse_decoder(fields, ARCHITECTURE), qk_norm="heads", qkv_bias=bias, output_bias=bias)
    return with_windows(config, fields)


FAMILY = Family(ARCHITECTURE, parse)
