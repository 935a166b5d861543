"""Train the demo model from scratch on the generated corpus: `python -m tandem.demo.train --out FOLDER`.

A small Llama (rotary positions, grouped-query attention, SwiGLU, tied embeddings) is trained with AdamW, linear
warm-up and cosine decay on chats of similar length padded together; only assistant tokens carry loss. The schedule
runs over `--steps` when given, which makes a run repeatable, else over `--minutes` of wall time.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tandem.demo.corpus import Chat, copying, training
from tandem.demo.induction import write_induction_circuit
from tandem.demo.tokenizer import BOS, END, encode_text, save_tokenizer, train_tokenizer

log = logging.getLogger("tandem.demo.train")
MAX_TOKENS = 1024
IGNORE = -100


@dataclass(frozen=True)
class Recipe:
    """What a training run depends on; `learning_rate` is the peak.

    The first `copy_steps` steps see only copies, see `tandem.demo.corpus.copying`.

    A step sums the gradients of `workers` batches of at most `batch_tokens` tokens, padding included, each computed by
    a thread on its own replica of the weights. Chats of one length are often of one family, so that a single batch
    would be a one-sided step; and threads that meet once a step, not once an operation, stand a busy machine.
    """

    out: Path
    init: Path | None = None
    seed: int = 0
    minutes: float = 20.0
    steps: int | None = None
    copy_steps: int = 100
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    batch_tokens: int = 1024
    workers: int = 2
    vocab_size: int = 2048
    tokenizer_chats: int = 20000
    hidden: int = 256
    layers: int = 4
    bf16: bool = True
    save_minutes: float = 2.0

    def __post_init__(self) -> None:
        if self.hidden < 128 or self.hidden % 64:
            raise ValueError(f"hidden must be a multiple of 64 and at least 128, not {self.hidden}")
        if self.layers < 2:
            raise ValueError(f"layers must be at least 2, not {self.layers}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, not {self.workers}")


@dataclass(frozen=True)
class Example:
    """Token ids of one chat and, for each, whether predicting it carries loss."""

    ids: tuple[int, ...]
    learn: tuple[bool, ...]


def encode_chat(tokenizer: Any, chat: Chat) -> Example:
    """Token ids as the chat template renders them; loss on assistant text and its end token.

    Plain text (family "plain") has no markup and carries loss everywhere.
    """
    bos, end = tokenizer.convert_tokens_to_ids([BOS, END])
    if chat.family == "plain":
        text = encode_text(tokenizer, chat.answer)
        lead = [bos] if len(text) % 2 else []
        return Example((*lead, *text, end), (True,) * (len(lead) + len(text) + 1))
    ids, learn = [bos], [False]
    for message in chat.messages:
        text = [*encode_text(tokenizer, message.content), end]
        ids += [tokenizer.convert_tokens_to_ids(f"<|{message.role}|>"), *text]
        learn += [False, *[message.role == "assistant"] * len(text)]
    return Example(tuple(ids), tuple(learn))


def batches(tokenizer: Any, chats: Iterator[Chat], seed: int, batch_tokens: int) -> Iterator[list[Example]]:
    """Batches of examples of similar length, at most `batch_tokens` tokens each, padding included."""
    rng = Random(f"batches {seed}")
    while True:
        pool = sorted((encode_chat(tokenizer, chat) for chat in islice(chats, 2000)), key=lambda e: len(e.ids))
        ready: list[list[Example]] = [[]]
        for example in pool:
            if len(example.ids) > MAX_TOKENS:
                continue
            if (len(ready[-1]) + 1) * len(example.ids) > batch_tokens:
                ready.append([])
            ready[-1].append(example)
        rng.shuffle(ready)
        yield from ready


def collate(examples: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, targets), int64 `[examples, longest]`; targets are shifted by one and `IGNORE` where nothing is learnt.

    Padding is on the right, so causal attention needs no further mask.
    """
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad)
    targets = torch.full((len(examples), longest), IGNORE)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        wanted = [token if learn else IGNORE for token, learn in zip(example.ids, example.learn, strict=True)]
        targets[row, : length - 1] = torch.tensor(wanted[1:])
    return ids, targets


def make_model(recipe: Recipe, tokenizer: Any) -> LlamaForCausalLM:
    """A freshly initialised Llama of the recipe's shape, fp32."""
    heads = recipe.hidden // 32
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.hidden * 11 // 4,
        num_hidden_layers=recipe.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.div_(math.sqrt(2 * recipe.layers))
    write_induction_circuit(model, recipe.seed)
    return model


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)


