"""On a GPU: everything that is elsewhere checked without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tandem.config import child_environment
from tandem.device import accelerators


@pytest.mark.gpu
@pytest.mark.skipif(not accelerators(), reason="no CUDA device")
@pytest.mark.timeout(600)
def test_everything_holds_on_a_gpu() -> None:
    environment = child_environment({"TRITON_INTERPRET": "0"})  # these tests' own process interprets
    command = [sys.executable, "-m", "tandem.testing.gpu_check"]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
