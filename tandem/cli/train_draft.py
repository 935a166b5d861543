"""`tandem train-draft`: from a model and prompts to a draft head, with its progress on the terminal."""

from __future__ import annotations

from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tandem.config import TrainDraftConfig, WorkerConfig
from tandem.device import set_compute_threads
from tandem.engine.build import build_engine
from tandem.errors import ConfigError
from tandem.hub import resolve_model, served_name
from tandem.text.tokenizer import Tokenizer
from tandem.training.draft import Recipe, Report, Trainer
from tandem.training.examples import continue_prompts, read_prompts
from tandem.types import SamplingParams

RECENT = 50
"""Steps that the figures on the terminal are means of."""
LINES = 10
"""Lines that a run leaves where there is no terminal."""


def train_draft(config: TrainDraftConfig) -> None:
    """Raises ConfigError and CheckpointError before anything is written."""
    assert config.prompts is not None
    folder = resolve_model(config.model)
    set_compute_threads(config.threads)
    tokenizer = Tokenizer.load(folder)
    prompts = read_prompts(config.prompts, tokenizer)
    shared = {name: getattr(config, name) for name in ("dtype", "device", "kv_mib", "threads")}
    engine, target = build_engine(WorkerConfig(model=folder, **shared))
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("continuing prompts", total=len(prompts))
        sampling = SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens, seed=config.seed)
        eos_ids = frozenset(target.config.eos_token_ids)
        examples = continue_prompts(
            engine, prompts, eos_ids, sampling, lambda done: progress.update(task, completed=done)
        )
        if not examples:
            raise ConfigError("--prompts: the model says nothing to any of these prompts", "prompts")
        recipe = Recipe(**{name: getattr(config, name) for name in _FROM_SETTINGS})
        trainer = Trainer(target, examples, recipe, served_name(config.model))
        task = progress.add_task("training", total=config.steps)
        recent: deque[Report] = deque(maxlen=RECENT)

        def report(each: Report) -> None:
            recent.append(each)
            loss = sum(one.loss for one in recent) / len(recent)
            accepted = sum(one.accepted for one in recent) / len(recent)
            text = f"loss {loss:.3f}, accepted tokens a step {accepted:.2f}"
            progress.update(task, completed=each.step, description=text)
            if each.step % max(1, config.steps // LINES) == 0:
                progress.console.print(f"step {each.step}: {text}", highlight=False)

        trainer.train(report)
    trainer.save(config.out)
    console.print(f"The head is in {config.out}; start workers with --draft-model {config.out}", highlight=False)


_FROM_SETTINGS = (
    "steps", "unroll", "batch_tokens", "learning_rate", "intermediate", "draft_vocab", "seed",
)  # fmt: skip
