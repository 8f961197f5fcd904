"""Token ids of one micro-batch -> the packed memory that its sites will read: lookup, duplicate removal, gather.

Shapes: B sequences, S positions of the whole sequence, s positions of this rank's slice.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np
import torch

from megatron_graft.bank.reader import Bank
from megatron_graft.bank.unique import unique_rows
from megatron_graft.data.microbatch import MicroBatchMemory
from megatron_graft.lookup.index import SuffixIndex
from megatron_graft.ngram.windows import positions_in_document


@dataclass(frozen=True, kw_only=True)
class SequenceSlice:
    """Which of ``parts`` even slices of the sequence a rank works on (sequence parallelism), in rank order."""

    part: int = 0
    parts: int = 1

    def of(self, array_BS: np.ndarray) -> np.ndarray:
        """This rank's ``[B, s]`` of an array ``[B, S]``."""
        length = array_BS.shape[1] // self.parts
        return array_BS[:, self.part * length : (self.part + 1) * length]


@dataclass(frozen=True)
class Fetched:
    """A micro-batch's memory and what was counted on the way.

    Attributes:
        memory: host-side memory.
        order_counts: int64 ``[max_order + 1]``, positions by length of their match; entry 0 counts misses.
        unique_rows: number of distinct rows gathered.
        seconds: time it took.
    """

    memory: MicroBatchMemory
    order_counts: np.ndarray
    unique_rows: int
    seconds: float


class _Scratch(threading.local):
    """One thread's buffers, kept from call to call; made anew only for a micro-batch of another shape."""

    def __init__(self) -> None:
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def fit(self, whole: tuple[int, ...], slice_: tuple[int, ...]) -> _Scratch:
        """Have ``rows_BS`` and ``orders_BS`` of shape ``whole``, and the other three of shape ``slice_``."""
        if self._shapes != (whole, slice_):
            self.rows_BS = np.empty(whole, dtype=np.int64)
            self.orders_BS = np.empty(whole, dtype=np.uint8)
            self.rows_Bs = np.empty(slice_, dtype=np.int64)
            self.unique_Bs = np.empty(slice_, dtype=np.int64)
            self.equal_Bs = np.empty(slice_, dtype=np.bool_)
            self._shapes = (whole, slice_)
        return self


class MemoryFetcher:
    """Looks up, removes duplicates, gathers. Any number of threads may use it at once.

    What it returns is fresh memory; between calls it keeps scratch only, each thread its own.

    Args:
        bank: the open bank.
        index: its suffix index.
        sequence_slice: the positions that this rank's sites work on.
        pin: allocate page-locked memory, for an asynchronous copy to a CUDA device.
    """

    def __init__(self, bank: Bank, index: SuffixIndex, sequence_slice: SequenceSlice, *, pin: bool = False) -> None:
        self.bank, self.index, self.slice, self.pin = bank, index, sequence_slice, pin
        self._scratch = _Scratch()

    def fetch(self, tokens_BS: torch.Tensor, sequence_number: int) -> Fetched:
        """The memory of one micro-batch.

        Args:
            tokens_BS: int64 ``[B, S]`` token ids of whole sequences: the slice is taken *after* the lookup, so an
                n-gram may begin before it.
            sequence_number: number of the micro-batch, kept in the memory's header.
        """
        started = time.perf_counter()
        tokens = np.ascontiguousarray(tokens_BS.numpy())
        sequences, positions = self.slice.of(tokens).shape
        scratch = self._scratch.fit(tokens.shape, (sequences, positions))
        self.index.lookup(tokens, eod=self.bank.eod, rows_out=scratch.rows_BS, orders_out=scratch.orders_BS)
        memory = MicroBatchMemory.allocate(sequence_number, sequences, positions, self.bank.row_layout, pin=self.pin)
        memory.position_BS.numpy()[:] = self.slice.of(positions_in_document(tokens, self.bank.eod))
        memory.order_BS.numpy()[:] = self.slice.of(scratch.orders_BS)
        found = self._gather(scratch, memory)
        counts = self._count_orders(memory.order_BS.numpy(), scratch.equal_Bs)
        return Fetched(memory, counts, found, time.perf_counter() - started)

    def _gather(self, scratch: _Scratch, memory: MicroBatchMemory) -> int:
        """Fill the rows and the inverse of a memory; return how many distinct rows there are."""
        np.copyto(scratch.rows_Bs, self.slice.of(scratch.rows_BS))
        unique, inverse = scratch.unique_Bs.reshape(-1), memory.inverse_BS.numpy().reshape(-1)
        found = unique_rows(scratch.rows_Bs.reshape(-1), unique, inverse, self.bank.gather_implementation)
        self.bank.gather(unique[:found], memory.rows_PR.numpy()[1 : 1 + found])
        memory.header[5] = 1 + found
        return found

    def _count_orders(self, orders_Bs: np.ndarray, equal_Bs: np.ndarray) -> np.ndarray:
        counts = np.empty(self.bank.max_order + 1, dtype=np.int64)
        for order in range(len(counts)):
            counts[order] = np.count_nonzero(np.equal(orders_Bs, order, out=equal_Bs))
        return counts
