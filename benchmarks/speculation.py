"""Speculative decoding, on and off in one run, by the engine alone in this process.

python -m benchmarks.speculation                                      # real drafters on the demo model
python -m benchmarks.speculation --shape qwen2-380m --rates 2.0,3.0   # acceptance forced, at a realistic size

Real drafters: what they are worth depends on the text. Copying is what prompt lookup is for; the demo model's held-out
questions have short answers, with little to copy, unless they were given before. Forced: every sequence is made to say
one token for ever, a drafter that knows it is wrong as often as makes so many tokens a step at the longest draft, and
what is measured is speed. With and without drafts take turns on the same engine; a figure is the median of the turns.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.engine import SHAPES
from tandem.config import DecodeConfig
from tandem.demo.corpus import Chat, copying, held_out
from tandem.device import set_compute_threads
from tandem.engine.build import build_engine
from tandem.engine.engine import Engine
from tandem.engine.sequence import Draft, Row, Seq
from tandem.engine.spec.speculation import Speculation
from tandem.hub import resolve_drafter, resolve_model
from tandem.testing.checkpoints import make_checkpoint
from tandem.testing.engine import make_seq
from tandem.text.tokenizer import Tokenizer
from tandem.types import SamplingParams

FAVOURED = 100
"""The token that every sequence is made to say where acceptance is forced."""


@dataclass(frozen=True)
class Figure:
    """One task at one batch size."""

    task: str
    drafter: str
    batch: int
    tokens_a_step: float
    """Of each sequence, over all its decode steps, drafts or none."""
    drafted: int
    accepted: int
    plain_tokens_s: float
    tokens_s: float
    equal: bool
    """Whether all outputs were those of plain decoding."""

    @property
    def speed(self) -> float:
        """Times that of plain decoding."""
        return self.tokens_s / self.plain_tokens_s


@dataclass(frozen=True)
class Task:
    """What is generated."""

    name: str
    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    eos: frozenset[int]
    known: bool = False
    """Whether prompts and answers of earlier turns may be found in the cache, and by those who look there."""


@dataclass
class Pass:
    """One turn over some sequences."""

    tokens: int = 0
    rows: int = 0
    """Steps times sequences in them."""
    seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0
    outputs: tuple[tuple[int, ...], ...] = ()


class Oracle:
    """Knows the answer, and is wrong at a rate."""

    name = "oracle"
    free = False
    branches = 1

    def __init__(self, chance: float) -> None:
        """chance: that a drafted token is right."""
        self._chance = chance
        self._random = random.Random(1)

    def propose(self, seqs: Sequence[Seq], limits: Sequence[int]) -> list[Draft]:
        """See `Drafter`."""
        return [
            Draft(tuple(FAVOURED if self._random.random() < self._chance else FAVOURED + 1 for _ in range(limit)))
            for limit in limits
        ]

    def committed(self, row: Row, accepted: Sequence[int]) -> None:
        """See `Drafter`."""

    def forget(self, seq: Seq) -> None:
        """See `Drafter`."""


def chance_for(rate: float, length: int) -> float:
    """Acceptance of a token with which drafts of `length` give `rate` tokens a step: `1 + p + ... + p^length`."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        given = sum(middle**place for place in range(length + 1))
        low, high = (middle, high) if given < rate else (low, middle)
    return low


