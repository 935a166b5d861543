"""Phi 3, 3.5 and 4: fused projections, LongRoPE, a window in every layer, partly rotated heads (arXiv:2404.14219)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tandem.engine.model.config import FULL, SLIDING, ModelConfig, parse_decoder, windowed
from tandem.engine.model.family import Family
from tandem.engine.model.fields import Fields

ARCHITECTURE = "Phi3ForCausalLM"
LONGROPE_NAMES = ("su", "yarn")
"""What early Phi 3 checkpoints call LongRoPE."""


def parse(fields: Fields) -> ModelConfig:
    """See the module's text."""
    fields = Fields({name: _rope(value) for name, value in fields.raw.items()}, fields.where).over(rms_norm_eps=1e-5)
    config = parse_decoder(fields, ARCHITECTURE, partial_rotary=True)
    if config.ropes[0].kind not in ("default", "longrope"):
        name = "rope_parameters" if fields.has("rope_parameters") else "rope_scaling"
        raise fields.unsupported(name, "Phi 3 has the rope_type default or longrope")
    kind = SLIDING if fields.has("sliding_window") else FULL
    return windowed(replace(config, fused=True), fields, [kind] * config.num_layers)


def _rope(value: Any) -> Any:
    """Rotary parameters with the type's present name; any other value as it is."""
    names = [name for name in ("rope_type", "type") if isinstance(value, dict) and value.get(name) in LONGROPE_NAMES]
    return value | dict.fromkeys(names, "longrope") if names else value


FAMILY = Family(ARCHITECTURE, parse)
