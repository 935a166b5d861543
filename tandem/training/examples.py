"""What a draft head learns from: texts of the target's own, and batches of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from random import Random

from tandem.engine.engine import Engine
from tandem.engine.sequence import Seq
from tandem.errors import BadRequest, ConfigError
from tandem.text.tokenizer import Tokenizer
from tandem.types import SamplingParams

AT_ONCE = 256
"""Sequences that the engine knows at a time: it sorts its queue in every step."""


@dataclass(frozen=True, slots=True)
class Example:
    """A text's token ids. What is learnt begins at `start`: what stands before was asked, not said, by the target."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to be continued by the target, or, `whole`, a text to be learnt as it is."""

    ids: tuple[int, ...]
    whole: bool = False


def read_prompts(path: Path, tokenizer: Tokenizer) -> list[Prompt]:
    """One JSON object a line: `messages` (a chat), `prompt` (a text to be continued) or `text` (learnt as it is).

    Raises ConfigError naming the line that is neither.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts is {path}, which cannot be read: {error}", "prompts") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompts.append(_prompt(json.loads(line), tokenizer))
            except (ValueError, TypeError, KeyError, BadRequest) as error:
                where = f"--prompts: line {number} of {path}"
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ConfigError(f"{where} has no valid messages, prompt or text: {reason}", "prompts") from None
    if not prompts:
        raise ConfigError(f"--prompts is {path}, which holds no line", "prompts")
    return prompts


def _prompt(line: object, tokenizer: Tokenizer) -> Prompt:
    if not isinstance(line, dict):
        raise TypeError(f"a {type(line).__name__} in place of an object")
    messages = line.get("messages")
    if isinstance(messages, list):
        return Prompt(tuple(tokenizer.encode(tokenizer.render(messages))))
    text = line["prompt"] if "prompt" in line else line["text"]
    if not isinstance(text, str) or not text:
        raise ValueError("an empty text" if text == "" else f"a {type(text).__name__} in place of a text")
    return Prompt(tuple(tokenizer.encode(text, add_special_tokens=True)), "prompt" not in line)


def continue_prompts(
    engine: Engine,
    prompts: Sequence[Prompt],
    eos_ids: frozenset[int],
    sampling: SamplingParams,
    on_done: Callable[[int], None],
) -> list[Example]:
    """The target's own continuations, in the order of the prompts: every other one greedy, the others sampled.

    What it cannot continue is left out. on_done: told in each step how many prompts are done.
    """
    found: dict[int, Example] = {}
    done = 0
    waiting = iter(list(enumerate(prompts)))
    running: dict[str, int] = {}
    while True:
        while len(running) < AT_ONCE and (item := next(waiting, None)) is not None:
            number, prompt = item
            if prompt.whole:
                found[number] = Example(prompt.ids, 1)
                done += 1
            elif len(prompt.ids) + sampling.max_tokens <= engine.capacity_tokens:
                running[str(number)] = number
                seed, temperature = sampling.seed + number, sampling.temperature if number % 2 else 0.0
                params = replace(sampling, seed=seed, temperature=temperature)
                engine.add(Seq(str(number), list(prompt.ids), len(prompt.ids), params, b"", eos_ids))
        if not running:
            return [found[number] for number in sorted(found) if len(found[number].ids) > found[number].start + 1]
        for output in engine.step().outputs:
            if output.finish is not None:
                number = running.pop(output.seq.seq_id)
                found[number] = Example(tuple(output.seq.tokens), output.seq.prompt_len)
                done += 1
        on_done(done)


def batches(examples: Sequence[Example], batch_tokens: int, seed: int) -> Iterator[list[Example]]:
    """Endless batches of examples of like length, at most `batch_tokens` tokens each with padding, or one example."""
    ordered = sorted(examples, key=lambda example: (len(example.ids), example.ids))
    groups: list[list[Example]] = [[]]
    for example in ordered:
        if groups[-1] and (len(groups[-1]) + 1) * len(example.ids) > batch_tokens:
            groups.append([])
        groups[-1].append(example)
    for epoch in count():
        order = list(groups)
        Random(f"{seed} {epoch}").shuffle(order)
        yield from order
