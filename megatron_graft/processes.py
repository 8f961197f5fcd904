"""Processes that must not outlive the one that started them, however that one ended."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let this process be killed when the one that started it ends; on Linux only, elsewhere nothing happens.

    Called as early as possible in a child. The kernel tells of a parent's end only who asked before it, so a child of
    ``multiprocessing`` whose parent ended while it was still importing ends here. (In a "spawn" child's ``__mp_main__``
    the parent is not known yet.) The parent is the *thread* that started the child.
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):  # a C library without prctl(): it may be left behind
        return
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os.kill(os.getpid(), signal.SIGKILL)
