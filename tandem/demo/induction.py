"""Initial weights with which a small Llama can copy from its context at once.

Copying needs an induction circuit (Olsson et al., "In-context learning and induction heads", 2022): a head that
carries each token's predecessor along, and in a later layer heads that attend to where the predecessor equals the
current token and bring over what stood there. Gradient descent finds it only after a long plateau, longer than the
demo model's whole training, so the circuit is written into a few heads of the first two layers; training refines it.
All other weights stay random. (That structured initial attention helps small transformers: Trockman and Kolter,
"Mimetic initialization of self-attention layers", 2023.)
"""

from __future__ import annotations

import math
from typing import Any

import torch

CONSTANT = 0
"""Residual coordinate that is equal for all tokens; with tied embeddings it shifts all logits alike."""


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """`[rows, columns]` orthonormal rows that ignore the constant coordinate."""
    matrix = torch.linalg.qr(torch.randn(columns - 1, rows, generator=generator)).Q.T
    return torch.cat([torch.zeros(rows, 1), matrix], dim=1)


@torch.no_grad()
def write_induction_circuit(model: Any, seed: int, embedding_std: float = 0.05) -> None:
    """Overwrite the embedding and some heads of layers 0 and 1 of a fresh `LlamaForCausalLM` of at least two layers.

    Embeddings become normal with deviation `embedding_std` plus the constant coordinate. Layer 0, head 0 attends to
    the previous token; layer 1 has one induction head for each key-value head.
    """
    config = model.config
    dim, width = config.head_dim, config.hidden_size
    group = config.num_attention_heads // config.num_key_value_heads
    generator = torch.Generator().manual_seed(seed)
    embedding = model.model.embed_tokens.weight
    embedding.copy_(torch.randn(embedding.shape, generator=generator) * embedding_std)
    constant = 0.7 * embedding_std * math.sqrt(width)
    embedding[:, CONSTANT] = constant
    normed = constant / math.sqrt(embedding_std**2 + constant**2 / width)

    current, previous = _orthonormal(2 * dim, width, generator).split(dim)
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    _previous_token_head(first, dim, normed)
    first.v_proj.weight[:dim] = current
    first.o_proj.weight[:, :dim] = 2 * embedding_std * previous.T

    # Rotary pairs of low frequency hardly turn over a few dozen tokens: only they can compare contents.
    slow = torch.cat([torch.arange(dim // 4, dim // 2), torch.arange(3 * dim // 4, dim)])
    for head in range(config.num_key_value_heads):
        content = _orthonormal(dim, width, generator)
        query = slice(head * group * dim, head * group * dim + dim)
        key = slice(head * dim, head * dim + dim)
        second.q_proj.weight[query] = 0
        second.k_proj.weight[key] = 0
        second.q_proj.weight[query.start + slow] = 2 * current[: len(slow)]
        second.k_proj.weight[key.start + slow] = 2 * previous[: len(slow)]
        second.v_proj.weight[key] = content
        second.o_proj.weight[:, query] = 3 * embedding_std * content.T


def _previous_token_head(attention: Any, dim: int, normed: float) -> None:
    """Query and key of head 0 from the constant coordinate, which is `normed` after RMSNorm.

    With key (a, 0) and query (a cos f, -a sin f) in the rotary pair of frequency f, the logit at distance d is the sum
    of a^2 cos((d - 1) f) / sqrt(dim), largest at d = 1.
    """
    half = dim // 2
    frequency = 10000.0 ** (-torch.arange(half) / half)
    strength = 6.0 / normed
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[:dim] = 0
    attention.k_proj.weight[:half, CONSTANT] = strength
    attention.q_proj.weight[:half, CONSTANT] = strength * torch.cos(frequency)
    attention.q_proj.weight[half:dim, CONSTANT] = -strength * torch.sin(frequency)
