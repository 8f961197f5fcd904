"""The look-ahead: while the model computes, a thread reads the coming micro-batches and fetches their memory.

The stream yields tokens and a sequence number; the rows stay here until :meth:`LookAhead.take` asks for them by that
number. Megatron's rerun machinery may keep and replay what the stream yielded: rows that are no longer here are then
simply fetched again from the tokens.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_graft.data.memory_fetcher import FetchCounts, Fetched, MemoryFetcher
from megatron_graft.data.transfer import Transfer

Batch = dict[str, Any]
SEQUENCE_NUMBER, CHUNK, COUNTED = "sequence_number", "chunk", "counted"
_PATIENCE_SECONDS, _PARTING_SECONDS = 0.2, 10.0
_readers: dict[threading.Thread, threading.Event] = {}  # that run, each with what stops it


@dataclass
class LookAheadStatistics:
    """Sums since the last :meth:`LookAhead.drain_statistics`.

    Attributes:
        counts: of what was fetched; without content on a rank that owns no site.
        stall_seconds: time that training waited for a micro-batch: its thread, and the device for a copy.
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
        fetchers: for each model chunk of this rank (one; in an interleaved pipeline one for each virtual stage) where
            its memory comes from, or None for a chunk that owns no memory site: its streams only read ahead.
        transfer: the way to the device.
        depth: how many micro-batches of a stream may wait, at most, besides one in the hands of its thread.
    """

    def __init__(self, fetchers: Sequence[MemoryFetcher | None], transfer: Transfer, depth: int) -> None:
        self.fetchers, self.transfer, self.depth = tuple(fetchers), transfer, depth
        self._numbers = itertools.count()
        self._tickets: dict[int, tuple[Any, Fetched]] = {}
        self.statistics = self._fresh_statistics()

    def _fresh_statistics(self) -> LookAheadStatistics:
        some = next(filter(None, self.fetchers), None)  # all count what they find in the run's banks
        return LookAheadStatistics(counts=some.no_counts() if some else FetchCounts())

    def drain_statistics(self) -> LookAheadStatistics:
        """Return the statistics and start new ones."""
        drained, self.statistics = self.statistics, self._fresh_statistics()
        drained.stall_seconds += self.transfer.drain_stall_seconds()
        return drained

    def stream(self, batches: Iterable[Batch], *, chunk: int = 0, counted: bool = True) -> MicroBatchStream:
        """An iterator over ``batches`` that reads ahead; each yielded batch carries its sequence number and its chunk.

        Args:
            batches: dictionaries with int64 ``tokens`` ``[B, S]``.
            chunk: number of the model chunk that they are for.
            counted: whether its micro-batches enter the statistics (training does, validation does not).
        """
        return MicroBatchStream(self, batches, chunk, counted)

    def prepare(self, batch: Batch, chunk: int, counted: bool) -> tuple[Batch, tuple[Any, Fetched] | None]:
        """Number a batch and fetch its memory (look-ahead thread)."""
        numbered = {**batch, SEQUENCE_NUMBER: next(self._numbers), CHUNK: chunk, COUNTED: counted}
        return numbered, self._fetch(numbered)

    def _fetch(self, batch: Batch) -> tuple[Any, Fetched] | None:
        fetcher = self.fetchers[batch[CHUNK]]
        if fetcher is None:
            return None
        fetched = fetcher.fetch(batch["tokens"], batch[SEQUENCE_NUMBER])
        return self.transfer.start(fetched.memory), fetched

    def hold(self, number: int, prepared: tuple[Any, Fetched] | None) -> None:
        """Keep a yielded batch's memory until it is taken or dropped (training thread)."""
        if prepared is not None:
            self._tickets[number] = prepared

    def drop(self, number: int | None) -> None:
        """Let go of the memory of a batch that nobody took (training thread); taken after all, it is fetched again."""
        self._tickets.pop(number, None)  # type: ignore[arg-type]

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
        """The memory of a batch that a stream yielded; None for a chunk without sites.

        Returns:
            ``packed`` on the device and ``exchange`` on the host, as in
            :class:`~megatron_graft.data.microbatch.MicroBatchMemory`.

        Taking twice (a replayed step) fetches again.
        """
        prepared = self._tickets.pop(batch[SEQUENCE_NUMBER], None) or self._fetch(batch)
        if prepared is None:
            return None
        ticket, fetched = prepared
        started = time.perf_counter()
        packed = self.transfer.finish(ticket, counted=batch[COUNTED])
        if batch[COUNTED]:
            self.statistics.stall_seconds += time.perf_counter() - started
        return packed, fetched.memory.exchange


class _End:
    """Put into the queue last: the loader is exhausted, or it raised."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class MicroBatchStream(Iterator[Batch]):
    """Iterator with a reading thread behind it, started by the first ``next``; see :meth:`LookAhead.stream`."""

    def __init__(self, look_ahead: LookAhead, batches: Iterable[Batch], chunk: int, counted: bool) -> None:
        self._look_ahead, self._batches, self._chunk, self._counted = look_ahead, batches, chunk, counted
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=look_ahead.depth)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._last: int | None = None  # number of the batch yielded last
        # The thread holds no reference to the stream, so dropping the stream ends the thread.
        weakref.finalize(self, self._stop.set)

    def __iter__(self) -> MicroBatchStream:
        return self

    def __next__(self) -> Batch:
        if self._thread is None:
            prepare = functools.partial(self._look_ahead.prepare, chunk=self._chunk, counted=self._counted)
            arguments = (prepare, iter(self._batches), self._queue, self._stop)
            self._thread = threading.Thread(target=_read_ahead, args=arguments, name="graft-look-ahead", daemon=True)
            _readers[self._thread] = self._stop
            self._thread.start()
        started = time.perf_counter()
        item = self._queue.get()
        waited = time.perf_counter() - started
        if isinstance(item, _End):
            self._queue.put(item)
            raise StopIteration if item.error is None else item.error
        batch, prepared = item
        self._look_ahead.drop(self._last)  # not taken in an iteration that Megatron skips
        self._last = batch[SEQUENCE_NUMBER]
        self._look_ahead.hold(self._last, prepared)
        if self._counted:
            self._look_ahead.count(prepared, waited)
        return batch


def _read_ahead(
    prepare: Callable[[Batch], Any], batches: Iterator[Batch], out: queue.Queue[Any], stop: threading.Event
) -> None:
    end = _End(None)
    try:
        for batch in batches:
            item = prepare(batch)
            if not _put(out, item, stop):
                break
    except BaseException as error:  # the training thread must see it, whatever it is
        end = _End(error)
    _put(out, end, stop)
    _readers.pop(threading.current_thread(), None)


@atexit.register
def _stop_readers() -> None:
    """End the threads before the interpreter does: it would abort the process if one were in native code by then."""
    readers = dict(_readers)
    for stop in readers.values():
        stop.set()
    for reader in readers:
        reader.join(_PARTING_SECONDS)


def _put(out: queue.Queue[Any], item: Any, stop: threading.Event) -> bool:
    """Put, but give up when told to stop."""
    while not stop.is_set():
        try:
            out.put(item, timeout=_PATIENCE_SECONDS)
            return True
        except queue.Full:
            continue
    return False
