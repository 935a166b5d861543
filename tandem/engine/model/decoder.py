"""The decoder that all families are: grouped-query attention and a gated network, around a residual stream.

Families differ in its configuration (`config.ModelConfig`), in how they read it, and in the names of their tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tandem.engine.attention.base import AttentionForm, AttentionPlan
from tandem.engine.model.config import LayerConfig, ModelConfig
from tandem.engine.model.layers import (
    Embedding,
    Linear,
    LinearMethod,
    NoNorm,
    Part,
    Place,
    Tensors,
    Unquantised,
    make_norm,
)
from tandem.engine.model.qk_norm import make_qk_norm
from tandem.engine.model.rope import Angles, RotaryEmbedding, turn
from tandem.engine.taps import HiddenTaps
from tandem.kv import KvLayout, LayerGroup, Plane


class Attention:
    """Grouped-query attention, with rotary positions where the layer has them."""

    def __init__(
        self, config: ModelConfig, layer: int, place: Place, method: LinearMethod, inputs: int | None = None
    ) -> None:
        """inputs: size of what it reads, where that is not the hidden size."""
        self.layer = layer
        self.rope = config.layers[layer].rope
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.form = AttentionForm(config.attention_scale, config.layers[layer].window, config.attention_softcap)
        query, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        parts = [Part("q_proj", query), Part("k_proj", keys), Part("v_proj", keys)]
        if config.fused:
            parts = [Part("qkv_proj", query + 2 * keys)]
        self.qkv = Linear(parts, inputs or config.hidden_size, config.qkv_bias, place, method)
        self.norm = make_qk_norm(config, place)
        self.ops = place.ops
        self.output = Linear((Part("o_proj", config.hidden_size),), query, config.output_bias, place, method)

    def __call__(
        self,
        x: torch.Tensor,
        angles: Sequence[Angles],
        plan: AttentionPlan,
        residual: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[tokens, inputs] -> [kept tokens, hidden]`, added to `residual`; writes all tokens' KV through the plan."""
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        turned = self.norm(qkv[:, : self.heads + self.kv_heads])
        if self.rope is not None:
            turned = turn(self.ops, turned, angles[self.rope])
        query, key = turned[:, : self.heads], turned[:, self.heads :]
        out = plan.run(self.layer, query, key, qkv[:, self.heads + self.kv_heads :], self.form)
        return self.output(_kept(out.reshape(x.shape[0], -1), keep), residual)

    def tensors(self, prefix: str) -> Tensors:
        """Checkpoint names of all weights."""
        return self.qkv.tensors(prefix) | self.norm.tensors(prefix) | self.output.tensors(prefix)


class GatedMlp:
    """Feed-forward network with a gated linear unit (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, place: Place, method: LinearMethod) -> None:
        inner, hidden = config.intermediate_size, config.hidden_size
        parts = (
            [Part("gate_up_proj", 2 * inner)] if config.fused else [Part("gate_proj", inner), Part("up_proj", inner)]
        )
        self.gate_up = Linear(parts, hidden, config.mlp_bias, place, method)
        self.activation = config.activation
        self.ops = place.ops
        self.down = Linear((Part("down_proj", hidden),), inner, config.mlp_bias, place, method)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`[tokens, hidden] -> [tokens, hidden]`, added to `residual` if that is given."""
        return self.down(self.ops.gated(self.activation, self.gate_up(x)), residual)

    def tensors(self, prefix: str) -> Tensors:
        """Checkpoint names of all weights."""
        return self.gate_up.tensors(prefix) | self.down.tensors(prefix)


