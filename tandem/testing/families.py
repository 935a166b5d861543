"""Checkpoints of every family and of every option that changes what a family computes, small enough for tests.

`docs/models.md` lists them as what was compared with transformers (see `model_table`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tandem.testing.checkpoints import CheckpointSpec

WINDOW = 24
"""Shorter than the prompts of tests, and no multiple of a page."""
LLAMA = CheckpointSpec(layers=2, vocab=300, max_positions=512)
WIDE = replace(LLAMA, hidden=64, heads=2, kv_heads=1)
SLIDE, FULL = "sliding_attention", "full_attention"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "yarn": YARN,
    "yarn-mscale": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-attention-factor": YARN | {"attention_factor": 1.3, "truncate": False},
    "yarn-no-factor": {"rope_type": "yarn", "rope_theta": 1e4, "factor": None, "original_max_position_embeddings": 64},
    "llama3": LLAMA3,
    "theta": {"rope_type": "default", "rope_theta": 1e6},
}


def with_config(spec: CheckpointSpec, **config: Any) -> CheckpointSpec:
    """The spec with further fields of config.json."""
    return replace(spec, config=spec.config | config)


def longrope(original: int, frequencies: int, **fields: Any) -> dict[str, Any]:
    """Fields of a model that extends `original` positions by LongRoPE."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.05 * index for index in range(frequencies)],
        "long_factor": [1.5 + 0.4 * index for index in range(frequencies)],
    }
    return {"original_max_position_embeddings": original, "rope_parameters": rope | fields}


QWEN2 = replace(LLAMA, family="qwen2")
QWEN3 = replace(LLAMA, family="qwen3", head_dim=24)
MISTRAL = replace(LLAMA, family="mistral", config={"sliding_window": WINDOW})
MINISTRAL = replace(MISTRAL, family="ministral")
GEMMA2 = replace(
    LLAMA,
    family="gemma2",
    layers=4,
    tied=True,
    config={
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
)
GEMMA3 = replace(
    LLAMA,
    family="gemma3_text",
    layers=6,
    tied=True,
    config={
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            SLIDE: {"rope_type": "default", "rope_theta": 1e4},
        },
    },
)
PHI3 = replace(LLAMA, family="phi3")
OLMO2 = replace(LLAMA, family="olmo2")
GRANITE = replace(
    LLAMA,
    family="granite",
    config={
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.22,
        "logits_scaling": 0.7,
    },
)
SMOLLM3 = replace(LLAMA, family="smollm3", layers=4, tied=True)

VARIANTS: dict[str, CheckpointSpec] = {
    "llama": LLAMA,
    "llama-biases": with_config(LLAMA, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": replace(LLAMA, head_dim=24),
    "llama-heads-of-80": replace(WIDE, head_dim=80),
    "llama-heads-of-96": replace(WIDE, head_dim=96),
    "llama-heads-of-256": replace(WIDE, head_dim=256),
    "llama-odd-vocabulary": replace(LLAMA, vocab=1021),
    "llama-gelu": with_config(LLAMA, hidden_act="gelu"),
    "llama-tied": replace(LLAMA, tied=True),
    "llama-one-kv-head": replace(LLAMA, kv_heads=1),
    "llama-no-grouping": replace(LLAMA, kv_heads=4),
    "llama-sharded": replace(LLAMA, shards=3),
    **{f"llama-{name}": with_config(LLAMA, rope_parameters=rope) for name, rope in ROPES.items()},
    "llama-longrope": with_config(LLAMA, **longrope(64, 8)),
    "qwen2": QWEN2,
    "qwen2-7-to-1": replace(QWEN2, hidden=112, heads=14, kv_heads=2),
    "qwen2-tied-sharded": replace(QWEN2, tied=True, shards=2),
    "qwen2-window": with_config(
        replace(QWEN2, layers=3), use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen2-layer-types": with_config(QWEN2, use_sliding_window=True, sliding_window=WINDOW, layer_types=[SLIDE, FULL]),
    "qwen3": QWEN3,
    "qwen3-yarn": with_config(QWEN3, rope_parameters=YARN),
    "qwen3-7-to-1": replace(QWEN3, hidden=112, heads=7, kv_heads=1, tied=True),
    "qwen3-window": with_config(QWEN3, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "mistral": MISTRAL,
    "mistral-no-window": with_config(MISTRAL, sliding_window=None),
    "mistral-heads-of-80": replace(MISTRAL, heads=2, kv_heads=1, head_dim=80),
    "ministral": with_config(MINISTRAL, layer_types=[FULL, SLIDE]),
    "gemma2": GEMMA2,
    "gemma2-heads-of-256": replace(GEMMA2, layers=2, heads=2, kv_heads=1, head_dim=256),
    "gemma2-no-caps": with_config(
        replace(GEMMA2, tied=False), attn_logit_softcapping=None, final_logit_softcapping=None
    ),
    "gemma3": GEMMA3,
    "gemma3-heads-of-256": replace(GEMMA3, layers=2, heads=2, kv_heads=1, head_dim=256),
    "gemma3-capped-logits": with_config(
        replace(GEMMA3, layers=3), layer_types=[FULL, SLIDE, SLIDE], final_logit_softcapping=3.0
    ),
    "phi3": PHI3,
    "phi3-window": with_config(PHI3, sliding_window=WINDOW),
    "phi3-heads-of-96": replace(PHI3, hidden=192, heads=2, kv_heads=1, head_dim=96),
    "phi3-longrope": with_config(PHI3, **longrope(64, 8)),
    "phi3-longrope-not-extended": with_config(PHI3, **longrope(512, 8)),
    "phi3-longrope-attention-factor": with_config(PHI3, **longrope(64, 8, attention_factor=1.4)),
    "phi4-mini": with_config(replace(PHI3, tied=True), **longrope(64, 6, partial_rotary_factor=0.75)),
    "olmo2": OLMO2,
    "olmo2-yarn": with_config(OLMO2, rope_parameters=YARN),
    "granite": GRANITE,
    "granite-tied": replace(GRANITE, tied=True),
    "smollm3": SMOLLM3,
    "smollm3-window": with_config(SMOLLM3, use_sliding_window=True, sliding_window=WINDOW, no_rope_layers=[1, 0, 0, 1]),
}
