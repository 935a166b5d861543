"""Qwen 2 and 2.5: Llama's shape with biases on q, k and v only."""

from __future__ import annotations

from tandem.engine.model import llama
from tandem.engine.model.config import Fields, ModelConfig, parse_decoder
from tandem.engine.model.family import Family


def parse(fields: Fields) -> ModelConfig:
    """Refuses layers with sliding-window attention, which the checkpoint may switch on."""
    layers = fields.raw.get("layer_types") or []
    beyond = fields.integer("max_window_layers", 28, low=0) < fields.integer("num_hidden_layers")
    windowed = "sliding_attention" in layers if layers else beyond and fields.has("sliding_window")
    if fields.flag("use_sliding_window", False) and windowed:
        raise fields.unsupported("use_sliding_window", "sliding-window attention is not supported")
    return parse_decoder(fields, "Qwen2ForCausalLM", qkv_bias=True, output_bias=False, mlp_bias=False)


FAMILY = Family("Qwen2ForCausalLM", parse, llama.build)
