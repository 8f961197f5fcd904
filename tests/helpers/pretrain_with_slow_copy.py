"""The real entry point on a machine whose device is slow to reach, and a record of how it was used.

    python -m tests.helpers.pretrain_with_slow_copy MILLISECONDS once|twice <flags>

Copies take so long, one after the other, as on a stream of their own. A buffer on the "device" holds rubbish until its
copy has ended, and then the host's copy becomes rubbish: whoever reads too early, too late, or the wrong one, trains on
rubbish. ``twice`` makes Megatron run every step a second time, as its rerun machinery does to tell a fault of the
hardware from one of the model. ``slow-<rank>.json`` in the run's directory has the largest number of copies that were
under way or waiting to be used, and how many there were in all.
"""

from __future__ import annotations

import atexit
import json
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

RUBBISH = 0xA5


class SlowTransfer:
    """What :class:`megatron_graft.data.transfer.Transfer` promises, over a slow way."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.copies, self.most, self._unused = seconds, 0, 0, 0
        self._lock, self._orders = threading.Lock(), queue.SimpleQueue[Any]()
        threading.Thread(target=self._copy, daemon=True).start()

    def start(self, memory: Any) -> Any:
        import torch

        on_device, done = torch.full_like(memory.packed, RUBBISH), threading.Event()
        with self._lock:
            self.copies, self._unused = self.copies + 1, self._unused + 1
            self.most = max(self.most, self._unused)
        self._orders.put((memory, on_device, done))
        return on_device, done

    def finish(self, ticket: Any, *, counted: bool) -> Any:
        on_device, done = ticket
        done.wait()
        with self._lock:
            self._unused -= 1
        return on_device

    def drain_stall_seconds(self) -> float:
        return 0.0

    def _copy(self) -> None:
        while True:
            memory, on_device, done = self._orders.get()
            time.sleep(self.seconds)
            for first, end in memory.used_ranges():
                on_device[first:end] = memory.packed[first:end]
            memory.packed.fill_(RUBBISH)
            done.set()


def main() -> int:
    """Put the slow way in, then pre-train; return the exit code."""
    milliseconds, times = float(sys.argv[1]), sys.argv[2]
    del sys.argv[1:3]
    from megatron_graft.compat import cpu

    cpu.install()
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
    from megatron.training import get_args

    from megatron_graft.training import pretrain, run
    from megatron_graft.training.forward_step import ForwardStep

    transfer = SlowTransfer(milliseconds / 1e3)
    run.HostTransfer = lambda: transfer  # type: ignore[assignment,misc]
    if times == "twice":
        original = ForwardStep.__call__

        def forward_step(self: Any, *arguments: Any) -> Any:
            get_rerun_state_machine().set_mode(RerunMode.REPORT_DETERMINISM_STATS)  # no flag of Megatron's can
            return original(self, *arguments)

        ForwardStep.__call__ = forward_step  # type: ignore[method-assign]

    def write() -> None:
        args = get_args()
        found = {"most": transfer.most, "copies": transfer.copies}
        Path(args.graft_run_dir, f"slow-{args.rank}.json").write_text(json.dumps(found))

    atexit.register(write)
    return pretrain.main()


if __name__ == "__main__":
    raise SystemExit(main())