class Block:
    """One transformer layer: attention and network, each added to its input, with the norms that the family has."""

    def __init__(self, config: ModelConfig, layer: int, place: Place, method: LinearMethod) -> None:
        names = config.block_norms
        present = (names.before_attention, names.after_attention, names.before_mlp, names.after_mlp)
        self.norms = {name: make_norm(config.hidden_size, config.norm, place) for name in present if name}
        self.before_attention, self.after_attention, self.before_mlp, self.after_mlp = (
            self.norms[name] if name else NoNorm() for name in present
        )
        self.attention = Attention(config, layer, place, method)
        self.mlp = GatedMlp(config, place, method)
        self.scale = config.residual_scale
        self.plain = self.scale == 1.0 and not names.after_attention and not names.after_mlp

    def __call__(
        self, x: torch.Tensor, angles: Sequence[Angles], plan: AttentionPlan, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[tokens, hidden] -> [kept tokens, hidden]`.

        angles: those of each of the model's rotations. keep: indices of the tokens that are wanted; None: all.
        """
        stream = _kept(x, keep)
        if self.plain:  # the products add to the residual stream themselves
            x = self.attention(self.before_attention(x), angles, plan, stream, keep)
            return self.mlp(self.before_mlp(x), x)
        added = self.after_attention(self.attention(self.before_attention(x), angles, plan, keep=keep))
        x = torch.add(stream, added, alpha=self.scale)
        return torch.add(x, self.after_mlp(self.mlp(self.before_mlp(x))), alpha=self.scale)

    def tensors(self, prefix: str) -> Tensors:
        """Checkpoint names of all weights."""
        norms = {f"{prefix}{name}.weight": norm.weight for name, norm in self.norms.items()}
        return norms | self.attention.tensors(f"{prefix}self_attn.") | self.mlp.tensors(f"{prefix}mlp.")


class Decoder:
    """A decoder with a language-model head. See `family.CausalLM` for what the engine needs of it."""

    def __init__(self, config: ModelConfig, place: Place, method: LinearMethod | None = None) -> None:
        method = method or Unquantised(place.ops)
        self.ops = place.ops
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size, place)
        self.blocks = [Block(config, layer, place, method) for layer in range(config.num_layers)]
        self.norm = make_norm(config.hidden_size, config.norm, place)
        self.ropes = [RotaryEmbedding(rope, config.max_positions, place.device, place.ops) for rope in config.ropes]
        self.head = (
            self.embedding if config.tied_embeddings else Embedding(config.vocab_size, config.hidden_size, place)
        )
        dtype = str(place.dtype).removeprefix("torch.")
        planes = tuple(Plane(name, config.num_kv_heads, config.head_dim, dtype) for name in ("k", "v"))
        self.layout = KvLayout(planes, layer_groups(config.layers))

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        plan: AttentionPlan,
        keep: torch.Tensor | None = None,
        taps: HiddenTaps | None = None,
    ) -> torch.Tensor:
        """See `CausalLM.forward`."""
        x = self.embedding(tokens)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        angles = [rope.angles(positions, x.dtype) for rope in self.ropes]
        *blocks, last = self.blocks
        for layer, block in enumerate(blocks):
            x = block(x, angles, plan)
            if taps is not None:
                taps.take(layer, x)
        if taps is None or len(blocks) not in taps.layers:
            return last(x, angles, plan, keep)
        x = last(x, angles, plan)
        taps.take(len(blocks), x)
        return _kept(x, keep)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `CausalLM.logits`."""
        logits = self.ops.linear(self.norm(hidden), self.head.weight, wide=True)
        if self.config.logit_divisor != 1.0:
            logits = logits / self.config.logit_divisor
        cap = self.config.logit_softcap
        return logits if cap is None else (logits / cap).tanh_().mul_(cap)

    def tensors(self) -> Tensors:
        """See `CausalLM.tensors`."""
        named = {"model.embed_tokens.weight": self.embedding.weight, "model.norm.weight": self.norm.weight}
        if not self.config.tied_embeddings:
            named["lm_head.weight"] = self.head.weight
        for index, block in enumerate(self.blocks):
            named |= block.tensors(f"model.layers.{index}.")
        return named


def _kept(x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    return x if keep is None else x.index_select(0, keep)


def layer_groups(layers: Sequence[LayerConfig]) -> tuple[LayerGroup, ...]:
    """Layers with the same attention span together: full attention first, then from the longest window on."""
    spans = {layer.window for layer in layers}
    ordered = sorted(spans, key=lambda window: (window is not None, -(window or 0)))
    return tuple(
        LayerGroup(tuple(index for index, layer in enumerate(layers) if layer.window == span), span) for span in ordered
    )
