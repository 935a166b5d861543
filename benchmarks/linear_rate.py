"""How fast torch reads a model's weights: every matrix of a checkpoint times one row, as a decode step at batch 1 does.

    python -m benchmarks.linear_rate FOLDER [--threads 2]

The yardstick for the time between tokens of one client: a step can be as fast as its weights are read, and
`torch.nn.functional.linear` is what everybody has. Tied embeddings count once, as the logits' matrix; an embedding that
is not tied is only looked up, and left out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from safetensors import safe_open


@dataclass(frozen=True)
class LinearRate:
    """One measurement."""

    weight_mb: float
    ms: float
    """Median over passes."""

    @property
    def gb_s(self) -> float:
        """Weights over time."""
        return self.weight_mb / self.ms


def matrices(folder: Path) -> list[torch.Tensor]:
    """The weights of a checkpoint's linear layers, `[out, in]`, bfloat16. Raises ValueError when there are none."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    weights = {name: tensor.bfloat16() for name, tensor in found.items() if tensor.dim() == 2}
    if "lm_head.weight" in weights:
        weights = {name: tensor for name, tensor in weights.items() if not name.endswith("embed_tokens.weight")}
    if not weights:
        raise ValueError(f"{folder} holds no safetensors with matrices")
    return list(weights.values())


@torch.inference_mode()
def measure(weights: Sequence[torch.Tensor], passes: int) -> LinearRate:
    """All products one after another, on torch's threads."""
    rows = {size: torch.randn(1, size).bfloat16() for size in {weight.shape[1] for weight in weights}}
    times = []
    for _ in range(passes + 1):
        started = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(rows[weight.shape[1]], weight)
        times.append((time.perf_counter() - started) * 1e3)
    return LinearRate(sum(weight.nbytes for weight in weights) / 1e6, median(times[1:]))


def main(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    threads: Annotated[int, typer.Option(min=1)] = 1,
    passes: Annotated[int, typer.Option(min=1)] = 20,
) -> None:
    torch.set_num_threads(threads)
    rate = measure(matrices(folder), passes)
    print(json.dumps({**asdict(rate), "gb_s": rate.gb_s}))


if __name__ == "__main__":
    typer.run(main)
