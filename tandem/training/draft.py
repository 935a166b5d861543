"""Training of a draft head: the target's own texts, unrolled drafting, cross-entropy against its distribution."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import log_softmax

from tandem.engine.model import LoadedModel
from tandem.engine.model.decoder import Decoder
from tandem.engine.model.draft_head import (
    ARCHITECTURE,
    MEMBERS,
    OFFSETS,
    default_layers,
    read_head_config,
)
from tandem.engine.model.fields import Fields
from tandem.errors import CheckpointError
from tandem.training.examples import Example, batches
from tandem.training.head import TrainableHead
from tandem.training.target import TargetReader

STEP_DECAY = 0.8
"""Weight of each further step of drafting: it only counts when those before were right."""
MISSING = 0.05
"""Share of slots that are shown no feature, as behind a cached prefix."""
MISSING_LAST = 0.5
"""Share of texts whose last slot of the prompt is shown none, as behind a hand-over."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a training run depends on, beside its target and its texts."""

    steps: int = 2000
    unroll: int = 5
    """Steps of drafting that are trained."""
    batch_tokens: int = 1024
    learning_rate: float = 1e-3
    """The peak, after a warm-up over the first twentieth; a cosine leads to a fiftieth of it."""
    intermediate: int = 0
    """Width of the head's network; 0 takes the target's."""
    draft_vocab: int = 0
    """Tokens that can be drafted, those that occur most; 0 is all, and then the output layer is the target's."""
    layers: tuple[int, ...] = ()
    """The target's layers that are read; empty takes the usual ones."""
    seed: int = 0
    bf16: bool = True
    """Whether products are computed in bfloat16; weights are kept in float32."""


@dataclass(frozen=True, slots=True)
class Report:
    """One step of the optimisation."""

    step: int
    loss: float
    """Mean cross-entropy of the steps of drafting, weighted."""
    accepted: float
    """Drafted tokens a step that greedy decoding would accept, over this batch's anchors; the target's own one not
    counted."""


