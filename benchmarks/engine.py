"""The engine alone, in this process: prefill, decode steps and the Python around them, torch's kernels against native.

python -m benchmarks.engine [MODEL] [--shape qwen2-380m] [--batches 1,8,16] [--context 400] [--threads 1] [--json]

Kinds of kernels take turns within one run, and each figure is the median of the turns' best: on a machine with other
work the best of many steps says what a step costs, the median over turns that it was no accident. The limit is measured
too: how fast this machine reads memory and multiplies bfloat16 matrices, and how fast torch's linear reads the weights.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.linear_rate import measure as linear_rate
from tandem.config import DecodeConfig
from tandem.device import set_compute_threads
from tandem.engine.build import build_engine
from tandem.engine.engine import Engine
from tandem.engine.kernels.ops import Ops
from tandem.engine.model import LoadedModel
from tandem.hub import resolve_model
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.engine import make_seq

KINDS: dict[str, dict[str, str]] = {
    "torch": {"kernels": "torch"},
    "native": {"kernels": "native"},
    "native, overlapping": {"kernels": "native", "overlap": "on"},
}
"""Kinds of kernels, and of steps: settings of a worker."""
SHAPES = {
    "qwen2-380m": CheckpointSpec(
        "qwen2", hidden=1024, layers=24, heads=16, kv_heads=4, head_dim=64, intermediate=4096, vocab=17000,
        tied=True, dtype="bfloat16", std=0.02,
    ),
}  # fmt: skip
"""Random weights, for the speed of sizes that are not at hand."""
PREFILL_TOKENS = 1536
CHUNK = 512
WARM_STEPS = 8
LINEAR_PASSES = 8


@dataclass(frozen=True)
class Limit:
    """What this machine can do, on the threads that the engine has."""

    read_gb_s: float
    matmul_gflop_s: float
    linear_gb_s: float
    """Weights through `torch.nn.functional.linear`, one row each."""


@dataclass(frozen=True)
class Step:
    """A decode step, the best of many in each part. Milliseconds."""

    wall: float
    python: float
    """All of it that is neither the model nor its logits; what follows are its parts."""
    schedule: float
    runner: float
    """Building the batch, and sampling."""
    commit: float


@dataclass(frozen=True)
class Figure:
    """One kind of kernels; decode steps by batch size."""

    kernels: str
    prefill_tokens_s: float
    decode: dict[int, Step]


@dataclass(frozen=True)
class Report:
    """A run."""

    model: str
    parameters: int
    weight_mb: float
    kv_token_bytes: int
    context: int
    threads: int
    limit: Limit
    figures: tuple[Figure, ...]

    def floor_ms(self, batch: int) -> float:
        """A decode step reads the weights and the KV once, and multiplies each weight by each row."""
        reading = (self.weight_mb * 1e6 + batch * self.context * self.kv_token_bytes) / self.limit.read_gb_s
        return max(reading, self.parameters * 2 * batch / self.limit.matmul_gflop_s) / 1e6


def best(run: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of so many runs."""
    fastest = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - started)
    return fastest


