"""A check in a forked child: its failure is the test's, and neither a second test run nor a hanging one is left."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable

TIMEOUT_SECONDS = 60


def check_in_fork(check: Callable[[], object], seconds: int = TIMEOUT_SECONDS) -> None:
    """Call ``check`` in a forked child.

    Raises:
        AssertionError: it raised (its traceback is on stderr), died or took too long.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which is what is tested
        child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            check()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended != -signal.SIGALRM, f"the forked child took more than {seconds} s"
    assert ended == 0, f"the forked child ended with {ended}"
