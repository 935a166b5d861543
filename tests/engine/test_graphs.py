"""Decode steps replayed on memory that does not move: padding, sizes, long contexts, and what cannot be captured."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tandem.engine.attention.base import AttentionBatch, AttentionForm
from tandem.engine.inputs import InputTokens
from tandem.engine.kernels.choose import choose_kernels
from tandem.engine.kv_pool import KvPool
from tandem.engine.model import LoadedModel, load_model
from tandem.errors import ConfigError
from tandem.kv import KvLayout, LayerGroup, Plane
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.graphs import FakeCapture
from tandem.testing.runner_loop import RunnerLoop
from tandem.types import SamplingParams

graphs = pytest.importorskip("tandem.engine.graphs", reason="triton is not installed")
from tandem.engine.attention.triton_fixed import DoesNotFit, FixedDecodePlan  # noqa: E402
from tandem.engine.attention.triton_paged import TritonPagedAttention  # noqa: E402

CPU = torch.device("cpu")
PROMPTS = [[(5 * i * i + 7 * seed) % 280 for i in range(12 + 20 * seed)] for seed in range(3)]


def pool_of(window: int | None = None) -> KvPool:
    planes = (Plane("k", 1, 8, "float32"), Plane("v", 1, 8, "float32"))
    pool = KvPool(KvLayout(planes, (LayerGroup((0,)), LayerGroup((1,), window))), (40, 41), 4, CPU)
    for layer in (0, 1):
        for plane in ("k", "v"):
            pool.plane(plane, layer).normal_(generator=torch.Generator().manual_seed(layer))
    return pool


def decode_batch(lengths: list[int], shift: int = 0) -> AttentionBatch:
    """Rows of one new token, the pages of each behind those of the one before."""
    pages, first = [], shift
    for length in lengths:
        pages.append(np.arange(first, first + length // 4 + 1))
        first += length // 4 + 1
    return AttentionBatch(np.array(lengths), np.ones(len(lengths), dtype=np.int64), [pages, pages])


@pytest.mark.parametrize("lengths", [[9], [40, 3, 0], [33, 70, 1, 2]])
def test_a_fixed_plan_gives_what_the_batchs_own_does_and_padding_writes_nothing(lengths: list[int]) -> None:
    own, padded = pool_of(9), pool_of(9)
    rows = 4
    tensors = torch.randn(3, rows, 2, 8, generator=torch.Generator().manual_seed(3))
    query, key, value = tensors[0], tensors[1, :, :1], tensors[2, :, :1]
    backend = TritonPagedAttention(padded, part_tokens=16)
    fixed = FixedDecodePlan(backend, rows)
    for batch in (decode_batch(lengths), decode_batch([5], shift=3), decode_batch(lengths, shift=1)):
        count = len(batch.starts)
        plan = TritonPagedAttention(own, part_tokens=16).plan(batch)
        parts = fixed.load(backend.plan(batch), rows)
        assert all(each >= rows and each & (each - 1) == 0 for each in parts)
        for layer, form in ((0, AttentionForm(0.3)), (1, AttentionForm(0.3, 9))):
            expected = plan.run(layer, query[:count], key[:count], value[:count], form)
            found = fixed.run(layer, query, key, value, form)
            assert torch.equal(found[:count], expected)
            assert not found[count:].any()
            for name in ("k", "v"):
                assert torch.equal(own.plane(name, layer), padded.plane(name, layer))


def test_what_does_not_fit_is_said() -> None:
    backend = TritonPagedAttention(pool_of(), part_tokens=1)
    fixed = FixedDecodePlan(backend, 1)
    with pytest.raises(DoesNotFit, match="71 parts"):
        fixed.load(backend.plan(decode_batch([70])), 1)


def test_sizes_reach_the_largest_batch() -> None:
    assert graphs.captured_rows(1) == (1,)
    assert graphs.captured_rows(5) == (1, 2, 4, 5)
    assert graphs.captured_rows(64)[-1] == 64
    assert graphs.captured_rows(300)[-2:] == (256, 300)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    spec = CheckpointSpec(layers=1, vocab=280, hidden=32, heads=2, kv_heads=1, intermediate=32)
    return load_model(make_checkpoint(tmp_path_factory.mktemp("model"), spec), "float32", CPU)


def outputs(loaded: LoadedModel, capture: FakeCapture | None, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of three sequences that start one after another, so that batches grow and mix chunks with decoding rows."""
    kernels = choose_kernels("triton", CPU)
    if capture is not None:
        monkeypatch.setattr("tandem.engine.kernels.choose_gpu.CudaCapture", lambda device: capture)
        kernels = replace(kernels, graph_rows=2)
    loop = RunnerLoop(replace(loaded, kernels=kernels), page_size=4)
    seqs = [loop.add(prompt, SamplingParams(temperature=0.0, max_tokens=8)) for prompt in PROMPTS]
    for last in (1, 1, 2, 2, 2, 3):
        loop.step(seqs[:last], 100)
    return loop.finish(seqs)


def test_replayed_steps_say_the_same(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, capture = outputs(loaded, None, monkeypatch), FakeCapture()
    with caplog.at_level(logging.INFO, logger="tandem.engine.graphs"):
        assert outputs(loaded, capture, monkeypatch) == expected
    assert len({tuple(output) for output in expected}) == 3
    assert capture.captured == 2
    # One row, two rows twice; none for three; then two rows twice and one three times, as the sequences end.
    assert capture.launched == 8
    texts = [record.message.partition(" s;") for record in caplog.records if record.levelno == logging.INFO]
    assert [text[0].rpartition(",")[0] for text in texts] == [
        "CUDA graph 1: 2 rows, 2 parts of context",
        "CUDA graph 2: 1 rows, 1 parts of context",
    ]
    assert texts[-1][2] == " all hold 2.0 MiB"


def test_what_cannot_be_captured_is_computed_as_ever(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    capture = FakeCapture(fails_at=1)
    assert outputs(loaded, capture, monkeypatch) == outputs(loaded, None, monkeypatch)
    assert (capture.captured, capture.launched) == (1, 0)
    assert "decode steps are not captured: a graph of 1 rows failed: operation not permitted" in caplog.text


@torch.inference_mode()
def test_longer_contexts_get_graphs_of_their_own_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    capture, backend = FakeCapture(), TritonPagedAttention(pool_of(), part_tokens=16)
    replay = graphs.GraphReplay(lambda tokens, positions, plan, taps: tokens[:, None].float(), backend, capture, 1)
    for length in (3, 40, 44, 100, 3):  # 1, 3, 3, 7 and 1 parts
        plan = backend.plan(decode_batch([length]))
        found = replay.run(InputTokens([length]), np.array([length]), plan)
        assert found is not None
        assert found.logits.tolist() == [[length]]
    assert capture.captured == 3
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    assert replay.run(InputTokens([20]), np.array([20]), backend.plan(decode_batch([20]))) is None
    assert replay.run(InputTokens([1, 2]), np.array([1, 2]), backend.plan(decode_batch([1, 2]))) is None


def test_graphs_need_triton_on_a_gpu(tmp_path: Path) -> None:
    for kernels, device in (("triton", CPU), ("auto", torch.device("cuda")), ("flashinfer", torch.device("cuda"))):
        with pytest.raises(ConfigError, match=f"cuda_graphs needs kernels triton on a GPU; got {kernels} on {device}"):
            choose_kernels(kernels, device, graph_rows=4)  # type: ignore[arg-type]
