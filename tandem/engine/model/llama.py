"""Llama and everything of its shape: pre-norm blocks of grouped-query attention and a gated SiLU network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from tandem.engine.attention.base import AttentionForm, AttentionPlan
from tandem.engine.model.config import Fields, ModelConfig, parse_decoder
from tandem.engine.model.family import Family
from tandem.engine.model.layers import Embedding, Linear, LinearMethod, Part, Place, RMSNorm, Tensors, Unquantised
from tandem.engine.model.rope import RotaryEmbedding
from tandem.kv import KvLayout, LayerGroup, Plane

Angles = tuple[torch.Tensor, torch.Tensor]


class Attention:
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int, place: Place, method: LinearMethod) -> None:
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.form = AttentionForm(scale=config.head_dim**-0.5)
        query, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        parts = (Part("q_proj", query), Part("k_proj", keys), Part("v_proj", keys))
        self.qkv = Linear(parts, config.hidden_size, config.qkv_bias, place, method)
        self.ops = place.ops
        self.output = Linear((Part("o_proj", config.hidden_size),), query, config.output_bias, place, method)

    def __call__(self, x: torch.Tensor, angles: Angles, plan: AttentionPlan) -> torch.Tensor:
        """`[tokens, hidden] -> [tokens, hidden]`; writes the tokens' KV through the plan."""
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        turned = self.ops.rotate(qkv[:, : self.heads + self.kv_heads], *angles)
        query, key = turned[:, : self.heads], turned[:, self.heads :]
        out = plan.run(self.layer, query, key, qkv[:, self.heads + self.kv_heads :], self.form)
        return self.output(out.reshape(x.shape[0], -1))

    def tensors(self, prefix: str) -> Tensors:
        """Checkpoint names of all weights."""
        return self.qkv.tensors(prefix) | self.output.tensors(prefix)


class GatedMlp:
    """SwiGLU feed-forward network (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, place: Place, method: LinearMethod) -> None:
        inner, hidden = config.intermediate_size, config.hidden_size
        parts = (Part("gate_proj", inner), Part("up_proj", inner))
        self.gate_up = Linear(parts, hidden, config.mlp_bias, place, method)
        self.ops = place.ops
        self.down = Linear((Part("down_proj", hidden),), inner, config.mlp_bias, place, method)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden] -> [tokens, hidden]`"""
        return self.down(self.ops.gated("silu", self.gate_up(x)))

    def tensors(self, prefix: str) -> Tensors:
        """Checkpoint names of all weights."""
        return self.gate_up.tensors(prefix) | self.down.tensors(prefix)


class Block:
    """One transformer layer."""

    def __init__(self, config: ModelConfig, layer: int, place: Place, method: LinearMethod) -> None:
        self.input_norm = RMSNorm(config.hidden_size, config.norm_eps, place)
        self.attention = Attention(config, layer, place, method)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, place)
        self.mlp = GatedMlp(config, place, method)

    def __call__(self, x: torch.Tensor, angles: Angles, plan: AttentionPlan) -> torch.Tensor:
        """`[tokens, hidden] -> [tokens, hidden]`"""
        x = x + self.attention(self.input_norm(x), angles, plan)
        return x + self.mlp(self.mlp_norm(x))

    def tensors(self, prefix: str) -> Tensors:
        """Checkpoint names of all weights."""
        return {
            f"{prefix}input_layernorm.weight": self.input_norm.weight,
            f"{prefix}post_attention_layernorm.weight": self.mlp_norm.weight,
            **self.attention.tensors(f"{prefix}self_attn."),
            **self.mlp.tensors(f"{prefix}mlp."),
        }


class Llama:
    """A decoder with a language-model head. See `family.CausalLM` for what the engine needs of it."""

    def __init__(self, config: ModelConfig, place: Place, method: LinearMethod | None = None) -> None:
        method = method or Unquantised()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size, place)
        self.blocks = [Block(config, layer, place, method) for layer in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, place)
        self.rope = RotaryEmbedding(config.rope, config.head_dim, config.max_positions, place.device)
        self.head = (
            self.embedding if config.tied_embeddings else Embedding(config.vocab_size, config.hidden_size, place)
        )
        dtype = str(place.dtype).removeprefix("torch.")
        planes = tuple(Plane(name, config.num_kv_heads, config.head_dim, dtype) for name in ("k", "v"))
        self.layout = KvLayout(planes, (LayerGroup(tuple(range(config.num_layers))),))

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """See `CausalLM.forward`."""
        x = self.embedding(tokens)
        angles = self.rope.angles(positions, x.dtype)
        for block in self.blocks:
            x = block(x, angles, plan)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `CausalLM.logits`."""
        return functional.linear(self.norm(hidden), self.head.weight).float()

    def tensors(self) -> Tensors:
        """See `CausalLM.tensors`."""
        named = {"model.embed_tokens.weight": self.embedding.weight, "model.norm.weight": self.norm.weight}
        if not self.config.tied_embeddings:
            named["lm_head.weight"] = self.head.weight
        for index, block in enumerate(self.blocks):
            named |= block.tensors(f"model.layers.{index}.")
        return named


def parse(fields: Fields) -> ModelConfig:
    """Llama's biases are options: `attention_bias` for all four projections, `mlp_bias` for the network."""
    bias = fields.flag("attention_bias", False)
    return parse_decoder(fields, "LlamaForCausalLM", bias, bias, fields.flag("mlp_bias", False))


build: Callable[[ModelConfig, Place], Llama] = Llama
FAMILY = Family("LlamaForCausalLM", parse, build)
