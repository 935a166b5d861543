"""The memory that holds KV pages, and its only way in and out: canonical spans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from tandem.engine.radix import Pages
from tandem.kv import KvLayout, LayerGroup, Plane, Span

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Memory = dict[tuple[str, int], torch.Tensor]
"""By plane and layer group: `[layers of group, slots, heads, head_dim]`."""
Buffer = memoryview | bytearray | np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class KvPool:
    """KV of all pages: one tensor `[layers of group, slots, heads, head_dim]` per plane and layer group.

    Each group has pages of its own, with its own numbers. Who may use which page is not known here (see `pages.py`).
    Used by the engine thread only. The memory is never registered for remote writes: peers write into landing slabs,
    and `scatter` copies from there.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_pages: int | Sequence[int],
        page_size: int,
        device: torch.device,
        memory: Memory | None = None,
    ) -> None:
        """num_pages: of each group, or one number for all. memory: of these very shapes; by default it is taken."""
        counts = [num_pages] * len(layout.groups) if isinstance(num_pages, int) else num_pages
        if min(counts) < 1 or page_size < 1:
            raise ValueError(f"a pool of {min(counts)} pages of {page_size} tokens; at least 1 of 1 is needed")
        self.layout = layout
        self.group_pages = tuple(counts)
        self.num_pages = min(counts)
        """Pages that every group has: a smaller number is a page in each."""
        self.page_size = page_size
        self.device = device
        self._memory = memory or {
            (plane.name, number): self._new(plane, group, counts[number] * page_size)
            for number, group in enumerate(layout.groups)
            for plane in layout.planes_of(group)
        }
        self._layers = {
            (name, layer): tensor[row]
            for (name, number), tensor in self._memory.items()
            for row, layer in enumerate(layout.groups[number].layers)
        }

    def part(self, layout: KvLayout, first: int, prefix: str = "") -> KvPool:
        """The groups of `layout`, which are those from the `first` on, as a pool of its own over the same memory.

        prefix: what the names of their planes have here and not there.
        """
        counts = self.group_pages[first : first + len(layout.groups)]
        memory = {
            (plane.name, number): self._memory[prefix + plane.name, first + number]
            for number, group in enumerate(layout.groups)
            for plane in layout.planes_of(group)
        }
        return KvPool(layout, counts, self.page_size, self.device, memory)

    def _new(self, plane: Plane, group: LayerGroup, slots: int) -> torch.Tensor:
        # Zeros, not empty: a masked position's weight is 0, and 0 times a NaN left in memory would be NaN.
        shape = (len(group.layers), slots, plane.heads, plane.head_dim)
        return torch.zeros(shape, dtype=TORCH_DTYPES[plane.dtype], device=self.device)

    def plane(self, name: str, layer: int) -> torch.Tensor:
        """One layer of one plane, `[slots, heads, head_dim]`: the pool's own memory, not a copy."""
        return self._layers[name, layer]

    def gather(self, pages: Pages, span: Span, total: int, out: Buffer) -> None:
        """Copies what moves of a span, in a hand-over of tokens `[0, total)` of the owner of `pages`, into `out`.

        `out` receives `layout.span_bytes(span, total)` bytes in the order `[plane][layer][token][head][dim]`.
        Raises ValueError on another length, or when `pages` do not cover the span.
        """
        for target, layers, memory, slots in self._parts(out, pages, span, total):
            if self.device.type == "cpu" and isinstance(layers, slice):
                torch.index_select(memory, 1, slots, out=target)  # straight into the staging: one pass over memory
            else:
                target[layers] = memory.index_select(1, slots).cpu()

    def scatter(self, pages: Pages, span: Span, total: int, data: Buffer) -> None:
        """The inverse of `gather`: copies canonical bytes into the sequence's own pages. Raises the same errors."""
        for source, layers, memory, slots in self._parts(data, pages, span, total):
            if self.device.type == "cpu":
                rows, data = memory.numpy(), source.numpy()  # torch's own copies of short runs are slower
                for first, slot, count in _runs(slots.numpy()):
                    rows[:, slot : slot + count] = data[layers, first : first + count]
            else:
                memory.index_copy_(1, slots, source[layers].to(self.device))

    def move_tokens(self, pages: Pages, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies the KV of positions to others of the same sequence, in all groups; the two may overlap."""
        before, after = np.array(sources), np.array(targets)
        for number, group in enumerate(self.layout.groups):
            run = np.asarray(pages[number], dtype=np.int64)
            source, target = (
                torch.from_numpy(run[where // self.page_size] * self.page_size + where % self.page_size).to(self.device)
                for where in (before, after)
            )
            for plane in self.layout.planes_of(group):
                memory = self._memory[plane.name, number]
                memory.index_copy_(1, target, memory.index_select(1, source))

    def digest(self, group: int, page: int) -> int:
        """xxh3 over all planes and layers of a group's page: fast, and for finding faults, not forgeries."""
        state, start = xxhash.xxh3_64(), page * self.page_size
        for plane in self.layout.planes_of(self.layout.groups[group]):
            part = self._memory[plane.name, group][:, start : start + self.page_size]
            data: Any = part.contiguous().view(torch.uint8).cpu().numpy()
            state.update(data)
        return state.intdigest()

    def copy_tokens(self, group: int, source_page: int, target_page: int, count: int) -> None:
        """Copies the first `count` tokens of a group's page to the start of another, in all its planes and layers."""
        if not 0 <= count <= self.page_size:
            raise ValueError(f"cannot copy {count} tokens of a page of {self.page_size}")
        source, target = source_page * self.page_size, target_page * self.page_size
        for plane in self.layout.planes_of(self.layout.groups[group]):
            tensor = self._memory[plane.name, group]
            tensor[:, target : target + count] = tensor[:, source : source + count]

    def _parts(
        self, buffer: Buffer, pages: Pages, span: Span, total: int
    ) -> Iterator[tuple[torch.Tensor, slice | list[int], torch.Tensor, torch.Tensor]]:
        """The buffer in parts `[layer, token, byte]` of layers with equally many tokens, for one group each.

        With each: which of its layers are the group's, their bytes in the pool `[layer, slot, byte]`, and the slots.
        """
        flat, shares, owners = (
            self._flat(buffer, span, total),
            self.layout.shares(span, total),
            self.layout.layer_groups,
        )
        slots = [self._slots(run, share) for run, share in zip(pages, shares, strict=True)]
        offset = 0
        for plane in self.layout.planes:
            having = {number for name, number in self._memory if name == plane.name and shares[number].count}
            moved = [layer for layer, group in enumerate(owners) if group in having]
            # Layers whose tokens differ in number lie one by one; else all form one block, and a group takes its rows.
            even = len({shares[group].count for group in having}) == 1
            for layers in [moved] if even else [[layer] for layer in moved]:
                count = shares[owners[layers[0]]].count
                size = len(layers) * count * plane.token_bytes
                block = flat[offset : offset + size].view(len(layers), count, plane.token_bytes)
                offset += size
                for number in sorted({owners[layer] for layer in layers}):
                    rows = [place for place, layer in enumerate(layers) if owners[layer] == number]
                    memory = self._memory[plane.name, number].view(torch.uint8).flatten(2)
                    if len(rows) < len(memory):
                        row = self.layout.groups[number].layers.index(layers[0])
                        memory = memory[row : row + 1]
                    yield block, slice(None) if len(rows) == len(layers) else rows, memory, slots[number]

    def _flat(self, buffer: Buffer, span: Span, total: int) -> torch.Tensor:
        array = np.frombuffer(buffer, dtype=np.uint8)
        expected = self.layout.span_bytes(span, total)
        if array.size != expected:
            raise ValueError(f"a span of {span.count} tokens has {expected} bytes, but the buffer has {array.size}")
        # Torch has no read-only tensors and warns about such buffers; a received one is copied instead.
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def _slots(self, pages: Sequence[int], span: Span) -> torch.Tensor:
        if span.start < 0 or span.count < 0 or span.end > len(pages) * self.page_size:
            covered = len(pages) * self.page_size
            raise ValueError(f"tokens {span.start}..{span.end} are not within the {covered} that the pages hold")
        positions = np.arange(span.start, span.end)
        numbers = np.asarray(pages, dtype=np.int64)
        slots = numbers[positions // self.page_size] * self.page_size + positions % self.page_size
        if (slots < 0).any():
            raise ValueError(f"tokens {span.start}..{span.end} lie in part before the pages that a window has left")
        return torch.from_numpy(slots).to(self.device)


def _runs(slots: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """(index, slot, count) of slots that follow one another: pages side by side are copied at once."""
    cuts = np.flatnonzero(np.diff(slots) != 1) + 1
    bounds = [0, *cuts.tolist(), len(slots)]
    for first, end in pairwise(bounds):
        if end > first:
            yield first, int(slots[first]), end - first
