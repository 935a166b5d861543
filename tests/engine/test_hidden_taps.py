"""Hidden states inside the target, as a draft head reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem.engine.attention.base import AttentionBatch
from tandem.engine.attention.torch_paged import TorchPagedAttention
from tandem.engine.kv_pool import KvPool
from tandem.engine.model import LoadedModel, load_model
from tandem.engine.taps import HiddenTaps
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint

CPU = torch.device("cpu")
TOKENS = [(7 * i * i + 3) % 280 for i in range(40)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), CheckpointSpec(layers=3, vocab=280, max_positions=512))


def forward(loaded: LoadedModel, keep: torch.Tensor | None, taps: HiddenTaps | None) -> torch.Tensor:
    attention = TorchPagedAttention(KvPool(loaded.layout, 4, 16, CPU))
    batch = AttentionBatch(np.array([0]), np.array([len(TOKENS)]), [[np.arange(3)]])
    with torch.inference_mode():
        tokens, positions = torch.tensor(TOKENS), torch.arange(len(TOKENS))
        return loaded.module.forward(tokens, positions, attention.plan(batch), keep, taps)


def test_taps_are_the_residual_streams_of_transformers(path: Path) -> None:
    loaded = load_model(path, "float32", CPU)
    taps = HiddenTaps((2, 0))
    last = forward(loaded, None, taps)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        states = model(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(taps.states[0], states[1][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.model.norm(taps.states[2]), states[3][0], atol=1e-4, rtol=1e-4)
    assert set(taps.states) == {0, 2}
    assert torch.equal(taps.joined(), torch.cat((last, taps.states[0]), dim=-1))


@pytest.mark.parametrize("layers", [(), (1,), (0, 2)])
def test_taps_change_nothing_and_see_all_tokens(layers: tuple[int, ...], path: Path) -> None:
    loaded = load_model(path, "float32", CPU)
    keep = torch.tensor([3, 39])
    taps = HiddenTaps(layers)
    kept = forward(loaded, keep, taps)
    torch.testing.assert_close(kept, forward(loaded, keep, None), atol=1e-5, rtol=1e-5)
    assert {len(state) for state in taps.states.values()} <= {len(TOKENS)}
    assert len(taps.states) == len(layers)
