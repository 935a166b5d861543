"""Greedy exact-match accuracy of a demo model by family: `python -m tandem.demo.evaluate FOLDER`.

Two sets are asked: chats drawn as in training (with another seed) and the held-out split.
"""

from __future__ import annotations

import argparse
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandem.demo.corpus import Chat, held_out, in_distribution

log = logging.getLogger("tandem.demo.evaluate")
BATCH = 32


@dataclass(frozen=True)
class Verdict:
    """A chat and the model's greedy answer to its prompt."""

    chat: Chat
    given: str

    @property
    def right(self) -> bool:
        """Whether the answer is the expected one, character by character."""
        return self.given == self.chat.answer


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompts: Sequence[list[dict[str, str]]], max_new_tokens: int) -> list[str]:
    """Greedy answers to chat prompts, left-padded into one batch."""
    rows = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False) for prompt in prompts]
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
    texts: list[str] = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return texts


def judge(model: Any, tokenizer: Any, chats: Sequence[Chat]) -> list[Verdict]:
    """Ask every chat's prompt; chats of like answer length share a batch."""
    order = sorted(chats, key=lambda chat: len(chat.answer))
    verdicts: list[Verdict] = []
    for at in range(0, len(order), BATCH):
        part = order[at : at + BATCH]
        limit = 4 + max(len(tokenizer.encode(chat.answer, add_special_tokens=False)) for chat in part)
        given = answer(model, tokenizer, [chat.prompt() for chat in part], limit)
        verdicts += [Verdict(chat, text) for chat, text in zip(part, given, strict=True)]
    return verdicts


def accuracy(verdicts: Sequence[Verdict]) -> dict[str, tuple[int, int]]:
    """Family -> (right, asked), with the sum under "all"."""
    table: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for verdict in verdicts:
        for key in (verdict.chat.family, "all"):
            right, asked = table[key]
            table[key] = right + verdict.right, asked + 1
    return dict(table)


def evaluate(folder: Path, count: int, seed: int) -> None:
    """Log the accuracy table of both sets and the wrong answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sets = {"in distribution": in_distribution(seed, count), "held out": held_out(seed, count)}
    for title, chats in sets.items():
        verdicts = judge(model, tokenizer, chats)
        for verdict in verdicts:
            if not verdict.right:
                question = verdict.chat.prompt()[-1]["content"]
                log.info("%s, %s: %r -> %r", title, verdict.chat.family, question, verdict.given)
        for family, (right, asked) in sorted(accuracy(verdicts).items()):
            log.info("%-16s %-12s %4d of %4d  %.3f", title, family, right, asked, right / asked)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Measure a demo model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=400, help="chats in each set")
    parser.add_argument("--seed", type=int, default=1)
    parsed = parser.parse_args()
    evaluate(parsed.folder, parsed.count, parsed.seed)