class Bench:
    """An engine whose speculation can be turned off between turns."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        config = DecodeConfig(model=str(folder), **settings)
        self.engine: Engine
        self.engine, self.loaded = build_engine(config)
        self._names = 0

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Without drafts."""
        kept, self.engine.speculation = self.engine.speculation, None
        try:
            yield
        finally:
            self.engine.speculation = kept

    def force(self, chance: float, length: int, adaptive: bool) -> None:
        """Drafts by an oracle from now on."""
        self.engine.speculation = Speculation(Oracle(chance), self.engine.memory, length, adaptive)
        self.engine.memory.on_close = self.engine.speculation.forget

    def turn(self, task: Task, prompts: Sequence[Sequence[int]]) -> Pass:
        """Generates from all prompts at once; measured from where all of them decode."""
        seqs = []
        for prompt in prompts:
            self._names += 1
            root = b"known" if task.known else str(self._names).encode()
            made = make_seq(f"seq-{self._names}", prompt, sampling=task.sampling, eos_ids=task.eos, root=root)
            seqs.append(made)
            self.engine.add(seqs[-1])
        while any(seq.output_len == 0 for seq in seqs):
            self.engine.step()
        done, before = Pass(), sum(seq.output_len for seq in seqs)
        started = time.perf_counter()
        while self.engine.has_work():
            step = self.engine.step()
            done.rows += len(step.outputs)
            for outcome in step.drafts:
                done.drafted += outcome.drafted
                done.accepted += outcome.accepted
        done.seconds = time.perf_counter() - started
        done.tokens = sum(seq.output_len for seq in seqs) - before
        done.outputs = tuple(tuple(seq.tokens[seq.prompt_len :]) for seq in seqs)
        return done


def over(bench: Bench, task: Task, batch: int) -> Pass:
    """All prompts, `batch` at a time."""
    whole = Pass()
    for first in range(0, len(task.prompts), batch):
        part = bench.turn(task, task.prompts[first : first + batch])
        whole.tokens, whole.rows = whole.tokens + part.tokens, whole.rows + part.rows
        whole.seconds += part.seconds
        whole.drafted, whole.accepted = whole.drafted + part.drafted, whole.accepted + part.accepted
        whole.outputs += part.outputs
    return whole


def compare(bench: Bench, task: Task, drafter: str, batch: int, rounds: int) -> Figure:
    """Plain and speculative turns, one after the other."""
    plain, drafted = list[Pass](), list[Pass]()
    for turn in range(rounds + 1):  # the first warms up caches and what is measured of steps
        with bench.plain():
            off = over(bench, task, batch)
        on = over(bench, task, batch)
        if turn:
            plain.append(off)
            drafted.append(on)
    rows = sum(each.rows for each in drafted)
    return Figure(
        task.name, drafter, batch,
        sum(each.tokens for each in drafted) / max(rows, 1),
        sum(each.drafted for each in drafted), sum(each.accepted for each in drafted),
        median(each.tokens / each.seconds for each in plain),
        median(each.tokens / each.seconds for each in drafted),
        all(on.outputs == off.outputs for on, off in zip(drafted, plain, strict=True)),
    )  # fmt: skip


def demo_tasks(folder: Path, eos: frozenset[int], count: int) -> list[Task]:
    """Texts to repeat, and questions that the model was not trained on, new and asked before."""
    tokenizer, copies = Tokenizer.load(str(folder)), copying(7)
    sampling = SamplingParams(temperature=0.0, max_tokens=96)

    def encode(chats: Sequence[Chat]) -> list[list[int]]:
        return [tokenizer.encode(tokenizer.render(chat.prompt())) for chat in chats]

    repeats, questions = encode([next(copies) for _ in range(count)]), encode(held_out(7, count))
    return [
        Task("copy", repeats, sampling, eos),
        Task("held-out questions", questions, sampling, eos),
        Task("the same, asked before", questions, sampling, eos, known=True),
    ]


def real(
    folder: Path, drafters: Sequence[str], batches: Sequence[int], count: int, rounds: int, **settings: Any
) -> list[Figure]:
    """Real drafters on a model that answers. Whatever is not `ngram` is a draft model or head; `:2` makes it trees."""
    figures = []
    for drafter in drafters:
        name, _, branches = drafter.partition(":")
        chosen: dict[str, Any] = {"speculative": "ngram"} if name == "ngram" else {"draft_model": resolve_drafter(name)}
        bench = Bench(folder, kv_mib=64, **chosen, draft_branches=int(branches or 1), **settings)
        for task in demo_tasks(folder, frozenset(bench.loaded.config.eos_token_ids), count):
            figures += [compare(bench, task, drafter, batch, rounds) for batch in batches]
    return figures


