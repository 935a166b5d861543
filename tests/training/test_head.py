"""The head that is trained and the head that drafts are one."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tandem.engine.attention.base import AttentionBatch
from tandem.engine.attention.torch_paged import TorchPagedAttention
from tandem.engine.kernels.choose import Kernels, choose_kernels
from tandem.engine.kv_pool import KvPool
from tandem.engine.model import LoadedModel, load_model
from tandem.engine.model.draft_head import DraftHead, load_draft_head
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.training.draft import Recipe, Trainer
from tandem.training.examples import Example

CPU = torch.device("cpu")
SHAPES = [
    CheckpointSpec(layers=4, vocab=300),
    CheckpointSpec(hidden=48, layers=2, heads=6, kv_heads=1, head_dim=8, intermediate=40, vocab=270, tied=True, seed=1),
    CheckpointSpec(family="qwen2", layers=9, vocab=300, kv_heads=4, seed=2),
]


def run_paged(head: DraftHead, ids: list[int], hidden: torch.Tensor, chunks: list[int], anchor: int) -> torch.Tensor:
    """States of slots up to the anchor in chunks, then of the slots behind, one by one, from the head's own states."""
    pool = KvPool(head.layout, 8, 16, CPU)
    attention = TorchPagedAttention(pool)
    features = torch.cat((torch.zeros(1, hidden.shape[1] // len(head.layers)), head.fuse(hidden)))
    states, start = list[torch.Tensor](), 0
    for end in [*chunks, *range(anchor + 2, len(ids) + 1)]:
        batch = AttentionBatch(np.array([start]), np.array([end - start]), [[np.arange(8)[::-1]]])
        own = features[start:end] if start <= anchor else states[-1][-1:]
        where = torch.arange(start, end)
        states.append(head.forward(torch.tensor(ids[start:end]), where, own, attention.plan(batch)))
        start = end
    return torch.cat(states)


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("spec", SHAPES, ids=lambda spec: f"{spec.family}-{spec.hidden}-{spec.layers}")
def test_engine_and_trainer_compute_the_same(spec: CheckpointSpec, kernels: str, tmp_path: Path) -> None:
    chosen: Kernels = choose_kernels("native" if kernels == "native" else "torch", CPU)
    loaded = load_model(make_checkpoint(tmp_path / "target", spec), "float32", CPU, chosen)
    rng = random.Random(spec.seed)
    ids = [rng.randrange(spec.vocab) for _ in range(40)]
    trainer = Trainer(loaded, [Example(tuple(ids), 1)], Recipe(seed=spec.seed, bf16=False), "target")
    trainer.save(tmp_path / "head", torch.float32)
    head = load_draft_head(tmp_path / "head", loaded).module
    hidden = torch.randn(1, len(ids), len(head.layers) * spec.hidden, generator=torch.Generator().manual_seed(3))
    anchor, steps = 33, 7
    with torch.no_grad():
        known = torch.ones(1, len(ids), dtype=torch.bool)
        anchors = torch.arange(anchor + 1)[None]
        theirs = trainer.head(torch.tensor([ids]), hidden, known, anchors, steps)
        ours = run_paged(head, ids, hidden[0], [5, 6, 30, anchor + 1], anchor)
        torch.testing.assert_close(ours[: anchor + 1], theirs[0][0], atol=1e-4, rtol=1e-4)
        for step in range(1, steps):
            torch.testing.assert_close(ours[anchor + step], theirs[step][0, anchor], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(head.logits(ours), trainer.head.logits(ours), atol=1e-4, rtol=1e-4)


def test_a_reduced_vocabulary_is_the_same_in_both(tmp_path: Path) -> None:
    loaded = load_model(make_checkpoint(tmp_path / "target", SHAPES[0]), "float32", CPU)
    ids = tuple([7] * 9 + [250] * 8 + [31] * 7 + [299] * 6 + [5])
    trainer = Trainer(loaded, [Example(ids, 1)], Recipe(draft_vocab=4, bf16=False), "target")
    trainer.save(tmp_path / "head", torch.float32)
    head = load_draft_head(tmp_path / "head", loaded).module
    states = torch.randn(5, SHAPES[0].hidden)
    with torch.no_grad():
        torch.testing.assert_close(head.logits(states), trainer.head.logits(states), atol=1e-5, rtol=1e-5)
    assert head.token_ids(torch.arange(4)).tolist() == [7, 31, 250, 299]
    assert head.token_ids(torch.tensor([[3, 0]])).tolist() == [[299, 7]]


def loaded_for(spec: CheckpointSpec, path: Path) -> LoadedModel:
    return load_model(make_checkpoint(path, spec), "float32", CPU)


def test_training_lowers_the_loss_and_depends_on_nothing_but_the_seed(tmp_path: Path) -> None:
    loaded = loaded_for(SHAPES[0], tmp_path / "target")
    rng = random.Random(0)
    words = [[rng.randrange(300) for _ in range(6)] for _ in range(3)]
    texts = [Example(tuple(token for _ in range(4) for token in rng.choice(words)), 8) for _ in range(12)]
    recipe = Recipe(steps=24, unroll=3, batch_tokens=96, learning_rate=3e-3, bf16=False)

    def run() -> tuple[list[float], dict[str, torch.Tensor]]:
        trainer, losses = Trainer(loaded, texts, recipe, "target"), list[float]()
        trainer.train(lambda report: losses.append(report.loss))
        return losses, trainer.head.state_dict()

    losses, weights = run()
    again, same = run()
    assert losses == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_each_step_of_drafting_is_compared_at_its_own_slot(tmp_path: Path) -> None:
    """With the target's own states as the head's, every step's guess is right, and the loss is the entropy."""
    loaded = loaded_for(SHAPES[0], tmp_path / "target")
    trainer = Trainer(loaded, [Example(tuple(range(30)), 5)], Recipe(unroll=3, bf16=False), "target")
    texts = [Example(tuple(range(30)), 5), Example(tuple(range(100, 117)), 9)]
    found: list[torch.Tensor] = []

    def oracle(
        ids: torch.Tensor, hidden: torch.Tensor, known: torch.Tensor, anchors: torch.Tensor, steps: int
    ) -> object:
        _, last = trainer._reader.read([text.ids for text in texts])
        slots = [(anchors + step).clamp(max=ids.shape[1] - 1) for step in range(steps)]
        found.extend(slots)
        return [last.gather(1, slot[..., None].expand(-1, -1, last.shape[2])) for slot in slots]

    trainer.head.forward = oracle  # type: ignore[assignment]
    trainer.head.logits = loaded.module.logits  # type: ignore[method-assign,assignment]
    loss, accepted = trainer.loss(texts)
    anchors = sum(len(text.ids) - text.start for text in texts)
    steps = [sum(max(0, len(text.ids) - text.start - step) for text in texts) for step in range(3)]
    assert accepted == pytest.approx(sum(steps) / anchors)
    assert found[0][0, 0] == 4
    logits = loaded.module.logits(trainer._reader.read([texts[0].ids])[1][0])
    assert 0 < float(loss) < float(torch.log(torch.tensor(float(logits.shape[1]))))
