"""Gemma 2: norms before and after, capped scores and logits, every other layer with a window (arXiv:2408.00118)."""

from __future__ import annotations

from dataclasses import replace

import torch

from tandem.engine.model.config import (
    FULL,
    SANDWICH_NORMS,
    SLIDING,
    ModelConfig,
    parse_decoder,
    windowed,
)
from tandem.engine.model.decoder import Decoder
from tandem.engine.model.family import Family
from tandem.engine.model.fields import Fields
from tandem.engine.model.layers import Place

ARCHITECTURE = "Gemma2ForCausalLM"
DEFAULTS = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


def parse_gemma(fields: Fields, architecture: str) -> ModelConfig:
    """What all Gemmas have in common; the scale of the embeddings is rounded by `build`."""
    if fields.flag("use_bidirectional_attention", False):
        raise fields.unsupported("use_bidirectional_attention", "only causal attention is supported")
    config = parse_decoder(fields, architecture)
    bias = fields.flag("attention_bias", False)
    return replace(
        config,
        attention_scale=fields.number("query_pre_attn_scalar") ** -0.5,
        norm=replace(config.norm, offset=1.0, wide=True),
        block_norms=SANDWICH_NORMS,
        qkv_bias=bias,
        output_bias=bias,
        logit_softcap=fields.optional_number("final_logit_softcapping"),
        embedding_scale=config.hidden_size**0.5,
    )


def parse(fields: Fields) -> ModelConfig:
    """Windows in layers 0, 2, ... unless `layer_types` says otherwise. A cap that is null is none."""
    fields = fields.over(**DEFAULTS, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    config = parse_gemma(fields, ARCHITECTURE)
    config = replace(config, attention_softcap=fields.optional_number("attn_logit_softcapping"))
    return windowed(config, fields, [FULL if index % 2 else SLIDING for index in range(config.num_layers)])


def build(config: ModelConfig, place: Place) -> Decoder:
    """Gemma was trained with a scale of the embeddings that is rounded to the dtype of the weights."""
    scale = float(torch.tensor(config.embedding_scale, dtype=place.dtype))
    return Decoder(replace(config, embedding_scale=scale), place)


FAMILY = Family(ARCHITECTURE, parse, build)
