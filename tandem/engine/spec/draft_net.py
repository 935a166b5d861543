"""What a drafter with KV of its own computes with: a small model, or a head over the target's hidden states."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch

from tandem.engine.attention.base import AttentionPlan
from tandem.engine.model import LoadedModel, load_model
from tandem.engine.model.draft_head import LoadedHead, is_draft_head, load_draft_head
from tandem.errors import CheckpointError
from tandem.kv import KvLayout


class DraftNet(Protocol):
    """Computes what may come next from tokens and, a head does, from features. See `DraftHead` for the words."""

    name: str
    layers: tuple[int, ...]
    """The target's layers that it reads; none: tokens alone."""
    layout: KvLayout
    """Its own KV."""
    lasting: bool
    """Whether the KV of a drafted token stays right once the token is accepted."""
    fingerprint: str

    def fuse(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[tokens, len(layers) * hidden] -> [tokens, features]`."""

    def nothing(self, count: int) -> torch.Tensor:
        """`[count, features]` that stand for features which are not at hand."""

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        features: torch.Tensor,
        plan: AttentionPlan,
        keep: torch.Tensor,
    ) -> torch.Tensor:
        """Writes the KV of these positions; the states of the kept ones, `[kept, hidden]`, which are features too."""

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden] -> [rows, choices]`, float32."""

    def token_ids(self, choices: torch.Tensor) -> torch.Tensor:
        """Ids of the target's vocabulary, any shape."""


class HeadNet:
    """A draft head."""

    name = "head"
    lasting = False  # the head's own states stood in for the target's

    def __init__(self, loaded: LoadedHead) -> None:
        head = loaded.module
        self._head = head
        self.fingerprint = loaded.fingerprint
        self.layers = head.layers
        self.layout = head.layout
        self.fuse = head.fuse
        self.forward = head.forward
        self.logits = head.logits
        self.token_ids = head.token_ids

    def nothing(self, count: int) -> torch.Tensor:
        """See `DraftNet`."""
        weight = self._head.embedding.weight
        return weight.new_zeros(count, weight.shape[1])


class ModelNet:
    """A draft model: it needs nothing of the target but its tokens."""

    name = "model"
    layers: tuple[int, ...] = ()
    lasting = True

    def __init__(self, loaded: LoadedModel, vocab_size: int) -> None:
        """vocab_size: the target's; a model may have more rows than its tokeniser has tokens."""
        self._module = loaded.module
        self._device = loaded.device
        self.fingerprint = loaded.fingerprint
        self._choices = min(vocab_size, loaded.config.vocab_size)
        self.layout = loaded.layout

    def fuse(self, hidden: torch.Tensor) -> torch.Tensor:
        """Nothing is read."""
        return hidden[:, :0]

    def nothing(self, count: int) -> torch.Tensor:
        """See `DraftNet`."""
        return torch.empty(count, 0, device=self._device)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        features: torch.Tensor,
        plan: AttentionPlan,
        keep: torch.Tensor,
    ) -> torch.Tensor:
        """See `DraftNet`."""
        return self._module.forward(tokens, positions, plan, keep)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """See `DraftNet`."""
        return self._module.logits(states)[:, : self._choices]

    def token_ids(self, choices: torch.Tensor) -> torch.Tensor:
        """See `DraftNet`."""
        return choices


def load_draft_net(path: Path, target: LoadedModel) -> DraftNet:
    """The draft head or draft model in folder `path`, for `target`.

    Raises CheckpointError in one line: a head for another target, a model with another vocabulary, and whatever may be
    wrong with a checkpoint.
    """
    if is_draft_head(path):
        return HeadNet(load_draft_head(path, target))
    loaded = load_model(path, str(target.dtype).removeprefix("torch."), target.device, target.kernels)
    _check_vocabulary(loaded, target)
    return ModelNet(loaded, target.config.vocab_size)


def joined_fingerprint(target: str, drafter: str) -> str:
    """Of a model together with its drafter: cached and moved KV is of both."""
    return hashlib.blake2b(f"{target} {drafter}".encode(), digest_size=16).hexdigest()


def _check_vocabulary(drafter: LoadedModel, target: LoadedModel) -> None:
    """Equal tokenisers, or, where one has no file for it, equally many rows. Raises CheckpointError."""
    ours, theirs = (_vocabulary(Path(loaded.path)) for loaded in (target, drafter))
    what = f"draft model {drafter.path} has another vocabulary than {target.path}"
    sizes = f"{drafter.config.vocab_size} tokens, and the model served has {target.config.vocab_size}"
    if not ours or not theirs:
        if drafter.config.vocab_size != target.config.vocab_size:
            raise CheckpointError(f"{what}: {sizes}")
        return
    if ours != theirs:
        token = min(ours.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))[1]
        raise CheckpointError(f"{what}: {sizes}; they differ from token {token} on, so drafts would mean other texts")


def _vocabulary(path: Path) -> dict[str, int]:
    """Tokens and ids of a checkpoint's tokeniser; empty where it has none of the fast kind."""
    try:
        stored: Any = json.loads((path / "tokenizer.json").read_bytes())
        vocab = stored["model"]["vocab"]
        pieces = vocab if isinstance(vocab, dict) else {piece: number for number, (piece, _) in enumerate(vocab)}
        return dict(pieces) | {added["content"]: added["id"] for added in stored.get("added_tokens", ())}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {path / 'tokenizer.json'}: {error}") from error