def loss_of(model: Any, ids: torch.Tensor, targets: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Summed cross-entropy over the learnt positions; logits are computed at those positions only."""
    with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        chosen = targets != IGNORE
        logits = model.lm_head(hidden[chosen])
    return functional.cross_entropy(logits.float(), targets[chosen], reduction="sum")


class Replicas:
    """The model and copies of it, one a worker thread; gradients are summed into the model's."""

    def __init__(self, model: LlamaForCausalLM, workers: int, bf16: bool) -> None:
        # Eager attention: with short sequences the fused kernel of the CPU takes a third of the step.
        model.set_attn_implementation("eager")
        self._models = [model, *(copy.deepcopy(model) for _ in range(workers - 1))]
        self._pool = ThreadPoolExecutor(workers)
        self._bf16 = bf16

    def backward(self, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """Leave the gradient of the mean loss over all parts, one a worker, in the model; return that loss."""
        learnt = sum(int((targets != IGNORE).sum()) for _, targets in parts)

        def run(model: LlamaForCausalLM, part: tuple[torch.Tensor, torch.Tensor]) -> float:
            loss = loss_of(model, *part, self._bf16) / learnt
            loss.backward()
            return float(loss.item())

        losses = list(self._pool.map(run, self._models, parts))
        for replica in self._models[1:]:
            for parameter, own in zip(self._models[0].parameters(), replica.parameters(), strict=True):
                if own.grad is not None:
                    parameter.grad = own.grad if parameter.grad is None else parameter.grad.add_(own.grad)
                    own.grad = None
        return sum(losses)

    @torch.no_grad()
    def broadcast(self) -> None:
        """Copy the model's weights to the replicas."""
        for replica in self._models[1:]:
            torch._foreach_copy_(list(replica.parameters()), list(self._models[0].parameters()))


def learning_rate_at(step: int, progress: float, recipe: Recipe) -> float:
    """Linear warm-up, then cosine decay to a fiftieth of the peak; `progress` runs from 0 to 1."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def save(model: LlamaForCausalLM, tokenizer: Any, folder: Path) -> None:
    """Write the model in bf16 with tokenizer, chat template and generation defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    small: Any = copy.deepcopy(model)
    small.to(torch.bfloat16)
    small.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    small.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    (folder / "model.safetensors").chmod(0o644)


def optimise(
    model: LlamaForCausalLM, tokenizer: Any, recipe: Recipe, report: Callable[[dict[str, float]], None]
) -> None:
    """Run the optimisation, saving to `recipe.out` now and then and at the end."""
    optimizer = make_optimizer(model, recipe)
    copies = batches(tokenizer, copying(recipe.seed), recipe.seed, recipe.batch_tokens)
    mixed = batches(tokenizer, training(recipe.seed), recipe.seed, recipe.batch_tokens)
    replicas = Replicas(model, recipe.workers, recipe.bf16)
    start = last_save = time.monotonic()
    step = tokens = 0
    recent: list[float] = []
    while True:
        elapsed = time.monotonic() - start
        progress = step / recipe.steps if recipe.steps else elapsed / (60 * recipe.minutes)
        if step % 100 == 0 or progress >= 1.0:
            mean = sum(recent) / max(1, len(recent))
            report({"step": step, "seconds": round(elapsed, 1), "tokens": tokens, "loss": round(mean, 4)})
            recent = []
        if progress >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, progress, recipe)
        examples = list(islice(copies if step < recipe.copy_steps else mixed, recipe.workers))
        recent.append(replicas.backward([collate(batch, tokenizer.pad_token_id) for batch in examples]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        replicas.broadcast()
        optimizer.zero_grad(set_to_none=True)
        tokens += sum(len(example.ids) for batch in examples for example in batch)
        step += 1
        if time.monotonic() - last_save > 60 * recipe.save_minutes:
            save(model, tokenizer, recipe.out)
            last_save = time.monotonic()
    save(model, tokenizer, recipe.out)


def train(recipe: Recipe) -> None:
    """Train tokenizer and model, or go on from `recipe.init`, and leave them in `recipe.out`."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(1)
    tokenizer: Any
    if recipe.init is None:
        chats = islice(training(recipe.seed), recipe.tokenizer_chats)
        tokenizer = train_tokenizer((m.content for chat in chats for m in chat.messages), recipe.vocab_size)
        model = make_model(recipe, tokenizer)
    else:
        tokenizer = AutoTokenizer.from_pretrained(recipe.init)
        model = LlamaForCausalLM.from_pretrained(recipe.init, dtype=torch.float32)
    log.info("recipe %s", {key: str(value) for key, value in asdict(recipe).items()})
    log.info("%d parameters, %d tokens in the vocabulary", sum(p.numel() for p in model.parameters()), len(tokenizer))
    optimise(model, tokenizer, recipe, lambda entry: log.info("%s", json.dumps(entry)))


def parse(arguments: list[str] | None = None) -> Recipe:
    """Read the command line into a recipe."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--init", type=Path, help="go on from this model folder instead of from scratch")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--minutes", type=float, default=Recipe.minutes, help="wall time of the schedule")
    parser.add_argument("--steps", type=int, help="steps of the schedule; overrides --minutes")
    parser.add_argument("--copy-steps", type=int, default=Recipe.copy_steps, help="first steps, on copies only")
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--batch-tokens", type=int, default=Recipe.batch_tokens)
    parser.add_argument("--workers", type=int, default=Recipe.workers, help="threads, and batches summed in one step")
    parser.add_argument("--hidden", type=int, default=Recipe.hidden, help="a multiple of 64, at least 128")
    parser.add_argument("--layers", type=int, default=Recipe.layers, help="layers, at least 2")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=Recipe.bf16)
    return Recipe(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parse())
