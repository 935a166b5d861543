"""A checkpoint of one layer, and prefill workers with a counterpart to ask them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = CheckpointSpec(layers=1, hidden=32, heads=2, kv_heads=1, vocab=300, max_positions=2048)
    return make_checkpoint(tmp_path_factory.mktemp("models") / "small", spec)
