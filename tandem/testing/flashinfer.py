"""A stand-in for FlashInfer 0.7: the two wrappers for paged KV, with the documented arguments and no others.

It computes what the documentation says, in float64, and refuses what the documentation excludes. It masks with minus
infinity and then multiplies, so that what is masked must be finite.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Recorded:
    """The arguments of one `plan`, and the KV tensors of the runs after it."""

    wrapper: str
    indptr: list[int]
    indices: list[int]
    last_page_len: list[int]
    query_indptr: list[int]
    window_left: int
    soft_cap: float
    scale: float
    causal: bool
    page_size: int
    heads: tuple[int, int, int]
    dtype: torch.dtype
    caches: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """Row by row; queries stand at the end of their row's KV."""
        keys, values = self.caches[-1]
        out = torch.zeros_like(query)
        group = self.heads[0] // self.heads[1]
        for row, last in enumerate(self.last_page_len):
            pages = self.indices[self.indptr[row] : self.indptr[row + 1]]
            length = (len(pages) - 1) * self.page_size + last
            k, v = (
                part[pages].flatten(0, 1)[:length].double().repeat_interleave(group, dim=1) for part in (keys, values)
            )
            first, end = self.query_indptr[row], self.query_indptr[row + 1]
            scores = torch.einsum("qhd,nhd->hqn", query[first:end].double(), k) * self.scale
            if self.soft_cap > 0:
                scores = self.soft_cap * (scores / self.soft_cap).tanh()
            at, position = torch.arange(length - (end - first), length)[:, None], torch.arange(length)
            hidden = (position > at) if self.causal else torch.zeros((end - first, length), dtype=torch.bool)
            if self.window_left >= 0:
                hidden |= position < at - self.window_left
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            out[first:end] = torch.einsum("hqn,nhd->qhd", weights, v).to(out.dtype)
        return out


class FakeFlashInfer:
    """Stands for the module. `plans` are those of all wrappers, in order."""

    def __init__(self) -> None:
        self.plans: list[Recorded] = []
        self.wrappers: list[str] = []

    def BatchDecodeWithPagedKVCacheWrapper(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", *, use_tensor_cores: bool = False
    ) -> FakeDecodeWrapper:
        """See FlashInfer."""
        check_workspace(float_workspace_buffer, kv_layout)
        self.wrappers.append("decode")
        return FakeDecodeWrapper(self.plans, use_tensor_cores)

    def BatchPrefillWithPagedKVCacheWrapper(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD"
    ) -> FakePrefillWrapper:
        """See FlashInfer."""
        check_workspace(float_workspace_buffer, kv_layout)
        self.wrappers.append("prefill")
        return FakePrefillWrapper(self.plans)


class _Wrapper:
    def __init__(self, plans: list[Recorded]) -> None:
        self._plans = plans
        self._plan: Recorded | None = None

    def run(self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """`[tokens, heads, head_dim]` against a tuple of `[pages, page_size, kv_heads, head_dim]`."""
        plan = self._plan
        assert plan is not None, "run before plan"
        heads, kv_heads, dim = plan.heads
        assert q.shape == (plan.query_indptr[-1], heads, dim) and q.dtype is plan.dtype and q.is_contiguous()
        for cache in paged_kv_cache:
            assert cache.shape[1:] == (plan.page_size, kv_heads, dim) and cache.dtype is plan.dtype
            assert cache.stride(-1) == 1
        plan.caches.append(paged_kv_cache)
        return plan.attend(q)

    def _record(self, wrapper: str, tensors: list[torch.Tensor], **values: Any) -> None:
        assert all(tensor.dtype is torch.int32 and tensor.dim() == 1 for tensor in tensors), "indices are int32"
        query_indptr, indptr, indices, last_page_len = (tensor.tolist() for tensor in tensors)
        for starts in (query_indptr, indptr):
            assert starts[0] == 0 and sorted(starts) == starts and len(starts) == len(last_page_len) + 1
        assert len(indices) == indptr[-1]
        assert all(1 <= last <= values["page_size"] for last in last_page_len)
        assert all(indptr[row] < indptr[row + 1] for row in range(len(last_page_len))), "a row without a page"
        self._plan = Recorded(wrapper, indptr, indices, last_page_len, query_indptr, **values)
        self._plans.append(self._plan)


class FakeDecodeWrapper(_Wrapper):
    """One query a row."""

    def __init__(self, plans: list[Recorded], use_tensor_cores: bool) -> None:
        super().__init__(plans)
        self.use_tensor_cores = use_tensor_cores

    def plan(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, num_qo_heads: int,
        num_kv_heads: int, head_dim: int, page_size: int, *, window_left: int = -1,
        logits_soft_cap: float | None = None, q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None, sm_scale: float | None = None,
    ) -> None:  # fmt: skip
        """See FlashInfer."""
        assert self.use_tensor_cores or num_qo_heads // num_kv_heads in (1, 2, 3, 4, 8), "Unsupported group_size"
        check_kinds(head_dim, q_data_type, kv_data_type)
        rows = torch.arange(len(indptr), dtype=torch.int32)
        self._record(
            "decode", [rows, indptr, indices, last_page_len], window_left=window_left, soft_cap=logits_soft_cap or 0.0,
            scale=sm_scale or head_dim**-0.5, causal=False, page_size=page_size,
            heads=(num_qo_heads, num_kv_heads, head_dim), dtype=q_data_type,
        )  # fmt: skip


class FakePrefillWrapper(_Wrapper):
    """Any number of queries a row, at its end."""

    def plan(
        self, qo_indptr: torch.Tensor, paged_kv_indptr: torch.Tensor, paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int,
        *, causal: bool = False, sm_scale: float | None = None, window_left: int = -1,
        logits_soft_cap: float | None = None, q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """See FlashInfer."""
        check_kinds(head_dim_qk, q_data_type, kv_data_type)
        self._record(
            "prefill", [qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len], window_left=window_left,
            soft_cap=logits_soft_cap or 0.0, scale=sm_scale or head_dim_qk**-0.5, causal=causal, page_size=page_size,
            heads=(num_qo_heads, num_kv_heads, head_dim_qk), dtype=q_data_type,
        )  # fmt: skip


def check_workspace(buffer: torch.Tensor, layout: str) -> None:
    """Its dtype, that it is zeroed, that it is aligned."""
    assert buffer.dtype is torch.uint8 and buffer.data_ptr() % 16 == 0
    assert not buffer[:: 1 << 16].any(), "the workspace must hold zeros at first"
    assert layout == "NHD"


def check_kinds(head_dim: int, query: torch.dtype, keys: torch.dtype | None) -> None:
    """What kernels exist for."""
    assert head_dim in (64, 128, 256)
    assert query in (torch.float16, torch.bfloat16) and keys in (None, query)
