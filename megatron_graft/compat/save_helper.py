"""The process that Megatron starts for saving checkpoints has to outlive the signal that asks for the last one.

Megatron keeps one helper for all saves of a run, by multiprocessing's "spawn". torchrun passes a signal on to the whole
process group of a worker, and the helper has no handler: it dies, and with it the checkpoint that the worker then
wants to save. A helper imports the program it was started from, as ``__mp_main__``; that is where this is called.
Light at import time.
"""

from __future__ import annotations

import signal

from megatron_graft.processes import end_with_parent

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def outlive_signals() -> None:
    """Ignore the signals that end a run; end with the process that started this one, however that ends."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
