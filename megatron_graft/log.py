"""One logger for the package, and progress lines with rate and ETA for long work."""

from __future__ import annotations

import logging
import os
import sys
import time

_FORMAT = "[megatron-graft] %(message)s"


def get_logger() -> logging.Logger:
    """Return the package's logger; it speaks on rank 0 only unless ``GRAFT_LOG_ALL_RANKS`` is set."""
    logger = logging.getLogger("megatron_graft")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(handler)
        logger.propagate = False
        quiet = int(os.environ.get("RANK", "0")) != 0 and not os.environ.get("GRAFT_LOG_ALL_RANKS")
        logger.setLevel(logging.WARNING if quiet else logging.INFO)
    return logger


def format_seconds(seconds: float) -> str:
    """``75`` -> ``1m15s``; ``4000`` -> ``1h06m``."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Progress:
    """Report a long loop as lines ``label: done/total unit, rate, ETA``, at most one every few seconds.

    Lines rather than a bar: they survive Slurm logs, ``tee`` and ``grep``.

    Args:
        label: what is being done.
        total: how many units there are in all.
        unit: name of a unit, for example ``rows``.
        every_seconds: least time between two lines.
    """

    def __init__(self, label: str, total: int, unit: str, every_seconds: float = 5.0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.every_seconds = every_seconds
        self.done = 0
        self._start = self._last = time.monotonic()

    def advance(self, units: int) -> None:
        """Count ``units`` more as done and print a line if one is due."""
        self.done += units
        now = time.monotonic()
        if now - self._last >= self.every_seconds:
            self._last = now
            self._print(now)

    def finish(self) -> float:
        """Print the closing line; return the seconds taken."""
        now = time.monotonic()
        elapsed = now - self._start
        rate = self.done / elapsed if elapsed else 0.0
        get_logger().info(
            "%s: %s %s in %s (%s %s/s)",
            self.label, f"{self.done:,}", self.unit, format_seconds(elapsed), f"{rate:,.0f}", self.unit,
        )  # fmt: skip
        return elapsed

    def _print(self, now: float) -> None:
        rate = self.done / (now - self._start)
        remaining = (self.total - self.done) / rate if rate else 0.0
        get_logger().info(
            "%s: %s/%s %s, %s %s/s, ETA %s",
            self.label, f"{self.done:,}", f"{self.total:,}", self.unit,
            f"{rate:,.0f}", self.unit, format_seconds(remaining),
        )  # fmt: skip
