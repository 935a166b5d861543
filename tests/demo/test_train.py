"""The training script in small: gradients of the replicas, the schedule, and a run that leaves a usable folder."""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandem.demo.corpus import training
from tandem.demo.evaluate import Verdict, accuracy
from tandem.demo.tokenizer import train_tokenizer
from tandem.demo.train import (
    IGNORE,
    Recipe,
    Replicas,
    batches,
    collate,
    learning_rate_at,
    loss_of,
    make_model,
    parse,
    train,
)

SMALL = Recipe(out=Path("unused"), hidden=128, layers=2, batch_tokens=256)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer((m.content for chat in islice(training(0), 300) for m in chat.messages), 512)


def test_replicas_give_the_gradient_of_the_whole_batch(tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = make_model(SMALL, tokenizer)
    single: Any = copy.deepcopy(model)
    single.set_attn_implementation("eager")
    parts = [collate(part, 0) for part in islice(batches(tokenizer, training(1), 1, 256), 2)]
    loss = Replicas(model, 2, bf16=False).backward(parts)
    learnt = sum(int((targets != IGNORE).sum()) for _, targets in parts)
    expected = torch.stack([loss_of(single, ids, targets, bf16=False) for ids, targets in parts]).sum() / learnt
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(model.parameters(), single.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm()


def test_batches_keep_to_the_token_limit_and_the_seed(tokenizer: Any) -> None:
    first = list(islice(batches(tokenizer, training(2), 2, 1024), 30))
    assert first == list(islice(batches(tokenizer, training(2), 2, 1024), 30))
    for batch in first:
        assert batch and len(batch) * max(len(example.ids) for example in batch) <= 1024


def test_targets_are_the_next_tokens_where_learnt(tokenizer: Any) -> None:
    examples = next(batches(tokenizer, training(3), 3, 512))
    ids, targets = collate(examples, tokenizer.pad_token_id)
    assert ids.shape == targets.shape
    chosen = targets[:, :-1] != IGNORE
    assert chosen.any() and torch.equal(ids[:, 1:][chosen], targets[:, :-1][chosen])
    assert (targets[:, -1] == IGNORE).all()


def test_learning_rate_warms_up_and_decays() -> None:
    recipe = Recipe(out=Path("unused"), learning_rate=1.0, warmup_steps=10)
    assert learning_rate_at(0, 0.0, recipe) == pytest.approx(0.1)
    assert learning_rate_at(50, 0.0, recipe) == pytest.approx(1.0)
    assert learning_rate_at(50, 0.5, recipe) == pytest.approx(0.51)
    assert learning_rate_at(99, 1.0, recipe) == pytest.approx(0.02)


def test_a_run_leaves_a_model_that_another_run_goes_on_from(tmp_path: Path) -> None:
    shape = ["--hidden", "128", "--layers", "2", "--batch-tokens", "256", "--steps", "2", "--copy-steps", "1"]
    train(parse(["--out", str(tmp_path / "a"), *shape]))
    train(parse(["--out", str(tmp_path / "b"), "--init", str(tmp_path / "a"), *shape]))
    folders = (tmp_path / "a", tmp_path / "b")
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert models[0].dtype == torch.bfloat16
    assert not torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)
    message = [{"role": "user", "content": "Hello!"}]
    assert tokenizers[0].apply_chat_template(message) == tokenizers[1].apply_chat_template(message)


@pytest.mark.parametrize(("field", "value"), [("hidden", 64), ("hidden", 200), ("layers", 1), ("workers", 0)])
def test_shapes_that_cannot_be_built_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*, not {value}"):
        Recipe(Path("unused"), **{field: value})  # type: ignore[arg-type]


def test_accuracy_counts_by_family() -> None:
    chats = list(islice(training(5), 40))
    table = accuracy([Verdict(chat, chat.answer if at % 2 else "wrong") for at, chat in enumerate(chats)])
    assert table["all"] == (20, 40)
    assert sum(asked for family, (_, asked) in table.items() if family != "all") == 40
