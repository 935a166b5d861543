"""OLMo 2: norms after attention and network only, and over all heads of queries and of keys (arXiv:2501.00656)."""

from __future__ import annotations

from dataclasses import replace

from tandem.engine.model.config import POST_NORMS, ModelConfig, parse_decoder
from tandem.engine.model.family import Family
from tandem.engine.model.fields import Fields

ARCHITECTURE = "Olmo2ForCausalLM"


def parse(fields: Fields) -> ModelConfig:
    """See the module's text."""
    config = parse_decoder(fields.over(rms_norm_eps=1e-5), ARCHITECTURE)
    bias = fields.flag("attention_bias", False)
    return replace(
        config,
        block_norms=POST_NORMS,
        norm=replace(config.norm, wide=True),
        qk_norm="whole",
        qkv_bias=bias,
        output_bias=bias,
    )


FAMILY = Family(ARCHITECTURE, parse)
