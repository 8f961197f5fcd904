"""How a packed memory gets from the host to the device that computes. One small interface, two ways.

The CUDA way is written for, and has not been run on, a GPU.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from megatron_graft.data.microbatch import MicroBatchMemory


class Transfer(Protocol):
    """Starts a copy early (any thread) and hands out the finished tensor later (the training thread)."""

    def start(self, memory: MicroBatchMemory) -> Any:
        """Begin to bring ``memory.packed`` to the device; return a ticket for :meth:`finish`."""
        ...

    def finish(self, ticket: Any) -> torch.Tensor:
        """The device's packed tensor, safe to use on the current stream."""
        ...


class HostTransfer:
    """The device is the host: nothing to copy."""

    def start(self, memory: MicroBatchMemory) -> torch.Tensor:
        """Return the packed tensor itself."""
        return memory.packed

    def finish(self, ticket: torch.Tensor) -> torch.Tensor:
        """Return the packed tensor itself."""
        return ticket


class CudaTransfer:
    """Copies on a stream of its own; the training stream waits on an event, the host never does.

    Only the used parts of the tensor are copied. The page-locked source comes from torch's caching host allocator,
    which does not hand it out again before the copy has ended; the device tensor lives as long as autograd or a
    recomputed block refers to it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def start(self, memory: MicroBatchMemory) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Enqueue the copy; return the device tensor and the event that marks its end."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            on_device = torch.empty(memory.packed.numel(), dtype=torch.uint8, device=self.device)
            for first, end in memory.used_ranges():
                on_device[first:end].copy_(memory.packed[first:end], non_blocking=True)
            done = torch.cuda.Event()
            done.record(self.stream)
        return on_device, done

    def finish(self, ticket: tuple[torch.Tensor, torch.cuda.Event]) -> torch.Tensor:
        """Order the current stream behind the copy and keep the allocator from reusing the tensor too early."""
        on_device, done = ticket
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        on_device.record_stream(current)
        return on_device