class Trainer:
    """One run. `train` leaves the head in `head`, `save` writes it."""

    def __init__(self, target: LoadedModel, examples: Sequence[Example], recipe: Recipe, name: str) -> None:
        """name: of the target, for messages. Raises CheckpointError when the target has no hidden states to read."""
        if not isinstance(target.module, Decoder):
            raise CheckpointError(f"{target.path}: {target.config.architecture} has no hidden states to read")
        self.recipe = recipe
        self._target = target
        self._generator = torch.Generator().manual_seed(recipe.seed)
        limit = target.config.max_context
        self._examples = [Example(example.ids[:limit], example.start) for example in examples]
        self._chosen = _most_frequent(self._examples, target.config.vocab_size, recipe.draft_vocab)
        self.fields = _fields(target, recipe, name, len(self._chosen))
        config = read_head_config(Fields(self.fields, "the new head"), target.config.num_layers)
        embedding, output = target.module.embedding.weight, target.module.head.weight[self._chosen]
        self.head = TrainableHead(config, embedding, output).to(target.device)
        norm = target.module.norm
        self.head.initialise(norm.weight.float() + target.config.norm.offset, self._generator)
        self._reader = TargetReader(target, config.layers)

    def train(self, report: Callable[[Report], None]) -> None:
        """Optimises with AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101); tells of every step."""
        recipe = self.recipe
        optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
        )
        stream = batches(self._examples, recipe.batch_tokens, recipe.seed)
        for step in range(recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(step, recipe.steps)
            loss, accepted = self.loss(next(stream))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
            optimizer.step()
            report(Report(step + 1, float(loss.detach()), accepted))

    def loss(self, examples: Sequence[Example]) -> tuple[torch.Tensor, float]:
        """The mean loss of a batch, and how many drafted tokens a step would have been accepted."""
        device = self._target.device
        hidden, last = self._reader.read([example.ids for example in examples])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(example.ids) for example in examples], batch_first=True)
        ends = torch.tensor([len(example.ids) for example in examples])
        starts = torch.tensor([example.start for example in examples]) - 1
        anchors = starts[:, None] + torch.arange(int((ends - starts).max()) - 1)
        known = torch.rand(ids.shape, generator=self._generator) >= MISSING
        gone = torch.rand(len(examples), generator=self._generator) < MISSING_LAST
        known[torch.arange(len(examples))[gone], starts[gone]] = False
        real = anchors + 1 < ends[:, None]
        within = anchors.clamp(max=ids.shape[1] - 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.bf16):
            states = self.head(ids.to(device), hidden, known.to(device), within.to(device), self.recipe.unroll)
        rows = real.cumsum(1) - 1 + torch.cat((torch.zeros(1, dtype=torch.int64), real.sum(1).cumsum(0)[:-1]))[:, None]
        wanted = last.gather(1, within.to(device)[..., None].expand(-1, -1, last.shape[2]))[real.to(device)]
        logits = self._reader.logits(wanted)[:, self._chosen.to(device)]
        return self._compare(states, logits, real, rows)

    def _compare(
        self, states: Sequence[torch.Tensor], logits: torch.Tensor, real: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """Each step's cross-entropy with the target's distribution at its own slots.

        logits: `[real anchors, draft vocabulary]`. rows: `[batch, anchors]`, where an anchor's are among them.
        """
        goals, best = logits.softmax(-1), logits.argmax(-1)
        total, weights = torch.zeros((), device=logits.device), 0.0
        right = torch.ones(real.shape, dtype=torch.bool)
        accepted = 0.0
        for step, state in enumerate(states):
            valid = real & torch.nn.functional.pad(real[:, step:], (0, step))
            where = torch.nn.functional.pad(rows[:, step:], (0, step))[valid].to(logits.device)
            if len(where) == 0:
                break
            with torch.autocast(logits.device.type, torch.bfloat16, enabled=self.recipe.bf16):
                found = self.head.logits(state[valid.to(logits.device)]).float()
            weight = STEP_DECAY**step
            total = total - weight * (goals[where] * log_softmax(found, -1)).sum(-1).mean()
            weights += weight
            match = torch.zeros_like(right)
            match[valid] = (found.argmax(-1) == best[where]).cpu()
            right &= match
            accepted += float(right.sum())
        return total / weights, accepted / max(1, int(real.sum()))

    def save(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Writes configuration and weights, in the names of SpecForge's checkpoints."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in self.head.state_dict().items()}
        if "lm_head.weight" in tensors:
            tensors[OFFSETS] = self._chosen - torch.arange(len(self._chosen))
            tensors[MEMBERS] = torch.zeros(self._target.config.vocab_size, dtype=torch.bool)
            tensors[MEMBERS][self._chosen] = True
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)
        (folder / "config.json").write_text(json.dumps(self.fields, indent=2) + "\n")


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / max(1.0, steps / 20))
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _most_frequent(examples: Sequence[Example], vocab: int, count: int) -> torch.Tensor:
    """Ids of the reduced vocabulary, in order: those that the texts say most often; all where `count` is 0."""
    if not 0 < count < vocab:
        return torch.arange(vocab)
    said = torch.tensor([token for example in examples for token in example.ids[example.start :]])
    return torch.bincount(said, minlength=vocab).argsort(descending=True, stable=True)[:count].sort().values


def _fields(target: LoadedModel, recipe: Recipe, name: str, draft_vocab: int) -> dict[str, Any]:
    """The head's `config.json`."""
    model = target.config
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": recipe.intermediate or model.intermediate_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "num_hidden_layers": 1,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm.eps,
        "max_position_embeddings": model.max_positions,
        "rope_theta": model.ropes[0].theta if model.ropes else 10_000.0,
        "vocab_size": model.vocab_size,
        "draft_vocab_size": draft_vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(recipe.layers or default_layers(model.num_layers))},
        "target_name": name,
        "target_fingerprint": target.fingerprint,
    }