def forced(
    folder: Path, rates: Sequence[float], batches: Sequence[int], length: int, context: int, tokens: int, rounds: int
) -> list[Figure]:
    """Speed where acceptance is what it is said to be; at more than one sequence drafts are as long as pays."""
    room = 2 * max(batches) * (context + tokens + 64)
    bench = Bench(folder, pages=-(-room // 16), max_running=max(batches))
    vocab = bench.loaded.config.vocab_size
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, logit_bias=((FAVOURED, 100.0),))
    prompts = [[(31 * at * at + 7 * name) % (vocab - 8) + 8 for at in range(context)] for name in range(max(batches))]
    figures = []
    for batch in batches:
        for rate in rates:
            for adaptive in (False, True) if batch == 1 else (True,):
                bench.force(chance_for(rate, length), length, adaptive)
                name = f"forced {rate:g} a step, {'adaptive' if adaptive else f'always {length}'}"
                task = Task(name, prompts[:batch], sampling, frozenset(), known=True)
                figures.append(compare(bench, task, "oracle", batch, rounds))
    return figures


def show(title: str, figures: Sequence[Figure]) -> Table:
    """One row for each figure."""
    table = Table(title=title)
    for name in ("task", "drafter"):
        table.add_column(name)
    for name in ("batch", "tokens a step", "accepted of drafted", "plain, tokens/s", "tokens/s", "speed", "equal"):
        table.add_column(name, justify="right")
    for each in figures:
        table.add_row(
            each.task, each.drafter, str(each.batch), f"{each.tokens_a_step:.2f}", f"{each.accepted} of {each.drafted}",
            f"{each.plain_tokens_s:,.1f}", f"{each.tokens_s:,.1f}", f"{each.speed:.2f}x", "yes" if each.equal else "NO",
        )  # fmt: skip
    return table


def main(
    model: Annotated[str, typer.Argument(help="folder, hub id or demo, for real drafters")] = "demo",
    drafters: Annotated[
        str,
        typer.Option(help="ngram, or draft models and heads, separated by commas; demo:2 drafts trees"),
    ] = "ngram",
    shape: Annotated[str, typer.Option(help=f"random weights and forced acceptance: {', '.join(SHAPES)}")] = "",
    rates: Annotated[str, typer.Option(help="tokens a step that are forced, separated by commas")] = "2.0,3.0",
    length: Annotated[int, typer.Option(help="tokens of the longest draft", min=1, max=63)] = 4,
    batches: Annotated[str, typer.Option(help="sequences at once, separated by commas")] = "1,16",
    prompts: Annotated[int, typer.Option(help="of each task", min=1)] = 32,
    context: Annotated[int, typer.Option(help="prompt tokens where acceptance is forced", min=1)] = 128,
    tokens: Annotated[int, typer.Option(help="output tokens where acceptance is forced", min=8)] = 64,
    threads: Annotated[int, typer.Option(help="compute threads", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="turns with and without drafts", min=1)] = 3,
    dtype: Annotated[str, typer.Option(help="of real drafters: auto, float32, bfloat16")] = "auto",
    always: Annotated[bool, typer.Option(help="real drafts as long as can be, whether that pays or not")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object in place of a table")] = False,
) -> None:
    set_compute_threads(threads)
    sizes = [int(size) for size in batches.split(",")]
    if shape:
        with tempfile.TemporaryDirectory() as folder:
            made = make_checkpoint(Path(folder), SHAPES[shape])
            wanted = [float(rate) for rate in rates.split(",")]
            figures, name = forced(made, wanted, sizes, length, context, tokens, rounds), shape
    else:
        settings = {"draft_tokens": length, "draft_adaptive": not always, "dtype": dtype}
        figures = real(Path(resolve_model(model)), drafters.split(","), sizes, prompts, rounds, **settings)
        name = model
    if as_json:
        print(json.dumps({"model": name, "figures": [asdict(each) | {"speed": each.speed} for each in figures]}))
    else:
        Console().print(show(f"{name}, {threads} thread(s)", figures))


if __name__ == "__main__":
    typer.run(main)
