"""Gemma 3 (text): one layer in six is without a window and has its own rotation (arXiv:2503.19786)."""

from __future__ import annotations

from dataclasses import replace

from tandem.engine.model.config import FULL, SLIDING, ModelConfig, windowed
from tandem.engine.model.family import Family
from tandem.engine.model.fields import Fields
from tandem.engine.model.gemma2 import DEFAULTS, build, parse_gemma
from tandem.engine.model.rope_config import RopeConfig, rope_of

TEXT, MULTIMODAL = "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"
OWN_DEFAULTS = DEFAULTS | {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
}
"""Gemma 3's published multimodal checkpoints leave out what is as in transformers' defaults."""
VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def parse(fields: Fields, architecture: str = TEXT) -> ModelConfig:
    """The first rotation is that of layers without a window: every sixth, unless `layer_types` says otherwise."""
    fields = fields.over(**OWN_DEFAULTS)
    if fields.has("attn_logit_softcapping"):
        raise fields.unsupported("attn_logit_softcapping", "Gemma 3 does not cap scores")
    flat = Fields(fields.raw | {"rope_parameters": None, "rope_scaling": None}, fields.where)
    config = parse_gemma(flat, architecture)
    pattern = fields.integer("sliding_window_pattern", 6)
    usual = [SLIDING if (index + 1) % pattern else FULL for index in range(config.num_layers)]
    types = fields.choices("layer_types", (FULL, SLIDING), config.num_layers) or usual
    layers = tuple(replace(layer, rope=int(types[index] == SLIDING)) for index, layer in enumerate(config.layers))
    config = replace(config, qk_norm="heads", ropes=_ropes(fields, config), layers=layers)
    return windowed(config, fields, usual)


def _ropes(fields: Fields, config: ModelConfig) -> tuple[RopeConfig, RopeConfig]:
    """Of full and of sliding layers: nested by kind in transformers 5, else `rope_scaling` is that of full layers."""
    nested = fields.nested("rope_parameters") or Fields({}, fields.where)
    empty = Fields({}, fields.where)
    full = nested.nested(FULL) or fields.nested("rope_scaling") or empty
    sliding = nested.nested(SLIDING) or empty
    bases = (
        full.number("rope_theta", fields.number("rope_theta", 1e6, low=1.0), low=1.0),
        sliding.number("rope_theta", fields.number("rope_local_base_freq", 1e4, low=1.0), low=1.0),
    )
    made = [
        rope_of(rope, fields, base, config.head_dim, config.max_positions)
        for rope, base in zip((full, sliding), bases, strict=True)
    ]
    return made[0], made[1]


def parse_multimodal(fields: Fields) -> ModelConfig:
    """The decoder of a multimodal checkpoint: `text_config` over what stands beside it."""
    text = fields.nested("text_config") or Fields({}, fields.where)
    return parse(Fields(fields.raw | text.raw, text.where), MULTIMODAL)


def rename(name: str) -> str | None:
    """Multimodal checkpoints put "language_model." before or behind "model."; images are not served."""
    if name.startswith(VISION):
        return None
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("language_model.")


FAMILY = Family(TEXT, parse, build)
MULTIMODAL_FAMILY = Family(MULTIMODAL, parse_multimodal, build, rename)
