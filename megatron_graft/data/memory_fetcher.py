"""Token ids of one micro-batch -> the packed memory that its sites read: lookup, hashing, duplicate removal, gather.

Shapes: B sequences, S positions of the whole sequence, s positions of this rank, h heads that a rank reads.

Every rank sees the whole sequences, so each knows which rows of its share of a trainable table every other rank will
ask for. No row number is ever sent, and the sizes of the exchange are known on the host before the step begins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from megatron_graft.bank.reader import Bank
from megatron_graft.bank.unique import unique_rows
from megatron_graft.data.memory_layout import EngramRows, MemoryLayout
from megatron_graft.data.microbatch import MicroBatchMemory
from megatron_graft.lookup.hashing import NgramHasher
from megatron_graft.lookup.index import SuffixIndex
from megatron_graft.ngram.windows import positions_in_document


@dataclass
class FetchCounts:
    """What was counted while fetching; sums over micro-batches.

    Attributes:
        orders: for each bank of the run int64 ``[max_order + 1]``, this rank's positions by length of their match
            (entry 0: misses); all zero for a bank that the rank does not read.
        graft_rows: distinct rows found in banks, within each micro-batch and bank.
        engram_requests: rows of hashed tables that this rank's positions read.
        engram_rows: distinct ones among them, within each micro-batch and table.
    """

    orders: tuple[np.ndarray, ...] = ()
    graft_rows: int = 0
    engram_requests: int = 0
    engram_rows: int = 0

    def add(self, other: FetchCounts) -> None:
        """Add the counts of another micro-batch of the same run."""
        for mine, its in zip(self.orders, other.orders, strict=True):
            mine += its
        self.graft_rows += other.graft_rows
        self.engram_requests += other.engram_requests
        self.engram_rows += other.engram_rows


@dataclass(frozen=True)
class Fetched:
    """A micro-batch's memory, host side; what was counted; and the seconds it took."""

    memory: MicroBatchMemory
    counts: FetchCounts
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MemorySources:
    """Where memory comes from.

    Attributes:
        banks: the run's banks, each with its suffix index.
        hashers: by layer number; at least those of the layout's tables.
        eod: id of the end-of-document token, or None.
        implementation: of duplicate removal: the compiled extension or NumPy. Banks, indexes and hashers have theirs.
    """

    banks: Sequence[tuple[Bank, SuffixIndex]] = ()
    hashers: Mapping[int, NgramHasher] = field(default_factory=dict)
    eod: int | None = None
    implementation: Literal["native", "reference"] = "native"


