"""GPU kernels are chosen by name only, say that they are unmeasured, and compute what torch computes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tandem.engine.attention.torch_paged import TorchPagedAttention
from tandem.engine.kernels import choose_gpu
from tandem.engine.kernels.choose import choose_kernels
from tandem.engine.kernels.choose_gpu import UNMEASURED, installed_gpu_kernels
from tandem.engine.kernels.ops import TorchOps
from tandem.engine.kv_pool import KvPool
from tandem.engine.model import load_model
from tandem.errors import ConfigError
from tandem.kv import KvLayout, LayerGroup, Plane
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.flashinfer import FakeFlashInfer
from tandem.testing.runner_loop import RunnerLoop
from tandem.types import SamplingParams

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PLANES = (Plane("k", 1, 64, "float16"), Plane("v", 1, 64, "float16"))
POOL = KvPool(KvLayout(PLANES, (LayerGroup((0,)),)), 2, 4, CPU)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_a_gpu_gets_torch_unless_others_are_asked_for() -> None:
    kernels = choose_kernels("auto", GPU)
    assert kernels.name == "torch"
    assert "triton, flashinfer" in kernels.detail
    assert UNMEASURED in kernels.detail
    assert isinstance(kernels.ops, TorchOps)
    assert isinstance(kernels.attention(POOL), TorchPagedAttention)


@needs_triton
def test_flashinfer_attends_and_triton_does_the_rest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tandem.engine.attention.flashinfer import FlashInferAttention
    from tandem.engine.kernels.triton_ops import TritonOps

    monkeypatch.setattr(choose_gpu, "installed_gpu_kernels", lambda: ["triton", "flashinfer"])
    monkeypatch.setitem(sys.modules, "flashinfer", FakeFlashInfer())
    kernels = choose_kernels("flashinfer", GPU)
    assert (kernels.name, kernels.detail) == ("flashinfer", UNMEASURED)
    assert isinstance(kernels.ops, TritonOps)
    assert isinstance(kernels.attention(POOL), FlashInferAttention)
    assert [record.message for record in caplog.records] == [f"kernels flashinfer: {UNMEASURED}"]


def test_what_is_not_there_or_for_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "flashinfer" else object())
    assert installed_gpu_kernels() == ["triton"]
    with pytest.raises(ConfigError, match="kernels is flashinfer; flashinfer is not installed"):
        choose_kernels("flashinfer", GPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else object())
    assert installed_gpu_kernels() == []
    with pytest.raises(ConfigError, match="kernels is triton; triton is not installed"):
        choose_kernels("triton", GPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    compiling = SimpleNamespace(knobs=SimpleNamespace(runtime=SimpleNamespace(interpret=False)))
    monkeypatch.setitem(sys.modules, "triton", compiling)
    for name in choose_gpu.GPU_KERNELS:
        with pytest.raises(ConfigError, match=f"kernels is {name}; they are for GPUs, and the device is cpu"):
            choose_kernels(name, CPU)


@needs_triton
def test_a_model_says_the_same_with_triton_as_with_torch(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, CheckpointSpec(layers=2, vocab=280))
    prompts = [[(7 * i * i + seed) % 280 for i in range(20 + 9 * seed)] for seed in range(3)]
    outputs, logits = [], []
    for kernels in (choose_kernels("torch", CPU), choose_kernels("triton", CPU)):
        loaded = load_model(folder, "float32", CPU, kernels)
        loop = RunnerLoop(loaded, page_size=4)
        seqs = [loop.add(prompt, SamplingParams(temperature=0.0, max_tokens=4)) for prompt in prompts]
        loop.step(seqs[:1], 100)
        outputs.append(loop.finish(seqs, chunk=11))
        logits.append(loop.logits(prompts[2]))
    assert loaded.kernels.name == "triton"
    assert outputs[0] == outputs[1]
    assert len({tuple(output) for output in outputs[0]}) == 3
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