def measure_limit(weights: list[torch.Tensor], ops: Ops) -> Limit:
    """Memory is read from as many bytes as the weights have, for a small model lies in caches.

    By a sum, and by a product of one row: the better of these counts. Products for the rate are 1024 x 1024 x 4096.
    """
    size = sum(weight.nbytes for weight in weights)
    matrices = [weight for weight in weights if weight.dim() == 2]
    memory = torch.ones(max(1, size // 2048), 1024, dtype=torch.bfloat16)
    words, row = memory.view(torch.int32), torch.ones(1, 1024, dtype=torch.bfloat16)
    reading = min(best(lambda: words.sum(dtype=torch.int32), 8), best(lambda: ops.linear(row, memory), 8))
    rows, weight = torch.randn(1024, 1024).bfloat16(), torch.randn(4096, 1024).bfloat16()
    multiplying = best(lambda: torch.nn.functional.linear(rows, weight), 8)
    rate = 2 * 1024 * 1024 * 4096 / multiplying / 1e9
    return Limit(memory.nbytes / reading / 1e9, rate, linear_rate(matrices, LINEAR_PASSES).gb_s)


class Bench:
    """One engine; sequences of it are measured again and again."""

    def __init__(self, folder: Path, kind: str, room: int) -> None:
        fixed = {"model": str(folder), "prefix_cache": False, "max_batch_tokens": CHUNK, "pages": -(-room // 16)}
        config = DecodeConfig.model_validate({**fixed, **KINDS[kind]})
        self.engine: Engine
        self.loaded: LoadedModel
        self.engine, self.loaded = build_engine(config)
        self._vocab = self.loaded.config.vocab_size
        self._names = 0
        self._inside = 0.0
        runner = vars(self.engine)["_runner"]
        for owner, name in ((runner, "_hidden"), (runner, "_logits_of"), (runner, "_replayed")):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., object]) -> Callable[..., object]:
        def timed(*arguments: object) -> object:
            started = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self._inside += time.perf_counter() - started

        return timed

    def _add(self, prompt_tokens: int, max_tokens: int) -> None:
        self._names += 1
        prompt = [(31 * at * at + 7 * self._names) % (self._vocab - 8) + 8 for at in range(prompt_tokens)]
        self.engine.add(make_seq(f"seq-{self._names}", prompt, max_tokens=max_tokens))

    def prefill(self) -> float:
        """Tokens a second, in chunks, one prompt."""
        self._add(PREFILL_TOKENS, 1)
        started = time.perf_counter()
        while self.engine.has_work():
            self.engine.step()
        return PREFILL_TOKENS / (time.perf_counter() - started)

    def decode(self, batch: int, context: int, steps: int) -> Step:
        """The fastest of so many steps at a batch size, and the least of each part."""
        for _ in range(batch):
            self._add(context - steps // 2, steps + WARM_STEPS + batch * context)
        while any(seq.pending > 1 for seq in self.engine.seqs.values()):
            self.engine.step()
        taken: list[Step] = []
        for _ in range(WARM_STEPS + steps):
            before, self._inside, started = self._inside, 0.0, time.perf_counter()
            done = self.engine.step()
            wall = time.perf_counter() - started
            assert done.batch_tokens == batch, "a step that is measured must be a full one"
            # Where steps overlap, the one that is reported was launched by the call before.
            inside = before if self.engine.config.overlap else self._inside
            parts = (wall, wall - self._inside, done.schedule_s, done.forward_s - inside, done.commit_s)
            taken.append(Step(*(part * 1e3 for part in parts)))
        del taken[:WARM_STEPS]
        for name in list(self.engine.seqs):
            self.engine.cancel(name)
        while self.engine.has_work():
            self.engine.step()
        return combine(min, taken)


def combine(pick: Callable[[list[float]], float], steps: list[Step]) -> Step:
    """One step out of many, part by part."""
    columns = zip(*(astuple(step) for step in steps), strict=True)
    return Step(*(pick(list(column)) for column in columns))


def measure(folder: Path, name: str, batches: list[int], context: int, threads: int, rounds: int, steps: int) -> Report:
    """All kinds, turn by turn."""
    threads = set_compute_threads(threads)
    room = max(PREFILL_TOKENS + 16, max(batches) * (context + steps + max(batches) * context // CHUNK + 64))
    benches = {kind: Bench(folder, kind, room) for kind in KINDS}
    prefill: dict[str, list[float]] = {kind: [] for kind in KINDS}
    decode: dict[tuple[str, int], list[Step]] = {(kind, batch): [] for kind in KINDS for batch in batches}
    held = {tensor.data_ptr(): tensor for tensor in benches["torch"].loaded.module.tensors().values()}
    weights = list(held.values())
    limits = []
    for _ in range(rounds):
        limits.append(measure_limit(weights, benches["native"].loaded.kernels.ops))
        for kind, bench in benches.items():
            prefill[kind].append(max(bench.prefill() for _ in range(2)))
            for batch in batches:
                decode[kind, batch].append(bench.decode(batch, context, steps))
    figures = tuple(
        Figure(
            kind,
            median(prefill[kind]),
            {batch: combine(median, decode[kind, batch]) for batch in batches},
        )
        for kind in KINDS
    )
    limit = Limit(*(max(each) for each in zip(*(astuple(one) for one in limits), strict=True)))
    token_bytes = benches["native"].loaded.layout.token_bytes
    parameters, size = sum(weight.numel() for weight in weights), sum(weight.nbytes for weight in weights)
    return Report(name, parameters, size / 1e6, token_bytes, context, threads, limit, figures)


def show(report: Report) -> Table:
    """One row for each kind of kernels and one for what the machine allows."""
    table = Table(title=f"{report.model}: {report.weight_mb:.0f} MB of weights, context {report.context}")
    table.add_column("kernels")
    table.add_column("prefill, tokens/s", justify="right")
    batches = list(report.figures[0].decode)
    for batch in batches:
        table.add_column(f"decode {batch}, ms (Python)", justify="right")
    for figure in report.figures:
        steps = [f"{figure.decode[batch].wall:.2f} ({figure.decode[batch].python:.2f})" for batch in batches]
        table.add_row(figure.kernels, f"{figure.prefill_tokens_s:,.0f}", *steps)
    limit = report.limit
    table.add_row("limit", "", *(f"{report.floor_ms(batch):.2f}" for batch in batches))
    lines = [
        f"{report.threads} thread(s); reads {limit.read_gb_s:.1f} GB/s, multiplies {limit.matmul_gflop_s:.0f} GFLOP/s",
        f"weights through torch's linear, one row: {limit.linear_gb_s:.1f} GB/s",
    ]
    if 1 in batches:
        read = {figure.kernels: report.weight_mb / figure.decode[1].wall for figure in report.figures}
        lines.append("weights over a step at batch 1: " + ", ".join(f"{k} {v:.1f} GB/s" for k, v in read.items()))
    table.caption = "\n".join(lines)
    return table


def show_python(report: Report) -> Table:
    """What of a decode step is neither the model nor its logits."""
    table = Table(title="Python in a decode step")
    for column in ("kernels", "batch", "schedule, ms", "batch and sampling, ms", "commit, ms", "share of the step"):
        table.add_column(column, justify="right")
    for figure in report.figures:
        for batch, step in figure.decode.items():
            parts = [f"{part:.3f}" for part in (step.schedule, step.runner, step.commit)]
            table.add_row(figure.kernels, str(batch), *parts, f"{step.python / step.wall:.1%}")
    return table


def main(
    model: Annotated[str, typer.Argument(help="folder, hub id or demo")] = "demo",
    shape: Annotated[str, typer.Option(help=f"random weights in place of a model: {', '.join(SHAPES)}")] = "",
    batches: Annotated[str, typer.Option(help="sequences in a decode step, separated by commas")] = "1,8,16",
    context: Annotated[int, typer.Option(help="tokens of each sequence in a decode step", min=64)] = 400,
    threads: Annotated[int, typer.Option(help="compute threads", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="turns of each kind of kernels", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="decode steps in a turn", min=1)] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object in place of a table")] = False,
) -> None:
    sizes = [int(size) for size in batches.split(",")]
    if shape:
        with tempfile.TemporaryDirectory() as folder:
            made = make_checkpoint(Path(folder), SHAPES[shape])
            report = measure(made, shape, sizes, context, threads, rounds, steps)
    else:
        report = measure(Path(resolve_model(model)), model, sizes, context, threads, rounds, steps)
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        Console().print(show(report), show_python(report))


if __name__ == "__main__":
    typer.run(main)
