"""Compute devices and threads. The only file that names a device's own API (`torch.cuda`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from tandem.errors import ConfigError

log = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """The torch device called `name` ("cpu", "cuda", "cuda:1").

    Raises ConfigError when torch does not know the name, or this machine has no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}; expected cpu, cuda or cuda:N", "device") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(f"device is {name!r}; this machine has {count} CUDA devices", "device")
    elif device.type != "cpu":
        raise ConfigError(f"device is {name!r}; expected cpu, cuda or cuda:N", "device")
    return device


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a GPU."""

    free: int
    total: int


def device_memory(device: torch.device) -> DeviceMemory:
    """What a GPU has now, what torch keeps for later counted as free."""
    torch.cuda.empty_cache()
    return DeviceMemory(*torch.cuda.mem_get_info(device))


def accelerators() -> list[str]:
    """The names of this machine's GPUs, in order of their numbers."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def set_compute_threads(threads: int) -> int:
    """Sets the threads that one torch operation may use (0 keeps torch's own choice, all cores) and returns them.

    Operations run one after another on the engine thread, so that inter-op threads would only compete with it: there
    is one. Torch fixes that number at its first parallel operation; a later call cannot change it and logs that.
    """
    if threads < 0:
        raise ConfigError(f"threads is {threads}; it must be at least 0", "threads")
    if threads:
        torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:
        try:
            torch.set_num_interop_threads(1)
        except RuntimeError as error:
            log.warning("inter-op threads stay at %d: %s", torch.get_num_interop_threads(), error)
    return torch.get_num_threads()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the calling thread's current one while the context lasts; libraries launch their kernels there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device, without waiting for what the device was told before.

    A GPU copies from pinned memory, which torch keeps until that is done: `values` may be changed at once.
    """
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """Tensors on their way from a device to the host: copied behind what the device was told before."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._tensors: Sequence[torch.Tensor] = tensors
        self._done: torch.cuda.Event | None = None
        if tensors and tensors[0].device.type == "cuda":
            pinned = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors]
            self._tensors = [to.copy_(each, non_blocking=True) for to, each in zip(pinned, tensors, strict=True)]
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> Sequence[torch.Tensor]:
        """The tensors on the host. The one place where a step waits for the device."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors


class CudaCapture:
    """Captures CUDA graphs whose memory comes from one pool. Not measured: no GPU has run it yet."""

    WARM_UPS = 2
    """Kernels are compiled and caches are filled by the first run; a capture must only see launches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self.memory_bytes = 0
        """What the graphs hold, as far as torch's allocator knows."""

    def capture(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """The function's launches, to be launched again, and where its result is. Raises RuntimeError."""
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(self.WARM_UPS):
                    function()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            before = torch.cuda.memory_reserved(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = function()
            self.memory_bytes += torch.cuda.memory_reserved(self._device) - before
        return graph.replay, result
