"""A draft head over the target's hidden states, in the form of EAGLE-3 (Li et al. 2025, arXiv:2503.01840).

Hidden states after a low, a middle and a high layer of the target are fused into one feature a position; a decoder
layer reads a token's embedding beside the feature of the position *before* it, so that slot i of the head's KV depends
on tokens up to i alone and can be cached and handed over like the target's own. Drafting on, the head's own output
stands in for features that the target has not computed yet. A feature of zeros stands for one that is not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tandem.engine.attention.base import AttentionPlan
from tandem.engine.model import llama
from tandem.engine.model.config import LayerConfig, ModelConfig
from tandem.engine.model.decoder import Attention, Decoder, GatedMlp
from tandem.engine.model.fields import Fields
from tandem.engine.model.layers import Embedding, Linear, Part, Place, Tensors, Unquantised, make_norm
from tandem.engine.model.loader import LoadedModel, check_tensors, fill, find_tensors, fingerprint
from tandem.engine.model.rope import RotaryEmbedding
from tandem.errors import CheckpointError
from tandem.kv import KvLayout, LayerGroup, Plane

ARCHITECTURE = "LlamaForCausalLMEagle3"
"""What SpecForge and the authors' own checkpoints are called."""
OFFSETS, MEMBERS = "d2t", "t2d"
"""Tensors of a reduced vocabulary: draft id plus offset is the token's id; whether a token is in it."""


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """A draft head's shape, and what it was trained for."""

    model: ModelConfig
    """Of one layer."""
    layers: tuple[int, ...]
    """The target's layers, from 0 on, after which hidden states are read."""
    draft_vocab: int
    """Tokens that it can draft."""
    target: str
    """The target's fingerprint; empty where the file does not say."""
    target_name: str


