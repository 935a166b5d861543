"""Llama 2 and 3: pre-norm blocks, one rotation, a gated SiLU network; so are many models of other names."""

from __future__ import annotations

from dataclasses import replace

from tandem.engine.model.config import ModelConfig, parse_decoder
from tandem.engine.model.family import Family
from tandem.engine.model.fields import Fields

ARCHITECTURE = "LlamaForCausalLM"


def parse(fields: Fields) -> ModelConfig:
    """Biases are options: `attention_bias` for all four projections, `mlp_bias` for the network."""
    bias = fields.flag("attention_bias", False)
    return replace(
        parse_decoder(fields, ARCHITECTURE),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


FAMILY = Family(ARCHITECTURE, parse)
