"""SmolLM 3: Llama's shape with every fourth layer blind to positions (NoPE: Yang et al. 2025, arXiv:2501.18795)."""

from __future__ import annotations

from dataclasses import replace

from tandem.engine.model import llama
from tandem.engine.model.config import FULL, SLIDING, ModelConfig, windowed
from tandem.engine.model.family import Family
from tandem.engine.model.fields import Fields

ARCHITECTURE = "SmolLM3ForCausalLM"


def parse(fields: Fields) -> ModelConfig:
    """`no_rope_layers` holds 1 for layers with positions; without it, every `no_rope_layer_interval`-th has none.

    Windows, where `use_sliding_window` switches them on, are those of the layers without positions.
    """
    fields = fields.over(rope_theta=2e6, tie_word_embeddings=True)
    config = replace(llama.parse(fields), architecture=ARCHITECTURE)
    interval = fields.integer("no_rope_layer_interval", 4)
    usual = [int((index + 1) % interval != 0) for index in range(config.num_layers)]
    rotated = fields.choices("no_rope_layers", (0, 1), config.num_layers) or usual
    layers = tuple(
        replace(layer, rope=0 if turned else None) for layer, turned in zip(config.layers, rotated, strict=True)
    )
    config = replace(config, layers=layers)
    if not fields.flag("use_sliding_window", False):
        fields = Fields(fields.raw | {"sliding_window": None}, fields.where)
    blind = SLIDING if fields.has("sliding_window") else FULL
    return windowed(config, fields, [FULL if turned else blind for turned in rotated])


FAMILY = Family(ARCHITECTURE, parse)
