"""One attention backend against attention written out in float64, over a pool where everything else is not a number."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tandem.engine.attention.base import AttentionBackend, AttentionBatch, AttentionForm, IntArray
from tandem.engine.kv_pool import KvPool
from tandem.kv import KvLayout, LayerGroup, Plane

CPU = torch.device("cpu")
NOWHERE = 1 << 40
"""The number of a page that is not there: whoever reads it fails."""
MakeBackend = Callable[[KvPool], AttentionBackend]


@dataclass(frozen=True)
class AttentionCase:
    """Rows are (start, count); keys and values before `start` were stored earlier."""

    rows: tuple[tuple[int, int], ...]
    kv_heads: int = 2
    group: int = 2
    dim: int = 16
    page_size: int = 16
    dtype: str = "float32"
    window: int | None = None
    softcap: float | None = None

    @property
    def form(self) -> AttentionForm:
        """Layer 1's."""
        return AttentionForm(0.7 * self.dim**-0.5, self.window, self.softcap)

    @property
    def lengths(self) -> list[int]:
        """Of each row, new tokens included."""
        return [start + count for start, count in self.rows]


@dataclass(frozen=True)
class Attended:
    """What a backend made of a case, and what is right; `[tokens, heads, dim]`, the latter in float64."""

    found: torch.Tensor
    expected: torch.Tensor


def attend(
    case: AttentionCase, make: MakeBackend, *, others_finite: bool = False, device: torch.device = CPU
) -> Attended:
    """Runs layer 1 of a fresh pool. Raises AssertionError when anything but the new tokens' slots was written.

    others_finite: slots that nothing was stored in hold a large number, not a NaN (for backends that multiply by 0).
    """
    size, heads = case.page_size, case.kv_heads * case.group
    planes = tuple(Plane(name, case.kv_heads, case.dim, case.dtype) for name in ("k", "v"))
    total = sum(-(-length // size) for length in case.lengths) + 3
    layout = KvLayout(planes, (LayerGroup((1,), case.window), LayerGroup((0,))))
    pool = KvPool(layout, (total, total + 1), size, device)
    free = random.Random(len(case.rows)).sample(range(total), total)
    pages = [np.array([free.pop() for _ in range(-(-length // size))]) for length in case.lengths]
    generator = torch.Generator().manual_seed(sum(case.lengths))
    dtype = pool.plane("k", 1).dtype
    tokens = sum(count for _, count in case.rows)
    # Queries, keys and values as a model has them: slices of one product, the last dimension dense, nothing aligned.
    merged = torch.randn((tokens, heads + 2 * case.kv_heads, case.dim + 1), generator=generator).to(device, dtype)
    query, key, value = merged[..., 1:].split((heads, case.kv_heads, case.kv_heads), dim=1)
    stored = {}
    for name, new in (("k", key), ("v", value)):
        tensor = pool.plane(name, 1).fill_(1e4 if others_finite else torch.nan)
        stored[name] = _store_context(case, tensor, pages, new, generator)
    before = {name: pool.plane(name, 1).clone() for name in ("k", "v")}
    starts, counts = np.array([start for start, _ in case.rows]), np.array([count for _, count in case.rows])
    plan = make(pool).plan(AttentionBatch(starts, counts, [_shown(case, pages), pages]))
    found = plan.run(1, query, key, value, case.form)
    for name in ("k", "v"):
        for row, (start, count) in enumerate(case.rows):
            before[name][_slots(pages[row], size, start, start + count)] = stored[name][row][start:].to(device)
        assert torch.equal(pool.plane(name, 1).nan_to_num(), before[name].nan_to_num()), f"{name} is stored wrongly"
        assert not pool.plane(name, 0).any(), "another layer was written"
    offsets = np.cumsum(counts) - counts
    expected = [
        written_out(query[first : first + count].cpu(), stored["k"][row], stored["v"][row], start, case.form)
        for row, (first, (start, count)) in enumerate(zip(offsets.tolist(), case.rows, strict=True))
    ]
    return Attended(found.cpu(), torch.cat(expected))


def written_out(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, form: AttentionForm
) -> torch.Tensor:
    """`[new, heads, dim]` queries of positions `start..` over `[length, kv_heads, dim]`, in float64."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (part.double().repeat_interleave(group, dim=1).transpose(0, 1) for part in (keys, values))
    scores = query.double().transpose(0, 1) @ keys.transpose(1, 2) * form.scale
    if form.softcap is not None:
        scores = form.softcap * (scores / form.softcap).tanh()
    at, to = torch.arange(start, start + len(query))[:, None], torch.arange(keys.shape[1])
    hidden = to > at
    if form.window is not None:
        hidden |= to <= at - form.window
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)


def _store_context(
    case: AttentionCase, tensor: torch.Tensor, pages: list[IntArray], new: torch.Tensor, generator: torch.Generator
) -> list[torch.Tensor]:
    """Stores what a row's window reaches of its earlier positions; gives each row's values at all its positions."""
    rows, first = [], 0
    for row, (start, count) in enumerate(case.rows):
        early = torch.randn((start, *new.shape[1:]), generator=generator).to(new.dtype)
        low = 0 if case.window is None else max(0, start - case.window + 1)
        tensor[_slots(pages[row], case.page_size, low, start)] = early[low:].to(tensor.device)
        rows.append(torch.cat((early, new[first : first + count].cpu())))
        first += count
    return rows


def _shown(case: AttentionCase, pages: list[IntArray]) -> list[IntArray]:
    """The pages, of which those wholly outside the window are nonsense."""
    shown = [numbers.copy() for numbers in pages]
    for row, (start, _) in enumerate(case.rows):
        if case.window is not None:
            shown[row][: max(0, start - case.window + 1) // case.page_size] = NOWHERE
    return shown


def _slots(pages: IntArray, size: int, first: int, end: int) -> torch.Tensor:
    positions = np.arange(first, end)
    return torch.from_numpy(pages[positions // size] * size + positions % size)
