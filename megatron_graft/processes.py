"""Processes that must not outlive the one that started them, however that one ended."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

_PR_SET_PDEATHSIG = 1


def available_processors() -> int:
    """How many this process may run on: those of its allocation, where a batch system gave it a part of the machine."""
    return len(os.sched_getaffinity(0))


def run_while_alive(command: Sequence[str]) -> int:
    """Run a command that is killed when this process ends; return its exit code.

    For programs that may be killed at any moment and go on when they are started again.
    """
    return subprocess.run(command, check=False, preexec_fn=partial(end_with_parent, os.getpid())).returncode


def end_with_parent(parent: int | None = None) -> None:
    """Let this process be killed when the one that started it ends; on Linux only, elsewhere nothing happens.

    Called as early as possible in a child. The kernel tells of a parent's end only who asked before it, so a child
    whose ``parent`` has ended by now ends here. That is a process id, or None for the one that ``multiprocessing``
    knows of (nobody in a "spawn" child's ``__mp_main__``: there it is not known yet). What has to end for the kernel to
    tell is the *thread* that started the child.
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):  # a C library without prctl(): it may be left behind
        return
    known = multiprocessing.parent_process()
    parent = parent or (known.pid if known else None)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
