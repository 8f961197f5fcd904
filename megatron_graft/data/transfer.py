"""How a packed memory gets from the host to the device that computes. One small interface, two ways.

The CUDA way is written for, and has not been run on, a GPU.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import torch

from megatron_graft.data.microbatch import MicroBatchMemory


class Transfer(Protocol):
    """Starts a copy early (any thread) and hands out the finished tensor later (the training thread)."""

    def start(self, memory: MicroBatchMemory) -> Any:
        """Begin to bring ``memory.packed`` to the device; return a ticket for :meth:`finish`."""
        ...

    def finish(self, ticket: Any, *, counted: bool) -> torch.Tensor:
        """The device's packed tensor, safe to use on the current stream; may wait for the copy to end.

        Args:
            ticket: what :meth:`start` gave.
            counted: whether a wait of the device is to be told by :meth:`drain_stall_seconds`.
        """
        ...

    def drain_stall_seconds(self) -> float:
        """Time that the device has waited for counted copies since the last call, beyond what :meth:`finish` took."""
        ...


class HostTransfer:
    """The device is the host: nothing to copy."""

    def start(self, memory: MicroBatchMemory) -> torch.Tensor:
        """Return the packed tensor itself."""
        return memory.packed

    def finish(self, ticket: torch.Tensor, *, counted: bool) -> torch.Tensor:
        """Return the packed tensor itself."""
        return ticket

    def drain_stall_seconds(self) -> float:
        """There is no copy to wait for."""
        return 0.0


class CudaTransfer:
    """Copies on a stream of its own; the training stream waits on an event, the host never does.

    Only the used parts of the tensor are copied. The page-locked source comes from torch's caching host allocator,
    which does not hand it out again before the copy has ended; the device tensor lives as long as autograd or a
    recomputed block refers to it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self, memory: MicroBatchMemory) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Enqueue the copy; return the device tensor and the event that marks its end."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            on_device = torch.empty(memory.packed.numel(), dtype=torch.uint8, device=self.device)
            for first, end in memory.used_ranges():
                on_device[first:end].copy_(memory.packed[first:end], non_blocking=True)
            done = torch.cuda.Event()
            done.record(self.stream)
        return on_device, done

    def finish(self, ticket: tuple[torch.Tensor, torch.cuda.Event], *, counted: bool) -> torch.Tensor:
        """Order the current stream behind the copy and keep the allocator from reusing the tensor too early."""
        on_device, done = ticket
        current = torch.cuda.current_stream(self.device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(current)
        current.wait_event(done)
        after.record(current)
        if counted:
            self._waits.append((before, after))
        on_device.record_stream(current)
        return on_device

    def drain_stall_seconds(self) -> float:
        """What lies between the events around each wait. Waits that the device has not come to yet are left for later:
        asking never waits itself."""
        seconds = 0.0
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.popleft()
            seconds += before.elapsed_time(after) / 1e3
        return seconds
