"""The shape of a decoder-only transformer, as read once from a checkpoint's `config.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tandem.engine.kernels.ops import Activation
from tandem.engine.model.fields import Fields
from tandem.engine.model.rope_config import RopeConfig, parse_rope
from tandem.errors import CheckpointError

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class NormConfig:
    """How all norms of a model compute."""

    eps: float
    offset: float = 0.0
    """Added to the stored weights: Gemma's checkpoints hold them minus one."""
    wide: bool = False
    """Whether the weight multiplies before the result is rounded to the model's dtype, and not after."""


@dataclass(frozen=True, slots=True)
class BlockNorms:
    """Checkpoint names of a block's norms before and after attention and feed-forward network; None: has none."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


PRE_NORMS = BlockNorms("input_layernorm", None, "post_attention_layernorm", None)
POST_NORMS = BlockNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
SANDWICH_NORMS = BlockNorms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ between the layers of one model."""

    window: int | None = None
    """As in `AttentionForm`; None is full attention."""
    rope: int | None = 0
    """Index into `ModelConfig.ropes`; None where positions are not encoded (NoPE)."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer. Fields with a default are those in which only some families differ."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    layers: tuple[LayerConfig, ...]
    ropes: tuple[RopeConfig, ...]
    norm: NormConfig
    attention_scale: float
    activation: Activation
    tied_embeddings: bool
    dtype: str
    """What the file names, such as bfloat16; empty when it names none."""
    eos_token_ids: tuple[int, ...]
    block_norms: BlockNorms = PRE_NORMS
    qk_norm: Literal["none", "heads", "whole"] = "none"
    """Norms of queries and keys before their rotation: of each head, or of all heads together."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused: bool = False
    """Whether the checkpoint holds q, k, v as one tensor, and gate and up as another."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Multiplies what each attention and each network adds to the residual stream."""
    logit_divisor: float = 1.0

    @property
    def num_layers(self) -> int:
        """Blocks."""
        return len(self.layers)

    @property
    def max_context(self) -> int:
        """Tokens that the model was made for; as in transformers, `max_position_embeddings` includes scaling."""
        return self.max_positions

    @property
    def context_limit(self) -> int:
        """Tokens that a setting may raise `max_context` to: further only where every rotation reaches further."""
        return min((_reach(rope, self.max_positions) for rope in self.ropes), default=self.max_positions)


def _reach(rope: RopeConfig, positions: int) -> int:
    if rope.kind in ("yarn", "llama3"):
        return max(positions, int(rope.factor * rope.original_positions))
    return int(rope.factor * positions) if rope.kind == "dynamic" else positions


def parse_decoder(fields: Fields, architecture: str, partial_rotary: bool = False) -> ModelConfig:
    """The fields that all families of this shape share, for one rotation and full attention in all layers.

    What a family has besides is set by its own `parse`, with `dataclasses.replace`.
    """
    if fields.has("quantization_config"):
        raise CheckpointError(f"{fields.where}: quantization_config is set; quantised checkpoints are not supported")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.unsupported("num_key_value_heads", f"it must divide num_attention_heads {heads}")
    head_dim = fields.integer("head_dim", hidden // heads)
    if head_dim % 2:
        raise CheckpointError(f"{fields.where}: head_dim is {head_dim}; rotary embeddings need an even one")
    positions = fields.integer("max_position_embeddings")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=positions,
        layers=(LayerConfig(),) * fields.integer("num_hidden_layers", high=10_000),
        ropes=(parse_rope(fields, head_dim, positions, partial_rotary),),
        norm=NormConfig(fields.number("rms_norm_eps", 1e-6)),
        attention_scale=head_dim**-0.5,
        activation=_activation(fields),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        dtype=fields.text("dtype", fields.text("torch_dtype", "")),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def _activation(fields: Fields) -> Activation:
    field = "hidden_activation" if fields.has("hidden_activation") else "hidden_act"
    name = fields.text(field, "silu")
    if name not in ACTIVATIONS:
        raise fields.unsupported(field, f"supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def windowed(config: ModelConfig, fields: Fields, otherwise: Sequence[str]) -> ModelConfig:
    """The configuration with the windows that `layer_types`, or else `otherwise`, and `sliding_window` give its layers.

    A window that no served context reaches beyond is no window. Raises CheckpointError for other types of layers.
    """
    types = fields.choices("layer_types", (FULL, SLIDING), config.num_layers) or tuple(otherwise)
    if SLIDING not in types:
        return config
    if not fields.has("sliding_window"):
        raise fields.unsupported("sliding_window", "a number is needed: some layers have sliding attention")
    window = fields.integer("sliding_window")
    if window >= config.context_limit:
        return config
    layers = zip(config.layers, types, strict=True)
    return replace(
        config, layers=tuple(replace(layer, window=window) if kind == SLIDING else layer for layer, kind in layers)
    )
