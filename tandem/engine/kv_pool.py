"""The memory that holds KV pages, and its only way in and out: canonical spans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from tandem.kv import KvLayout, LayerGroup, Plane, Span

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Buffer = memoryview | bytearray | np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class KvPool:
    """KV of all pages: one tensor `[layers of group, slots, heads, head_dim]` per plane and layer group.

    Who may use which page is not known here (see `pages.py`). Used by the engine thread only. The memory is never
    registered for remote writes: peers write into landing slabs, and `scatter` copies from there.
    """

    def __init__(self, layout: KvLayout, num_pages: int, page_size: int, device: torch.device) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a pool of {num_pages} pages of {page_size} tokens; at least 1 of 1 is needed")
        self.layout = layout
        self.num_pages = num_pages
        self.page_size = page_size
        self.device = device
        self._tensors = [
            [self._new(plane, group, num_pages * page_size) for group in layout.groups] for plane in layout.planes
        ]
        self._layers = {
            (plane.name, layer): tensor[row]
            for plane, tensors in zip(layout.planes, self._tensors, strict=True)
            for group, tensor in zip(layout.groups, tensors, strict=True)
            for row, layer in enumerate(group.layers)
        }

    def _new(self, plane: Plane, group: LayerGroup, slots: int) -> torch.Tensor:
        # Zeros, not empty: a masked position's weight is 0, and 0 times a NaN left in memory would be NaN.
        shape = (len(group.layers), slots, plane.heads, plane.head_dim)
        return torch.zeros(shape, dtype=TORCH_DTYPES[plane.dtype], device=self.device)

    def plane(self, name: str, layer: int) -> torch.Tensor:
        """One layer of one plane, `[slots, heads, head_dim]`: the pool's own memory, not a copy."""
        return self._layers[name, layer]

    def gather(self, pages: Sequence[int], span: Span, out: Buffer) -> None:
        """Copies tokens `[span.start, span.end)` of the sequence that owns `pages` into `out`.

        `out` receives `layout.span_bytes(span.count)` bytes in the order `[plane][layer][token][head][dim]`.
        Raises ValueError on another length, or when `pages` do not cover the span.
        """
        flat, slots = self._flat(out, span), self._slots(pages, span)
        for target, memory, layers in self._parts(flat, span.count):
            if self.device.type == "cpu" and isinstance(layers, slice):
                torch.index_select(memory, 1, slots, out=target)  # straight into the staging: one pass over memory
            else:
                target[layers] = memory.index_select(1, slots).cpu()

    def scatter(self, pages: Sequence[int], span: Span, data: Buffer) -> None:
        """The inverse of `gather`: copies canonical bytes into the sequence's own pages. Raises the same errors."""
        flat, slots = self._flat(data, span), self._slots(pages, span)
        for source, memory, layers in self._parts(flat, span.count):
            if self.device.type == "cpu":
                rows, data = memory.numpy(), source.numpy()  # torch's own copies of short runs are slower
                for first, slot, count in _runs(slots.numpy()):
                    rows[:, slot : slot + count] = data[layers, first : first + count]
            else:
                memory.index_copy_(1, slots, source[layers].to(self.device))

    def copy_tokens(self, source_page: int, target_page: int, count: int) -> None:
        """Copies the first `count` tokens of a page to the start of another, in all planes and layers."""
        if not 0 <= count <= self.page_size:
            raise ValueError(f"cannot copy {count} tokens of a page of {self.page_size}")
        source, target = source_page * self.page_size, target_page * self.page_size
        for groups in self._tensors:
            for tensor in groups:
                tensor[:, target : target + count] = tensor[:, source : source + count]

    def _parts(self, flat: torch.Tensor, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, slice | list[int]]]:
        """Per plane and group: a span's and the pool's bytes `[layer, token or slot, byte]`, and the group's layers."""
        layers, offset = self.layout.num_layers, 0
        for plane, groups in zip(self.layout.planes, self._tensors, strict=True):
            size = layers * count * plane.token_bytes
            block = flat[offset : offset + size].view(layers, count, plane.token_bytes)
            offset += size
            for group, tensor in zip(self.layout.groups, groups, strict=True):
                whole = group.layers == tuple(range(layers))
                yield block, tensor.view(torch.uint8).flatten(2), slice(None) if whole else list(group.layers)

    def _flat(self, buffer: Buffer, span: Span) -> torch.Tensor:
        array = np.frombuffer(buffer, dtype=np.uint8)
        expected = self.layout.span_bytes(span.count)
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
        return torch.from_numpy(slots).to(self.device)


def _runs(slots: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """(index, slot, count) of slots that follow one another: pages side by side are copied at once."""
    cuts = np.flatnonzero(np.diff(slots) != 1) + 1
    bounds = [0, *cuts.tolist(), len(slots)]
    for first, end in pairwise(bounds):
        if end > first:
            yield first, int(slots[first]), end - first
