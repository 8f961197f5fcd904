"""Entry point: ``python -m megatron_graft.training.pretrain [Megatron's flags] [--graft-* flags]``.

Light at import time on purpose: saving a checkpoint starts a helper process that imports this module again.
"""

from __future__ import annotations

from megatron_graft.commands import run_command
from megatron_graft.compat.save_helper import outlive_signals


def main() -> int:
    """Run pre-training; return the exit code."""
    from megatron_graft.compat import cpu

    cpu.install()
    from megatron_graft.training.run import run_pretraining

    return run_command(run_pretraining)


if __name__ == "__mp_main__":
    outlive_signals()
if __name__ == "__main__":
    raise SystemExit(main())
