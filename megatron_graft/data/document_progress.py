"""Progress lines for work on documents, in two units at once: documents/s, MB/s and ETA."""

from __future__ import annotations

import time

from megatron_graft.log import format_seconds, get_logger

_EVERY_SECONDS = 5.0


class DocumentProgress:
    """Count documents and bytes read; print a line every few seconds or every so many documents.

    Args:
        label: what is being done.
        total_bytes: size of the whole input, for the ETA.
        every_documents: documents between two lines; None for a line every five seconds.
    """

    def __init__(self, label: str, total_bytes: int, every_documents: int | None = None) -> None:
        self.label, self.total_bytes, self.every_documents = label, total_bytes, every_documents
        self.documents = self.bytes = 0
        self._start = self._last = time.monotonic()
        self._documents_at_last_line = 0

    def advance(self, documents: int, num_bytes: int) -> None:
        """Count a batch and print a line if one is due."""
        self.documents += documents
        self.bytes += num_bytes
        now = time.monotonic()
        if self.every_documents is None:
            due = now - self._last >= _EVERY_SECONDS
        else:
            due = self.documents - self._documents_at_last_line >= self.every_documents
        if due:
            self._last, self._documents_at_last_line = now, self.documents
            remaining = (self.total_bytes - self.bytes) * (now - self._start) / max(self.bytes, 1)
            get_logger().info(
                "%s: %s documents, %.1f/%.1f MB, %s, ETA %s",
                self.label, f"{self.documents:,}", self.bytes / 1e6, self.total_bytes / 1e6,
                self._rates(now - self._start), format_seconds(remaining),
            )  # fmt: skip

    def finish(self, tokens: int) -> float:
        """Print the closing line; return the seconds taken."""
        elapsed = time.monotonic() - self._start
        get_logger().info(
            "%s: %s documents, %s tokens in %s (%s)",
            self.label, f"{self.documents:,}", f"{tokens:,}", format_seconds(elapsed), self._rates(elapsed),
        )  # fmt: skip
        return elapsed

    def _rates(self, seconds: float) -> str:
        seconds = max(seconds, 1e-9)
        return f"{self.documents / seconds:,.0f} documents/s, {self.bytes / seconds / 1e6:.2f} MB/s"
