"""KV memory where no setting names it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tandem.config import DecodeConfig, WorkerConfig
from tandem.device import DeviceMemory
from tandem.engine import kv_size
from tandem.engine.build import build_engine
from tandem.engine.kv_size import CPU_MIB, RESERVED_SHARE, kv_mib, spare_bytes, step_bytes
from tandem.engine.model import LoadedModel, load_model
from tandem.errors import ConfigError
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")
GIB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), CheckpointSpec(layers=2, hidden=64, intermediate=96))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder, "float32", CPU)


def settings(**values: object) -> WorkerConfig:
    return WorkerConfig.model_validate({"model": "unused", **values})


def test_what_is_free_less_a_step_and_a_reserve_is_for_kv() -> None:
    assert spare_bytes(DeviceMemory(60 * GIB, 80 * GIB), 2 * GIB) == 60 * GIB - 2 * GIB - int(80 * GIB * RESERVED_SHARE)
    assert spare_bytes(DeviceMemory(11, 100), 0) == 1
    with pytest.raises(
        ConfigError, match="of 24576 MiB 3072 are free, 1024 are for a step and 2458 in reserve"
    ) as caught:
        spare_bytes(DeviceMemory(3 * GIB, 24 * GIB), GIB)
    assert caught.value.param == "kv_mib"


def test_a_step_needs_memory_by_its_tokens_and_the_rows_it_samples(loaded: LoadedModel) -> None:
    model = replace(loaded.config, vocab_size=1000, hidden_size=100, intermediate_size=500, num_heads=4, head_dim=25)
    few = settings(max_batch_tokens=1, max_running=100)
    base = step_bytes(few, model, torch.float32)
    many = settings(max_batch_tokens=1001, max_running=100)
    assert step_bytes(many, model, torch.float32) - base == 1000 * (3 * 100 + 3 * 500) * 4
    assert step_bytes(many, model, torch.bfloat16) - step_bytes(few, model, torch.bfloat16) == 1000 * 1800 * 2
    wide = replace(model, intermediate_size=50, num_kv_heads=4)
    assert step_bytes(many, wide, torch.float32) - step_bytes(few, wide, torch.float32) == 1000 * (300 + 700) * 4
    more = settings(max_batch_tokens=1, max_running=101)
    assert step_bytes(more, model, torch.float32) - base == 1000 * kv_size.LOGIT_BYTES
    assert step_bytes(few, replace(model, layers=model.layers * 3), torch.float32) == base


def test_a_setting_wins_then_the_device_decides(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def memory(device: torch.device) -> DeviceMemory:
        asked.append(device)
        return DeviceMemory(10 * GIB, 20 * GIB)

    monkeypatch.setattr(kv_size, "device_memory", memory)
    model, dtype = loaded.config, loaded.dtype
    for device in (CPU, GPU):
        assert kv_mib(settings(kv_mib=3), model, dtype, device) == 3
    assert kv_mib(settings(), model, dtype, CPU) == CPU_MIB
    assert asked == []
    found = kv_mib(settings(), model, dtype, GPU)
    assert asked == [GPU]
    assert found == (8 * GIB - step_bytes(settings(), model, dtype)) / kv_size.MIB


def test_the_engine_takes_what_there_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_size, "CPU_MIB", 1.0)
    engine, model = build_engine(DecodeConfig(model=str(folder), page_size=16))
    assert engine.capacity_tokens == (1 << 20) // (16 * model.layout.token_bytes) * 16
    monkeypatch.setattr("tandem.engine.build.kv_mib", lambda *_: pytest.fail("pages were given"))
    assert build_engine(DecodeConfig(model=str(folder), page_size=16, pages=3))[0].capacity_tokens == 48
