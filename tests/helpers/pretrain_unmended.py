"""The real entry point without one of the things that the package does about Megatron's faults.

Run as ``-m tests.helpers.pretrain_unmended NAME <flags of the run>``; NAME is a key of :data:`PARTS`.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_RESTART = "megatron_graft.compat.optimizer_restart"
PARTS = {
    "state first": (_RESTART, "_create_state_first"),
    "step kept": (_RESTART, "_keep_step"),
    "steps apart": (_RESTART, "_separate_steps"),
    "refusal of layouts": ("megatron_graft.training.run", "check_resharding"),
}


def main() -> int:
    """Replace the part by one that does nothing, then pre-train; return the exit code."""
    module, name = PARTS[sys.argv.pop(1)]
    from megatron_graft.compat import cpu

    cpu.install()
    from megatron_graft.training import pretrain

    def nothing(given: Any, *_: Any) -> Any:
        return given

    setattr(importlib.import_module(module), name, nothing)
    return pretrain.main()


if __name__ == "__main__":
    raise SystemExit(main())
