"""Whether a call lets other threads run, which the interpreter's lock would keep from it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_TRIES = 50  # on a busy machine this thread may sleep through a whole call


def others_run_during(call: Callable[[], object]) -> bool:
    """Whether this thread ever runs in the middle of a call that another one makes: away from its begin and end."""
    return any(_sampled(call) for _ in range(_TRIES))


def _sampled(call: Callable[[], object]) -> bool:
    span: list[float] = []

    def timed() -> None:
        span.append(time.perf_counter())
        call()
        span.append(time.perf_counter())

    thread = threading.Thread(target=timed)
    samples: list[float] = []
    thread.start()
    while thread.is_alive():
        samples.append(time.perf_counter())
        time.sleep(0.001)
    thread.join()
    begin, end = span
    margin = 0.2 * (end - begin)
    return any(begin + margin < sample < end - margin for sample in samples)