def is_draft_head(path: Path) -> bool:
    """Whether folder `path` holds a draft head and not a model of its own. Raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint folder at {path}")
    return ARCHITECTURE in (Fields.read(path / "config.json").raw.get("architectures") or ())


def default_layers(count: int) -> tuple[int, ...]:
    """The layers that are read of a target with `count`: those of the paper's authors where there are enough."""
    return (1, count // 2 - 1, count - 4) if count >= 8 else tuple(sorted({0, count // 2 - 1, count - 1} - {-1}))


def read_head_config(fields: Fields, target_layers: int) -> HeadConfig:
    """What a head's `config.json` says. target_layers: the target's number of layers. Raises CheckpointError."""
    fields = fields.over(num_hidden_layers=1)
    model = replace(llama.FAMILY.parse(fields), layers=(LayerConfig(),), tied_embeddings=False)
    eagle = fields.nested("eagle_config")
    layers: tuple[int, ...] = default_layers(target_layers)
    if eagle is not None and eagle.has("eagle_aux_hidden_state_layer_ids"):
        layers = eagle.token_ids("eagle_aux_hidden_state_layer_ids")
    if not layers or max(layers) >= target_layers:
        raise CheckpointError(f"{fields.where} reads layers {layers}; the target has 0..{target_layers - 1}")
    return HeadConfig(
        model=model,
        layers=layers,
        draft_vocab=fields.integer("draft_vocab_size", model.vocab_size),
        target=fields.text("target_fingerprint", ""),
        target_name=fields.text("target_name", "another model"),
    )


class DraftHead:
    """The head. Embedding and, with the whole vocabulary, output layer are the target's."""

    def __init__(self, config: HeadConfig, target: Decoder, place: Place) -> None:
        model, method, hidden = config.model, Unquantised(place.ops), config.model.hidden_size
        self.config = config
        self.layers = config.layers
        self.embedding = target.embedding
        self.fuse_layers = Linear((Part("fc", hidden),), len(config.layers) * hidden, False, place, method)
        names = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
        self.hidden_norm, self.input_norm, self.mlp_norm = (make_norm(hidden, model.norm, place) for _ in names)
        self.attention = Attention(model, 0, place, method, 2 * hidden)
        self.mlp = GatedMlp(model, place, method)
        self.norm = make_norm(hidden, model.norm, place)
        self.rope = RotaryEmbedding(model.ropes[0], model.max_positions, place.device, place.ops)
        self.offsets: torch.Tensor | None = None
        """`[draft vocabulary]`, int64: what makes ids of the target's vocabulary of the head's."""
        self.own_output = config.draft_vocab != model.vocab_size
        self.head = Embedding(config.draft_vocab, hidden, place) if self.own_output else target.head
        self._ops = place.ops
        dtype = str(place.dtype).removeprefix("torch.")
        planes = tuple(Plane(name, model.num_kv_heads, model.head_dim, dtype) for name in ("k", "v"))
        self.layout = KvLayout(planes, (LayerGroup((0,)),))

    def fuse(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[tokens, len(layers) * hidden] -> [tokens, hidden]`: one feature a position."""
        return self.fuse_layers(hidden)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        features: torch.Tensor,
        plan: AttentionPlan,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[tokens]`, `[tokens]`, `[tokens, hidden] -> [kept tokens, hidden]`; writes the KV of these slots.

        features: those of the positions before `positions`. keep: indices of the tokens that are wanted; None: all.
        What comes out is the feature for the slots behind, and what `logits` reads.
        """
        inputs = torch.cat((self.input_norm(self.embedding(tokens)), self.hidden_norm(features)), dim=-1)
        residual = features if keep is None else features.index_select(0, keep)
        x = self.attention(inputs, [self.rope.angles(positions, features.dtype)], plan, residual, keep)
        return self.mlp(self.mlp_norm(x), x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden] -> [rows, draft vocabulary]`, float32."""
        return self._ops.linear(self.norm(hidden), self.head.weight, wide=True)

    def token_ids(self, drafts: torch.Tensor) -> torch.Tensor:
        """Ids of the head's vocabulary as the target's, any shape."""
        return drafts if self.offsets is None else drafts + self.offsets[drafts]

    def tensors(self) -> Tensors:
        """Checkpoint names of all weights, as SpecForge has them."""
        prefix = "midlayer."
        named = {
            f"{prefix}hidden_norm.weight": self.hidden_norm.weight,
            f"{prefix}input_layernorm.weight": self.input_norm.weight,
            f"{prefix}post_attention_layernorm.weight": self.mlp_norm.weight,
            "norm.weight": self.norm.weight,
        }
        named |= self.fuse_layers.tensors("") | self.attention.tensors(f"{prefix}self_attn.")
        return (
            named
            | self.mlp.tensors(f"{prefix}mlp.")
            | ({"lm_head.weight": self.head.weight} if self.own_output else {})
        )


@dataclass(frozen=True, slots=True)
class LoadedHead:
    """A head that fits its target."""

    module: DraftHead
    fingerprint: str


def load_draft_head(path: Path, target: LoadedModel) -> LoadedHead:
    """Reads the head in folder `path`, for `target`.

    Raises CheckpointError in one line: trained for another target, another hidden size or vocabulary, missing,
    unexpected or wrongly shaped tensors, unreadable files.
    """
    if not isinstance(target.module, Decoder):
        raise CheckpointError(f"{path} is a draft head; {target.config.architecture} has no hidden states to read")
    config = read_head_config(Fields.read(path / "config.json"), target.config.num_layers)
    _check_target(path, config, target)
    stored = {_own_name(name): tensor for name, tensor in find_tensors(path).items()}
    head = DraftHead(config, target.module, Place(target.dtype, target.device, target.kernels.ops))
    targets = head.tensors()
    offsets = torch.empty(config.draft_vocab, dtype=torch.int64)
    extras = {name: stored.pop(name) for name in (OFFSETS, MEMBERS) if name in stored}
    if not head.own_output:
        stored.pop("lm_head.weight", None)
    elif OFFSETS not in extras or extras[OFFSETS].shape != (config.draft_vocab,) or extras[OFFSETS].dtype != "I64":
        raise CheckpointError(f"{path}: a vocabulary of {config.draft_vocab} needs {OFFSETS}, int64 of that length")
    check_tensors(targets, stored, config.model)
    fill(targets, stored, config.model)
    if head.own_output:
        fill({OFFSETS: offsets}, {OFFSETS: extras[OFFSETS]}, config.model)
        ids = offsets + torch.arange(config.draft_vocab)
        if int(ids.min()) < 0 or int(ids.max()) >= config.model.vocab_size:
            raise CheckpointError(f"{path}: {OFFSETS} names tokens beyond the vocabulary of {config.model.vocab_size}")
        head.offsets = offsets.to(target.device)
    return LoadedHead(head, fingerprint(Fields.read(path / "config.json"), stored))


def _own_name(name: str) -> str:
    """The name a tensor has here; some checkpoints number their one layer."""
    return name.removeprefix("model.").replace("layers.0.", "midlayer.")


def _check_target(path: Path, config: HeadConfig, target: LoadedModel) -> None:
    if config.target and config.target != target.fingerprint:
        raise CheckpointError(
            f"{path} is a draft head for {config.target_name} with fingerprint {config.target}; "
            f"the model served is {target.path} with fingerprint {target.fingerprint}"
        )
    for name in ("vocab_size", "hidden_size"):
        theirs, ours = getattr(config.model, name), getattr(target.config, name)
        if theirs != ours:
            raise CheckpointError(f"{path} is a draft head for a {name} of {theirs}; {target.path} has {ours}")
