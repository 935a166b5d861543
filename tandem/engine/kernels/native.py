"""The compiled kernels: loading them, calling them, and recording their calls.

Quick calls are made with Python's lock held, since giving it up and getting it back can cost more than they do; long
ones without. Arguments travel as one block of 64-bit words, so that a recorded call can be made again as it was.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
ALIGNMENT = 64
Function = Any
"""A foreign function; ctypes has no narrower type for one."""


def real(value: float) -> int:
    """A float as an argument word: the bits of the double."""
    return int(struct.unpack("q", struct.pack("d", value))[0])


class Tape:
    """Calls in order, with everything that they point to. Their results lie in memory that outlives the recording."""

    def __init__(self, arena: torch.Tensor) -> None:
        """arena: uint8; recordings that are never replayed at once may share it."""
        self.calls: list[tuple[int, Any]] = []
        self.kept: list[object] = []
        self._arena = arena
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in the arena. Raises MemoryError when that is full."""
        size = math.prod(shape) * dtype.itemsize
        end = self._used + size
        if end > self._arena.numel():
            raise MemoryError(f"a recording needs more than {self._arena.numel()} bytes")
        part = self._arena[self._used : end].view(dtype).view(shape)
        self._used = -(-end // ALIGNMENT) * ALIGNMENT
        return part


class Kernel:
    """One operation for one dtype."""

    def __init__(self, quick: Function, long: Function) -> None:
        quick.restype = long.restype = None
        self.quick, self.long = quick, long
        self.address = ctypes.cast(long, ctypes.c_void_p).value


class NativeLibrary:
    """The loaded shared library. Raises OSError when it cannot be loaded, AttributeError when it is another one."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path = path
        self._quick, self._long = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
        self._long.tandem_features.restype = ctypes.c_char_p
        self._long.tandem_replay.restype = None
        self._long.tandem_replay.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self.features: str = self._long.tandem_features().decode()
        self.threads = threads if self._long.tandem_threads_supported() else 1
        self._blocks = [ctypes.c_int64 * count for count in range(16)]
        self._tape: Tape | None = None

    def kernels(self, name: str) -> dict[torch.dtype, Kernel]:
        """The kernels of one operation by dtype."""
        symbols = {dtype: f"tandem_{name}_{suffix}" for dtype, suffix in SUFFIXES.items()}
        return {d: Kernel(getattr(self._quick, symbol), getattr(self._long, symbol)) for d, symbol in symbols.items()}

    def call(self, kernel: Kernel, tensors: Sequence[torch.Tensor | None], *words: int, long: bool = False) -> None:
        """Calls a kernel with `words`, which hold pointers into `tensors`, and records it if a recording is on."""
        block = self._blocks[len(words)](*words)
        (kernel.long if long else kernel.quick)(block)
        if self._tape is not None:
            assert kernel.address is not None
            self._tape.calls.append((kernel.address, block))
            self._tape.kept.extend(tensors)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a result."""
        if self._tape is not None:
            return self._tape.empty(shape, dtype)
        return torch.empty(shape, dtype=dtype)

    @contextmanager
    def recording(self, tape: Tape) -> Iterator[None]:
        """Records what is called within, on the thread that calls everything."""
        self._tape = tape
        try:
            yield
        finally:
            self._tape = None

    def replay(self, calls: ctypes.Array[ctypes.c_int64]) -> None:
        """Makes recorded calls again: pairs of function and arguments."""
        self._long.tandem_replay(ctypes.addressof(calls), len(calls) // 2)