class _Scratch(threading.local):
    """One thread's buffers by name, kept from call to call; made anew only for another shape."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shape:
            buffer = self._buffers[name] = np.empty(shape, dtype=dtype)
        return buffer


class MemoryFetcher:
    """Looks up, hashes, removes duplicates, gathers. Any number of threads may use it at once.

    What it returns is fresh memory; between calls it keeps scratch only, each thread its own.

    Args:
        sources: where memory comes from.
        layout: what the sites of this rank read.
        pin: allocate page-locked memory, for an asynchronous copy to a CUDA device.
    """

    def __init__(self, sources: MemorySources, layout: MemoryLayout, *, pin: bool = False) -> None:
        self.sources, self.layout, self.pin = sources, layout, pin
        self._scratch = _Scratch()
        self._bounds = [layout.partition.table_bounds(num_rows) for num_rows in layout.exchanged_rows]

    def no_counts(self) -> FetchCounts:
        """Counts of nothing, to add to."""
        return FetchCounts(orders=tuple(np.zeros(bank.max_order + 1, np.int64) for bank, _ in self.sources.banks))

    def fetch(self, tokens_BS: torch.Tensor, sequence_number: int) -> Fetched:
        """The memory of one micro-batch.

        Args:
            tokens_BS: int64 ``[B, S]`` token ids of whole sequences: a rank's positions are taken *after* lookup and
                hashing, so an n-gram may begin before them.
            sequence_number: number of the micro-batch, kept in the memory's header.
        """
        started = time.perf_counter()
        tokens = np.ascontiguousarray(tokens_BS.numpy())
        partition = self.layout.partition
        memory = MicroBatchMemory.allocate(
            self.layout, sequence_number, len(tokens), partition.num_positions(tokens.shape[1]), pin=self.pin
        )
        memory.position_BS.numpy()[:] = partition.part(positions_in_document(tokens, self.sources.eod))
        counts = self.no_counts()
        orders_of = {bank: self._look_up(bank, tokens, memory, counts) for bank in self.layout.banks}
        for number, engram in enumerate(self.layout.engrams):
            skip_BS = None if engram.skip_hits_of is None else orders_of[engram.skip_hits_of] > 0
            self._request(number, engram, tokens, skip_BS, memory, counts)
        return Fetched(memory, counts, time.perf_counter() - started)

    def _look_up(self, number: int, tokens: np.ndarray, memory: MicroBatchMemory, counts: FetchCounts) -> np.ndarray:
        """Fill everything that comes from one bank; return the orders ``[B, S]`` of whole sequences."""
        bank, index = self.sources.banks[number]
        partition = self.layout.partition
        rows_BS = self._scratch.get("rows", tokens.shape, np.int64)
        orders_BS = self._scratch.get(f"orders.{number}", tokens.shape, np.uint8)
        index.lookup(tokens, eod=self.sources.eod, rows_out=rows_BS, orders_out=orders_BS)
        memory.order_BS(number).numpy()[:] = partition.part(orders_BS)
        counts.orders[number][:] = _count_orders(memory.order_BS(number).numpy(), bank.max_order)
        exchange = self.layout.exchange_of_bank(number)
        if exchange is None:
            distinct, inverse = self._distinct("mine", partition.part(rows_BS))
        else:
            distinct, inverse = self._share_out(exchange, rows_BS[..., np.newaxis], memory)
        memory.inverse_BS(number).numpy().reshape(-1)[:] = inverse
        for graft, slice_ in enumerate(self.layout.grafts):
            if slice_.bank == number:
                bank.gather(distinct, memory.rows_PR(graft).numpy()[1 : 1 + len(distinct)], slice_.columns)
                memory.set_used(f"rows.{graft}", 1 + len(distinct))
        counts.graft_rows += len(distinct)
        return orders_BS

    def _request(
        self,
        number: int,
        engram: EngramRows,
        tokens: np.ndarray,
        skip_BS: np.ndarray | None,
        memory: MicroBatchMemory,
        counts: FetchCounts,
    ) -> None:
        """Fill everything of one hashed table: what each rank asks of this one, and where this rank's rows will be."""
        hasher = self.sources.hashers[engram.layer_number]
        rows_BSK = self._scratch.get("hashed", (*tokens.shape, engram.reading.num_heads), np.int64)
        hasher.rows(tokens, rows_out=rows_BSK)
        if skip_BS is not None:
            rows_BSK[skip_BS] = -1
        distinct, inverse = self._share_out(number, rows_BSK, memory)
        memory.reads_BSh(number).numpy().reshape(-1)[:] = inverse
        counts.engram_requests += int(np.count_nonzero(inverse))
        counts.engram_rows += len(distinct)

    def _share_out(self, number: int, rows_BSK: np.ndarray, memory: MicroBatchMemory) -> tuple[np.ndarray, np.ndarray]:
        """Fill an exchange: what each rank asks of this one, of the table rows that whole sequences read.

        Returns this rank's own part as :meth:`_distinct` does: received rows arrive in that order, since the shares of
        the ranks follow one another.
        """
        partition, bounds = self.layout.partition, self._bounds[number]
        num_heads = rows_BSK.shape[2]
        parts = []
        for rank in range(partition.size):
            heads = slice(*partition.heads(num_heads, rank))
            wanted = partition.part(rows_BSK[..., heads], rank)
            parts.append(self._distinct(f"wanted.{num_heads}.{rank}", wanted))
        requests, sent = memory.requests(number).numpy(), 0
        for rank, (distinct, _) in enumerate(parts):
            places = np.searchsorted(distinct, bounds)
            low, high = (int(place) for place in places[partition.rank : partition.rank + 2])
            requests[sent : sent + high - low] = distinct[low:high] - bounds[partition.rank]
            sent += high - low
            memory.exchange[number, 0, rank] = high - low
            if rank == partition.rank:
                memory.exchange[number, 1] = torch.from_numpy(np.diff(places))
        memory.set_used(f"requests.{number}", sent)
        return parts[partition.rank]

    def _distinct(self, name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The distinct ones of some row numbers, and where among them each is found; scratch of that name.

        Returns:
            int64 ``[n]`` ascending, without negative ones; and int32 ``[rows.size]`` places from 1, 0 for a negative
            one.
        """
        copy = self._scratch.get(name, rows.shape, np.int64)
        np.copyto(copy, rows)
        unique = self._scratch.get(f"{name}.unique", (rows.size,), np.int64)
        inverse = self._scratch.get(f"{name}.inverse", (rows.size,), np.int32)
        found = unique_rows(copy.reshape(-1), unique, inverse, self.sources.implementation)
        return unique[:found], inverse


def _count_orders(orders_BS: np.ndarray, max_order: int) -> np.ndarray:
    return np.bincount(orders_BS.reshape(-1), minlength=max_order + 1)
