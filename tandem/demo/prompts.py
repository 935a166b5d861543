"""Prompts for training a draft head of the demo model: `python -m tandem.demo.prompts --count 12000 --out FILE`.

Chats of the training split alone, without their last answer: no phrasing or entity that is held out for evaluation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tandem.demo.corpus import training

LONGEST = 400
"""Characters of a prompt: the demo model's answers depend little on more, and each is computed."""


def prompts(seed: int) -> Iterator[list[dict[str, str]]]:
    """An endless stream of chats that ask for an answer; the same seed gives the same stream."""
    for chat in training(seed):
        messages = chat.prompt()
        if messages and sum(len(message["content"]) for message in messages) <= LONGEST:
            yield messages


def write(out: Path, count: int, seed: int) -> None:
    """Writes one JSON object a line, as `tandem train-draft` reads them."""
    lines = (json.dumps({"messages": messages}) + "\n" for messages in islice(prompts(seed), count))
    out.write_text("".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write prompts for a draft head of the demo model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=7)
    parsed = parser.parse_args()
    write(parsed.out, parsed.count, parsed.seed)
