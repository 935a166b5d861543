"""What must hold on a GPU before anything is measured there: `python -m tandem.testing.gpu_check [DEVICE]`.

Attention of every backend that is installed against float64, operations against torch, and a model's greedy output with
each kind of kernels and with graphs against torch's, and with steps that overlap against one at a time. Prints one line
for each check and ends with 1 when one failed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from tandem.config import WorkerConfig
from tandem.device import resolve_device
from tandem.engine.build import build_engine
from tandem.engine.kernels.choose import choose_kernels
from tandem.engine.kernels.choose_gpu import GpuKernels, installed_gpu_kernels, load_gpu_kernels
from tandem.engine.kernels.ops import TorchOps
from tandem.engine.model import load_model
from tandem.testing.attention import AttentionCase, attend
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.engine import make_seq
from tandem.testing.runner_loop import RunnerLoop
from tandem.types import SamplingParams

CASES = (
    AttentionCase(((700, 1), (31, 1), (0, 40), (90, 5)), group=7, dim=64),
    AttentionCase(((513, 1), (0, 1), (300, 70)), group=4, dim=128, window=100, softcap=30.0),
    AttentionCase(((260, 1), (0, 19)), kv_heads=1, group=1, dim=256, page_size=1),
)
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 3e-3}
Found = tuple[str, float, float]
"""What was checked, the largest error, and what is allowed."""


def attention(name: GpuKernels, device: torch.device) -> Iterator[Found]:
    """Each case in each dtype that the backend serves."""
    _, make = load_gpu_kernels(name, device)
    for dtype in ("bfloat16", "float16") if name == "flashinfer" else TOLERANCE:
        for case in CASES:
            made = attend(replace(case, dtype=dtype), make, others_finite=name == "flashinfer", device=device)
            error = float((made.found.double() - made.expected).abs().max())
            yield f"{name} attention, {dtype}, {case.dim}", error, TOLERANCE[dtype]


def operations(name: GpuKernels, device: torch.device) -> Iterator[Found]:
    """Norm and gate in each dtype."""
    ops, exact = load_gpu_kernels(name, device)[0], TorchOps()
    for dtype, tolerance in TOLERANCE.items():
        x, weight = torch.randn(33, 600).to(getattr(torch, dtype)), torch.randn(600).to(getattr(torch, dtype))
        normed = ops.rms_norm(x.to(device), weight.to(device), 1e-5).cpu().double()
        expected = exact.rms_norm(x.double(), weight.double(), 1e-5)
        yield f"{name} norm, {dtype}", float(((normed - expected) / (1 + expected.abs())).abs().max()), tolerance
        gated, expected = ops.gated("silu", x.to(device)).cpu().double(), exact.gated("silu", x.double())
        yield f"{name} gate, {dtype}", float(((gated - expected) / (1 + expected.abs())).abs().max()), tolerance


def models(folder: Path, device: torch.device, graphs: bool) -> Iterator[Found]:
    """How many of a model's greedy tokens differ from torch's, in float32."""
    kinds = [choose_kernels("torch", device), choose_kernels("triton", device)]
    kinds += [choose_kernels("triton", device, graph_rows=4)] if graphs else []
    outputs = []
    for kernels in kinds:
        loop = RunnerLoop(load_model(folder, "float32", device, kernels))
        prompts = [[(7 * i * i + seed) % 280 for i in range(20 + 90 * seed)] for seed in range(3)]
        seqs = [loop.add(prompt, SamplingParams(temperature=0.0, max_tokens=12)) for prompt in prompts]
        loop.step(seqs[:2], 64)
        outputs.append([token for output in loop.finish(seqs, chunk=64) for token in output])
        wrong = sum(one != other for one, other in zip(outputs[0], outputs[-1], strict=True))
        yield f"{kernels.name} model, graphs of {kernels.graph_rows} rows", wrong, 0


def overlap(folder: Path, device: torch.device) -> Iterator[Found]:
    """How many tokens of whole engines differ where steps overlap, greedy and sampled ones."""
    kinds = ["torch", *(name for name in installed_gpu_kernels() if name == "triton")]
    for kernels in kinds:
        outputs = []
        for way in ("off", "on"):
            config = {"kernels": kernels, "overlap": way, "dtype": "float32", "pages": 64, "device": str(device)}
            engine, _ = build_engine(WorkerConfig.model_validate({"model": str(folder), **config}))
            for number in range(4):
                prompt = [(7 * i * i + number) % 280 for i in range(12 + 9 * number)]
                sampling = SamplingParams(temperature=number % 2, top_p=0.9, seed=number, max_tokens=8 + number)
                engine.add(make_seq(f"s{number}", prompt, sampling=sampling))
            seqs = list(engine.seqs.values())
            while engine.has_work():
                engine.step()
                engine.check_integrity()
            outputs.append([token for seq in seqs for token in seq.tokens])
        wrong = sum(one != other for one, other in zip(*outputs, strict=True))
        yield f"{kernels} engine, steps that overlap", wrong, 0


def check(device: torch.device) -> Iterator[Found]:
    """Everything."""
    for name in installed_gpu_kernels():
        if device.type == "cuda" or name == "triton":
            yield from attention(name, device)
            yield from operations(name, device)
    with tempfile.TemporaryDirectory() as folder:
        spec = CheckpointSpec(layers=2, vocab=280)
        model = make_checkpoint(Path(folder), spec)
        yield from models(model, device, device.type == "cuda")
        yield from overlap(model, device)


def main() -> int:
    """The exit code."""
    failed = 0
    for what, error, allowed in check(resolve_device(sys.argv[1] if len(sys.argv) > 1 else "cuda")):
        failed += not error <= allowed
        sys.stdout.write(f"{'ok    ' if error <= allowed else 'FAILED'} {what}: {error:.2g}, at most {allowed:g}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
