"""Triton's attention kernels, in Triton's interpreter, against attention written out; and compiled, for two GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tandem.config import child_environment
from tandem.engine.attention.base import AttentionBackend
from tandem.engine.kv_pool import KvPool
from tandem.testing.attention import AttentionCase, attend

triton_paged = pytest.importorskip("tandem.engine.attention.triton_paged", reason="triton is not installed")
# Where an exponential overflows, its reciprocal is the 0 that is meant; numpy warns of it, a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}


def make(pool: KvPool) -> AttentionBackend:
    return triton_paged.TritonPagedAttention(pool, part_tokens=32)  # type: ignore[no-any-return]


def check(case: AttentionCase) -> None:
    result = attend(case, make)
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(result.found.double(), result.expected, atol=tolerance, rtol=tolerance)


# The interpreter takes half a second for each: shrinking a failure would outlast the test's time.
@settings(max_examples=25, phases=[Phase.generate])
@given(
    st.builds(
        AttentionCase,
        rows=st.lists(st.tuples(st.integers(0, 80), st.sampled_from((1, 1, 1, 2, 5, 40))), min_size=1, max_size=4).map(
            tuple
        ),
        kv_heads=st.sampled_from((1, 2)),
        group=st.sampled_from((1, 2, 3, 7)),
        dim=st.sampled_from((8, 16, 24)),
        page_size=st.sampled_from((1, 4, 16, 64)),
        dtype=st.sampled_from(("float32", "bfloat16", "float16")),
        window=st.sampled_from((None, None, 1, 7, 33)),
        softcap=st.sampled_from((None, None, 2.0, 30.0)),
    )
)
def test_any_batch_is_attended_as_it_is_written_out(case: AttentionCase) -> None:
    check(case)


@pytest.mark.parametrize("dim", [33, 64, 80, 128, 256])
def test_every_head_size(dim: int) -> None:
    check(AttentionCase(((40, 1), (0, 9), (33, 3)), dim=dim))


@pytest.mark.parametrize("window", [None, 40])
def test_a_long_context_is_computed_in_parts_and_joined(window: int | None) -> None:
    check(AttentionCase(((300, 1), (31, 1), (0, 1), (97, 1)), window=window))


def test_compiled_kernels_fit_the_shared_memory_of_every_gpu(tmp_path: Path) -> None:
    """As compute capability 8.6 has it, the least of those with bfloat16: 99 KiB."""
    environment = child_environment({"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)})
    command = [sys.executable, "-m", "tandem.testing.triton_compile"]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 15
    assert max(found.values()) <= 99 * 1024, found
