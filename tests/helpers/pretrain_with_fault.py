"""The real entry point on a machine with a fault: one byte of one micro-batch's memory arrives changed on one rank.

Run as ``-m tests.helpers.pretrain_with_fault RANK MICRO_BATCH SECTION <flags of the run>``.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def main() -> int:
    """Wrap the transfer, then pre-train; return the exit code."""
    rank, micro_batch, section = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    del sys.argv[1:4]
    from megatron_graft.compat import cpu

    cpu.install()
    from megatron_graft.data.transfer import HostTransfer
    from megatron_graft.training import pretrain

    original = HostTransfer.start

    def start(self: Any, memory: Any) -> Any:
        if int(os.environ["RANK"]) == rank and memory.sequence_number == micro_batch:
            place = memory.section(section)
            if section.startswith(("rows", "requests")):
                place = place[: memory.used(section)]  # what lies behind is nobody's
            place = place[-1, :2] if section.startswith("rows") else place  # a row may end in padding
            place.view(-1)[-1] ^= 1
        return original(self, memory)

    HostTransfer.start = start  # type: ignore[method-assign]
    return pretrain.main()


if __name__ == "__main__":
    raise SystemExit(main())
