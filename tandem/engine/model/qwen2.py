"""Qwen 2 and 2.5: biases on q, k and v only; the upper layers may have sliding windows."""

from __future__ import annotations

from dataclasses import replace

from tandem.engine.model.config import FULL, SLIDING, ModelConfig, parse_decoder, windowed
from tandem.engine.model.family import Family
from tandem.engine.model.fields import Fields

ARCHITECTURE = "Qwen2ForCausalLM"


def with_windows(config: ModelConfig, fields: Fields) -> ModelConfig:
    """`use_sliding_window` switches windows on: in `layer_types`, or from layer `max_window_layers` upwards."""
    fields = fields.over(sliding_window=4096)
    if not fields.flag("use_sliding_window", False):
        fields = Fields(fields.raw | {"sliding_window": None}, fields.where)
    first = fields.integer("max_window_layers", 28, low=0) if fields.has("sliding_window") else config.num_layers
    return windowed(config, fields, [SLIDING if index >= first else FULL for index in range(config.num_layers)])


def parse(fields: Fields) -> ModelConfig:
    """See the module's text."""
    return with_windows(replace(parse_decoder(fields, ARCHITECTURE), qkv_bias=True), fields)


FAMILY = Family(ARCHITECTURE, parse)
