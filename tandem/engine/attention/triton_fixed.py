"""Plans of decode steps whose arrays never move, so that what was captured once reads each step's own batch.

A step has up to a fixed number of rows and parts. Rows that are not there write no keys and values and see nothing;
parts that are not there are empty, and no row asks for them.
"""

from __future__ import annotations

import numpy as np
import torch

from tandem.device import upload
from tandem.engine.attention.base import AttentionBatch, IntArray
from tandem.engine.attention.page_runs import token_slots
from tandem.engine.attention.triton_paged import TritonPagedAttention, TritonPagedPlan
from tandem.engine.attention.triton_plan import ALIGNED, GroupPlan, decode_items

PARTS_PER_ROW = 64
"""Parts of context for which there is room, over all rows together; a batch with more has no fixed plan."""
NO_SLOT = -1


class DoesNotFit(Exception):
    """A batch is larger than the arrays that are kept for batches."""


class _Arrays:
    """One layer group's: slots, rows, first parts, parts, then pages, in one buffer that is copied from its front."""

    def __init__(self, most_rows: int, most_pages: int, device: torch.device) -> None:
        self.most_parts = most_rows * PARTS_PER_ROW
        sizes = [most_rows, most_rows * 4, most_rows + 1, self.most_parts * 4, most_pages]
        ends = np.cumsum([-(-size // ALIGNED) * ALIGNED for size in sizes])
        self.host = np.zeros(int(ends[-1]), dtype=np.int32)
        self.device = torch.zeros(len(self.host), dtype=torch.int32, device=device)
        self.begins = [0, *ends[:-1].tolist()]

    def write(self, rows: int, arrays: list[IntArray], pages: IntArray) -> None:
        """Takes in one step, padded to `rows` rows; one copy. arrays: slots, rows, first parts, parts."""
        slots, table, firsts, parts = arrays
        real = len(table)
        if len(parts) > self.most_parts or len(pages) > len(self.host) - self.begins[4]:
            raise DoesNotFit(f"{len(parts)} parts and {len(pages)} pages")
        padding = np.zeros((rows - real, 4), dtype=np.int64)
        padding[:, 1], padding[:, 2] = 1, np.arange(real, rows)
        self._put(0, np.concatenate((slots, np.full(rows - real, NO_SLOT))))
        self._put(1, np.concatenate((table, padding)))
        self._put(2, np.concatenate((firsts, np.full(rows - real, firsts[-1]))))
        self.host[self.begins[3] : self.begins[4]] = 0
        self._put(3, parts)
        self._put(4, pages)
        used = self.begins[4] + len(pages)
        self.device[:used].copy_(upload(torch.from_numpy(self.host[:used]), self.device.device))

    def _put(self, section: int, values: IntArray) -> None:
        self.host[self.begins[section] : self.begins[section] + values.size] = values.ravel()

    def view(self, section: int, *shape: int) -> torch.Tensor:
        """A section's front on the device."""
        begin = self.begins[section]
        return self.device[begin : begin + int(np.prod(shape))].view(shape)


class FixedDecodePlan(TritonPagedPlan):
    """A plan for whatever batch was loaded last. `rows` and `parts` are what is launched now, real or not."""

    def __init__(self, backend: TritonPagedAttention, most_rows: int) -> None:
        nobody = np.zeros(0, dtype=np.int64)
        super().__init__(backend, AttentionBatch(nobody, nobody, []), [])
        pool = backend.pool
        part_pages = -(-backend.part_tokens // pool.page_size) + 1
        self.most_rows = most_rows
        self.rows = most_rows
        self.parts = [most_rows] * len(pool.group_pages)
        self._fixed = [_Arrays(most_rows, most_rows * PARTS_PER_ROW * part_pages, pool.device) for _ in self.parts]

    def load(self, plan: TritonPagedPlan | None, rows: int) -> tuple[int, ...]:
        """Takes in a decode step's plan (None: no rows), padded to `rows`; returns the parts to launch for each group.

        Those are a power of two, and at least one a row. Raises DoesNotFit when there is no room for the batch.
        """
        self.rows = rows
        backend, empty = self._backend, np.zeros((0, 4), dtype=np.int64)
        for number, (group, fixed) in enumerate(zip(backend.pool.layout.groups, self._fixed, strict=True)):
            arrays, pages = [empty[:, 0], empty, np.zeros(1, dtype=np.int64), empty], empty[:, 0]
            if plan is not None:
                batch, (pages, firsts) = plan.batch, plan.tables[number]
                table = np.stack((batch.starts, batch.counts, np.arange(len(batch.counts)), firsts), axis=1)
                parts, first_parts = decode_items(table, group.window, backend.part_tokens)
                slots = token_slots(batch, pages, firsts, backend.pool.page_size)
                arrays = [slots, table, first_parts, parts]
            fixed.write(rows, arrays, pages)
            self.parts[number] = 1 << (max(rows, len(arrays[3])) - 1).bit_length()
        return tuple(self.parts)

    def group_plan(self, layer: int, heads: int) -> GroupPlan:
        """See `TritonPagedPlan`."""
        number, rows = self._backend.groups[layer], self.rows
        fixed, parts, window = self._fixed[number], self.parts[number], self._backend.pool.layout.groups[number].window
        return GroupPlan(
            window=window,
            decoding=rows,
            tiles=self._backend.tiles(heads),
            slots=fixed.view(0, rows),
            rows=fixed.view(1, rows, 4),
            pages=fixed.view(4, len(fixed.host) - fixed.begins[4]),
            firsts=fixed.view(2, rows + 1),
            parts=fixed.view(3, parts, 4),
            chunks=fixed.view(3, 0, 4),
        )
