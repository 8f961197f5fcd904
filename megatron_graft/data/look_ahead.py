"""The look-ahead: while the model computes, a thread reads the coming micro-batches and fetches their memory.

The stream yields tokens and a sequence number; the rows stay here until :meth:`LookAhead.take` asks for them by that
number. Megatron's rerun machinery may keep and replay what the stream yielded: rows that are no longer here are then
simply fetched again from the tokens.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_graft.data.memory_fetcher import FetchCounts, Fetched, MemoryFetcher
from megatron_graft.data.transfer import Transfer

Batch = dict[str, Any]
SEQUENCE_NUMBER = "sequence_number"
_PATIENCE_SECONDS = 0.2


@dataclass
class LookAheadStatistics:
    """Sums since the last :meth:`LookAhead.drain_statistics`.

    Attributes:
        counts: of what was fetched; without content on a rank that owns no site.
        stall_seconds: time the training thread waited for a micro-batch.
        fetch_seconds: time the look-ahead thread spent on lookup, hashing and gather.
        micro_batches: number consumed.
    """

    counts: FetchCounts
    stall_seconds: float = 0.0
    fetch_seconds: float = 0.0
    micro_batches: int = 0


class LookAhead:
    """Serves all streams of a process (training, validation, test).

    Args:
        fetcher: where memory comes from, or None on a rank that owns no memory site: it then only reads ahead.
        transfer: the way to the device.
        depth: how many micro-batches may wait, at most.
    """

    def __init__(self, fetcher: MemoryFetcher | None, transfer: Transfer, depth: int) -> None:
        self.fetcher, self.transfer, self.depth = fetcher, transfer, depth
        self._numbers = itertools.count()
        self._tickets: dict[int, tuple[Any, Fetched]] = {}
        self.statistics = self._fresh_statistics()

    def _fresh_statistics(self) -> LookAheadStatistics:
        return LookAheadStatistics(counts=self.fetcher.no_counts() if self.fetcher else FetchCounts())

    def drain_statistics(self) -> LookAheadStatistics:
        """Return the statistics and start new ones."""
        drained, self.statistics = self.statistics, self._fresh_statistics()
        return drained

    def stream(self, batches: Iterable[Batch], *, counted: bool = True) -> MicroBatchStream:
        """An iterator over ``batches`` that reads ahead; each yielded batch carries its sequence number.

        Args:
            batches: dictionaries with int64 ``tokens`` ``[B, S]``.
            counted: whether its micro-batches enter the statistics (training does, validation does not).
        """
        return MicroBatchStream(self, batches, counted)

    def prepare(self, batch: Batch) -> tuple[Batch, tuple[Any, Fetched] | None]:
        """Number a batch and fetch its memory (look-ahead thread)."""
        numbered = {**batch, SEQUENCE_NUMBER: next(self._numbers)}
        return numbered, self._fetch(numbered)

    def _fetch(self, batch: Batch) -> tuple[Any, Fetched] | None:
        if self.fetcher is None:
            return None
        fetched = self.fetcher.fetch(batch["tokens"], batch[SEQUENCE_NUMBER])
        return self.transfer.start(fetched.memory), fetched

    def hold(self, number: int, prepared: tuple[Any, Fetched] | None) -> None:
        """Keep a yielded batch's memory until it is taken (training thread)."""
        if prepared is not None:
            self._tickets[number] = prepared

    def count(self, prepared: tuple[Any, Fetched] | None, stall_seconds: float) -> None:
        """Add a yielded micro-batch to the statistics (training thread)."""
        statistics = self.statistics
        statistics.stall_seconds += stall_seconds
        statistics.micro_batches += 1
        if prepared is not None:
            _, fetched = prepared
            statistics.counts.add(fetched.counts)
            statistics.fetch_seconds += fetched.seconds

    def take(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The memory of a batch that a stream yielded; None on a rank without sites.

        Returns:
            ``packed`` on the device and ``exchange`` on the host, as in
            :class:`~megatron_graft.data.microbatch.MicroBatchMemory`.

        Taking twice (a replayed step) fetches again.
        """
        if self.fetcher is None:
            return None
        held = self._tickets.pop(batch[SEQUENCE_NUMBER], None)
        ticket, fetched = held if held is not None else self._fetch(batch)  # type: ignore[misc]
        return self.transfer.finish(ticket), fetched.memory.exchange


class _End:
    """Put into the queue last: the loader is exhausted, or it raised."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class MicroBatchStream(Iterator[Batch]):
    """Iterator with a reading thread behind it, started by the first ``next``; see :meth:`LookAhead.stream`."""

    def __init__(self, look_ahead: LookAhead, batches: Iterable[Batch], counted: bool) -> None:
        self._look_ahead, self._batches, self._counted = look_ahead, batches, counted
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=look_ahead.depth)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        # The thread holds no reference to the stream, so dropping the stream ends the thread.
        weakref.finalize(self, self._stop.set)

    def __iter__(self) -> MicroBatchStream:
        return self

    def __next__(self) -> Batch:
        if self._thread is None:
            arguments = (self._look_ahead, iter(self._batches), self._queue, self._stop)
            self._thread = threading.Thread(target=_read_ahead, args=arguments, name="graft-look-ahead", daemon=True)
            self._thread.start()
        started = time.perf_counter()
        item = self._queue.get()
        waited = time.perf_counter() - started
        if isinstance(item, _End):
            self._queue.put(item)
            raise StopIteration if item.error is None else item.error
        batch, prepared = item
        self._look_ahead.hold(batch[SEQUENCE_NUMBER], prepared)
        if self._counted:
            self._look_ahead.count(prepared, waited)
        return batch

    def close(self) -> None:
        """Stop the reading thread and wait for it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


def _read_ahead(look_ahead: LookAhead, batches: Iterator[Batch], out: queue.Queue[Any], stop: threading.Event) -> None:
    end = _End(None)
    try:
        for batch in batches:
            item = look_ahead.prepare(batch)
            if not _put(out, item, stop):
                return
    except BaseException as error:  # the training thread must see it, whatever it is
        end = _End(error)
    _put(out, end, stop)


def _put(out: queue.Queue[Any], item: Any, stop: threading.Event) -> bool:
    """Put, but give up when told to stop."""
    while not stop.is_set():
        try:
            out.put(item, timeout=_PATIENCE_SECONDS)
            return True
        except queue.Full:
            continue
    return False
