"""The draft head as a trainable module: the arithmetic of `tandem.engine.model.draft_head`, without pages.

Training unrolls the head over several steps of its own drafting ("training-time test": Li et al. 2025,
arXiv:2503.01840): from the second step on, its own outputs take the place of the target's hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

from tandem.engine.kernels.ops import TorchOps
from tandem.engine.model.config import ModelConfig
from tandem.engine.model.draft_head import HeadConfig
from tandem.engine.model.rope import RotaryEmbedding, turn

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""`[batch, slots, KV heads, head dim]` each."""


class _Norm(nn.Module):
    """RMSNorm in float32, whatever the dtype around it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimension."""
        return torch.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class _Attention(nn.Module):
    """Names and shapes of the projections."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, query, keys = config.hidden_size, config.num_heads, config.num_kv_heads
        self.q_proj = nn.Linear(2 * hidden, query * config.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * hidden, keys * config.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * hidden, keys * config.head_dim, bias=False)
        self.o_proj = nn.Linear(query * config.head_dim, hidden, bias=False)


class _Mlp(nn.Module):
    """A gated network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape to same shape."""
        out: torch.Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Layer(nn.Module):
    """The one decoder layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hidden_norm = _Norm(config.hidden_size, config.norm.eps)
        self.input_layernorm = _Norm(config.hidden_size, config.norm.eps)
        self.post_attention_layernorm = _Norm(config.hidden_size, config.norm.eps)
        self.self_attn = _Attention(config)
        self.mlp = _Mlp(config)


class TrainableHead(nn.Module):
    """A head in float32; its `state_dict` has the names of checkpoints."""

    embedding: torch.Tensor
    output: torch.Tensor

    def __init__(self, config: HeadConfig, embedding: torch.Tensor, output: torch.Tensor) -> None:
        """embedding: the target's, `[vocabulary, hidden]`, frozen.

        output: the target's output layer, `[draft vocabulary, hidden]`; frozen, but for a reduced vocabulary.
        """
        super().__init__()
        model = config.model
        self.config = config
        self.fc = nn.Linear(len(config.layers) * model.hidden_size, model.hidden_size, bias=False)
        self.midlayer = _Layer(model)
        self.norm = _Norm(model.hidden_size, model.norm.eps)
        self.register_buffer("embedding", embedding.float(), persistent=False)
        if config.draft_vocab != model.vocab_size:
            self.lm_head = nn.Linear(model.hidden_size, config.draft_vocab, bias=False)
            self.lm_head.weight.data.copy_(output)
        else:
            self.register_buffer("output", output.float(), persistent=False)
        self._rope = RotaryEmbedding(model.ropes[0], model.max_positions, embedding.device, TorchOps())

    def initialise(self, norm: torch.Tensor, generator: torch.Generator) -> None:
        """Normal weights scaled by their inputs, small ones into the residual stream. norm: the target's last."""
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.dim() > 1 and not name.startswith("lm_head"):
                    std = weight.shape[1] ** -0.5 * (0.3 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
                    weight.copy_(torch.randn(weight.shape, generator=generator) * std)
            self.norm.weight.copy_(norm)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """`[..., hidden] -> [..., draft vocabulary]`"""
        weight = self.output if "output" in self._buffers else self.lm_head.weight
        return nn.functional.linear(self.norm(states), weight)

    def forward(
        self,
        ids: torch.Tensor,
        hidden: torch.Tensor,
        known: torch.Tensor,
        anchors: torch.Tensor,
        steps: int,
    ) -> list[torch.Tensor]:
        """The head's states in `steps` steps of drafting from each anchor: `[batch, anchors, hidden]` each.

        ids: `[batch, slots]`. hidden: `[batch, slots, layers * hidden]`, the target's after the same tokens.
        known: `[batch, slots]`, whether the feature *of the position before* is at hand in a slot.
        anchors: `[batch, anchors]`, the last slots with the target's own features. Step j from anchor i is at slot
        i + j, where the text goes on.
        """
        features = self.fc(hidden)
        features = torch.cat((torch.zeros_like(features[:, :1]), features[:, :-1]), dim=1) * known[..., None]
        slots = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        query, key, value = self._project(ids, slots, features)
        out = scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            is_causal=True,
            scale=self.config.model.attention_scale,
            enable_gqa=True,
        )
        whole = self._finish(features, out.transpose(1, 2))
        states = [whole.gather(1, anchors[..., None].expand(-1, -1, whole.shape[2]))]
        hides = slots[:, None] > anchors[..., None]
        drafted: list[KeysValues] = []
        for step in range(1, steps):
            tokens = ids.gather(1, (anchors + step).clamp(max=ids.shape[1] - 1))
            query, *own = self._project(tokens, anchors + step, states[-1])
            drafted.append((own[0], own[1]))
            states.append(self._finish(states[-1], self._attend(query, (key, value), hides, drafted)))
        return states

    def _project(
        self, ids: torch.Tensor, slots: torch.Tensor, features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `[batch, tokens, heads, head dim]`, turned."""
        layer, dim = self.midlayer, self.config.model.head_dim
        embedded = layer.input_layernorm(self.embedding[ids])
        x = torch.cat((embedded, layer.hidden_norm(features)), dim=-1).flatten(0, 1)
        attention = layer.self_attn
        angles = self._rope.angles(slots.flatten(), torch.float32)
        ops, shape = TorchOps(), (*ids.shape, -1, dim)
        query = turn(ops, attention.q_proj(x).view(len(x), -1, dim), angles).view(shape)
        key = turn(ops, attention.k_proj(x).view(len(x), -1, dim), angles).view(shape)
        return query, key, attention.v_proj(x).view(shape)

    def _attend(
        self, query: torch.Tensor, known: KeysValues, hides: torch.Tensor, drafted: Sequence[KeysValues]
    ) -> torch.Tensor:
        """Each anchor's query sees the slots up to the anchor, and of each later step what that anchor drafted."""
        batch, width, heads, dim = query.shape
        key, value = known
        query = query.view(batch, width, key.shape[2], -1, dim) * self.config.model.attention_scale
        scores = torch.einsum("bwkgd,btkd->bwkgt", query, key)
        scores = scores.masked_fill(hides[:, :, None, None], -torch.inf)
        own = [torch.einsum("bwkgd,bwkd->bwkg", query, each)[..., None] for each, _ in drafted]
        weights = torch.cat((scores, *own), dim=-1).softmax(-1)
        out = torch.einsum("bwkgt,btkd->bwkgd", weights[..., : key.shape[1]], value)
        for at, (_, each) in enumerate(drafted, start=key.shape[1]):
            out = out + weights[..., at : at + 1] * each[:, :, :, None]
        return out.reshape(batch, width, heads, dim)

    def _finish(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        layer = self.midlayer
        x = residual + layer.self_attn.o_proj(attended.flatten(2))
        out: torch.Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
        return out
