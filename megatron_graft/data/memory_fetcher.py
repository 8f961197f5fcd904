"""Token ids of one micro-batch -> the packed memory that its sites will read: lookup, duplicate removal, gather.

Shapes: B sequences, S positions of the whole sequence, s positions of this rank's slice, D width of a row.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from megatron_graft.bank.reader import Bank
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


class MemoryFetcher:
    """Looks up, removes duplicates, gathers. Holds no state between calls, so any thread may use it.

    Args:
        bank: the open bank.
        index: its suffix index.
        sequence_slice: the positions that this rank's sites work on.
        pin: allocate page-locked memory, for an asynchronous copy to a CUDA device.
    """

    def __init__(self, bank: Bank, index: SuffixIndex, sequence_slice: SequenceSlice, *, pin: bool = False) -> None:
        self.bank, self.index, self.slice, self.pin = bank, index, sequence_slice, pin

    def fetch(self, tokens_BS: torch.Tensor, sequence_number: int) -> Fetched:
        """The memory of one micro-batch.

        Args:
            tokens_BS: int64 ``[B, S]`` token ids of whole sequences: the slice is taken *after* the lookup, so an
                n-gram may begin before it.
            sequence_number: number of the micro-batch, kept in the memory's header.
        """
        started = time.perf_counter()
        tokens = np.ascontiguousarray(tokens_BS.numpy())
        rows_BS, orders_BS = self.index.lookup(tokens, eod=self.bank.eod)
        rows_Bs, orders_Bs = self.slice.of(rows_BS), self.slice.of(orders_BS)
        memory = MicroBatchMemory.allocate(
            sequence_number, rows_Bs.shape[0], rows_Bs.shape[1], self.bank.row_dim, pin=self.pin
        )
        memory.position_BS.numpy()[:] = self.slice.of(positions_in_document(tokens, self.bank.eod))
        memory.order_BS.numpy()[:] = orders_Bs
        unique, inverse = np.unique(rows_Bs, return_inverse=True)
        misses = int(unique.size > 0 and unique[0] < 0)
        found = unique[misses:]
        memory.inverse_BS.numpy()[:] = inverse.reshape(rows_Bs.shape) + (1 - misses)
        self.bank.gather(found, memory.row_bits()[1 : 1 + found.size])
        memory.header[5] = 1 + found.size
        counts = np.bincount(orders_Bs.ravel(), minlength=self.bank.max_order + 1)
        return Fetched(memory, counts, int(found.size), time.perf_counter() - started)
