"""Whether lm-evaluation-harness scores a served model as it scores the same checkpoint by itself.

python -m benchmarks.lm_eval_check --lm-eval /path/to/venv/bin/lm_eval [--model FOLDER]

Writes a multiple-choice task, runs it over `local-completions` on a cluster of its own (one prefill and one decode
worker, float32) and over `hf` (float32), and compares accuracies and every log-likelihood. Needs
`pip install lm_eval[api,hf]` in an environment of its own.
"""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tandem.config import child_environment
from tandem.hub import resolve_model
from tandem.testing.cluster import cluster

TASK = "tandem_choice"
TOLERANCE = 1e-3
"""Of a log-likelihood, absolute: float32 on both sides, summed in different orders."""
WORDS = (
    *("the", "a", "router", "worker", "page", "cache", "token", "block", "prompt", "answer", "decode", "prefill"),
    *("moves", "keeps", "finds", "holds", "sends", "reads", "slowly", "never", "always", "over", "under", "beside"),
    *("Zürich", "naïve", "🙂", "東京", "3.14", "42", "x=1;", '"quoted"', "(so)", "small", "large"),
)


@dataclass(frozen=True)
class Scored:
    """One backend's results."""

    metrics: dict[str, float]
    loglikelihoods: dict[tuple[int, int], tuple[float, bool]]
    """(document, choice) -> summed log-probability, and whether greedy decoding would say it."""


def write_task(folder: Path, documents: int, seed: int) -> None:
    """The task's YAML file and its questions: prompts and choices of mixed length."""
    source = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(source.choice(WORDS) for _ in range(source.randint(least, most)))

    lines = []
    for _ in range(documents):
        choices = [words(1, 12) for _ in range(4)]
        lines.append(json.dumps({"question": words(3, 60) + ":", "choices": choices, "answer": source.randrange(4)}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
    }
    (folder / f"{TASK}.yaml").write_text(json.dumps(task))  # JSON is YAML


METRICS = ("acc", "acc_norm")


def evaluate(command: Path, folder: Path, name: str, model: str, arguments: str, batch: int) -> Scored:
    """One run of lm_eval. Raises CalledProcessError with its output on the terminal."""
    out = folder / name
    subprocess.run(
        [
            str(command), "--model", model, "--model_args", arguments, "--tasks", TASK, "--include_path", str(folder),
            "--batch_size", str(batch), "--output_path", str(out), "--log_samples", "--device", "cpu",
        ],
        check=True,
        env=child_environment({"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "data")}),
    )  # fmt: skip
    (results,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_*.jsonl")
    found = json.loads(results.read_text())["results"][TASK]
    scores: dict[tuple[int, int], tuple[float, bool]] = {}
    for line in samples.read_text().splitlines():
        sample: dict[str, Any] = json.loads(line)
        for choice, ((value, greedy),) in enumerate(sample["resps"]):
            scores[sample["doc_id"], choice] = float(value), str(greedy) == "True"
    return Scored({metric: found[f"{metric},none"] for metric in METRICS}, scores)


def differences(served: Scored, alone: Scored) -> list[str]:
    """What the two runs do not agree on."""
    found = [
        f"{name}: {served.metrics[name]} served, {alone.metrics[name]} alone"
        for name in METRICS
        if served.metrics[name] != alone.metrics[name]
    ]
    if served.loglikelihoods.keys() != alone.loglikelihoods.keys():
        found.append("the runs scored different samples")
    for key, (value, greedy) in served.loglikelihoods.items():
        other, also_greedy = alone.loglikelihoods.get(key, (value, greedy))
        if abs(value - other) > TOLERANCE or greedy != also_greedy:
            found.append(f"document {key[0]}, choice {key[1]}: {value} {greedy} served, {other} {also_greedy} alone")
    return found


def main(
    lm_eval: Annotated[Path, typer.Option(help="the lm_eval command")],
    model: Annotated[str, typer.Option(help="checkpoint folder, hub id or demo")] = "demo",
    documents: Annotated[int, typer.Option(help="questions")] = 60,
    batch: Annotated[int, typer.Option(help="prompts in one HTTP request")] = 4,
    seed: Annotated[int, typer.Option(help="of the questions")] = 0,
) -> None:
    """Compares, prints a summary and exits with 1 on any difference."""
    path, console = Path(resolve_model(model)), Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, documents, seed)
        with cluster(path, folder, worker_args=["--dtype", "float32"]) as running:
            url = f"{running.url}/v1/completions"
            arguments = f"model={path.name},base_url={url},tokenizer={path},tokenizer_backend=huggingface"
            served = evaluate(lm_eval, folder, "served", "local-completions", f"{arguments},num_concurrent=4", batch)
        alone = evaluate(lm_eval, folder, "alone", "hf", f"pretrained={path},dtype=float32", 1)
    worst = max(abs(value - alone.loglikelihoods[key][0]) for key, (value, _) in served.loglikelihoods.items())
    console.print(f"served {served.metrics}\nalone  {alone.metrics}")
    console.print(f"{len(served.loglikelihoods)} log-likelihoods, largest difference {worst:.2g}")
    if found := differences(served, alone):
        console.print("\n".join(found))
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
