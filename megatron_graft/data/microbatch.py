"""Everything the memory sites of one rank need for one micro-batch, packed into a single tensor.

One tensor, because it travels through the model as an argument (``context``) and Megatron's activation recompute saves
tensors only: a replay of the forward pass then sees the memory of *its* micro-batch, whatever schedule runs. What the
host must know to start a collective, the number of table rows that go to and come from each rank, travels beside it as
a tensor that stays on the host (``context_mask``), so that nobody asks a device for a number.

Shapes: B sequences, c positions of this context-parallel rank, s of this rank, P = B * s, R bytes of a gathered row,
h of K heads of a hashed table that this rank reads (K = 1 for rows trained under a bank's keys), E exchanges of this
rank (of hashed tables, then of trained rows), T tensor-parallel ranks.

============== ========= =========== =============================================================================
section        dtype     shape       content
============== ========= =========== =============================================================================
header         int64     [8 + n]     magic, sequence number, B, s, four reserved words; then for each section of
                                     rows or requests how many of its rows are in use
position       int32     [B, s]      distance from the document's first token
order.<bank>   uint8     [B, s]      length of the matched n-gram; 0 at a miss
inverse.<bank> int32     [B, s]      index of the position's row, in ``rows`` or among the received ones; 0 at a miss
reads.<e>      int32     [B, s, h]   for a hashed table: index of each head's row among the received ones, from 1; 0
                                     reads nothing
rows.<g>       uint8     [P + 1, R]  row 0 is zero; then the distinct rows of the micro-batch, then unspecified
requests.<e>   int32     [B * c * K] rows of this rank's share of a table, for each rank in turn those that it asks
                                     for, ascending and distinct; then unspecified
============== ========= =========== =============================================================================

The layout depends on B, s and the :class:`MemoryLayout` alone, so the model finds its sections without reading the
header. Rows travel as the bank stores them. Of the last two kinds only the used front is copied to a device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_graft.data.memory_layout import MemoryLayout
from megatron_graft.data.row_values import select_rows

MAGIC = 0x6D67_6D65_6D03
_FIXED_WORDS = 8
_ALIGNMENT = 64


@dataclass(frozen=True)
class _Section:
    """Where a section of the packed tensor lies; ``row_bytes`` is set for one of which only the front is used."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    row_bytes: int = 0

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize


@functools.lru_cache(maxsize=64)
def _sections(layout: MemoryLayout, sequences: int, positions: int) -> dict[str, _Section]:
    """The sections of a packed tensor, in order."""
    shape, count = (sequences, positions), sequences * positions
    whole = count * layout.partition.sequence_parts
    kinds: list[tuple[str, tuple[int, ...], torch.dtype, int]] = [
        ("header", (_FIXED_WORDS + len(layout.grafts) + len(layout.exchanged_rows),), torch.int64, 0),
        ("position", shape, torch.int32, 0),
    ]
    for bank in layout.banks:
        kinds += [(f"order.{bank}", shape, torch.uint8, 0), (f"inverse.{bank}", shape, torch.int32, 0)]
    for number, engram in enumerate(layout.engrams):
        kinds.append((f"reads.{number}", (*shape, engram.heads[1] - engram.heads[0]), torch.int32, 0))
    for number, graft in enumerate(layout.grafts):
        row_bytes = graft.row_layout.row_bytes()
        kinds.append((f"rows.{number}", (count + 1, row_bytes), torch.uint8, row_bytes))
    heads = [*(engram.reading.num_heads for engram in layout.engrams), *(1 for _ in layout.trained)]
    for number, num_heads in enumerate(heads):
        kinds.append((f"requests.{number}", (whole * num_heads,), torch.int32, torch.int32.itemsize))
    sections, end = {}, 0
    for name, section_shape, dtype, row_bytes in kinds:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        sections[name] = _Section(start, section_shape, dtype, row_bytes)
        end = sections[name].end
    return sections


def content_bytes(
    layout: MemoryLayout, sequences: int, positions: int, *, rows: Sequence[float], requests: Sequence[float]
) -> float:
    """Bytes of a packed memory that are copied to a device, where so many rows of every kind are in use.

    Args:
        layout: what the micro-batch brings.
        sequences: B.
        positions: s.
        rows: for each of the layout's grafts, rows in use; row 0 counts.
        requests: for each exchange, rows that are asked for.
    """
    used = {f"rows.{number}": count for number, count in enumerate(rows)}
    used |= {f"requests.{number}": count for number, count in enumerate(requests)}
    sections = _sections(layout, sequences, positions)
    fixed = max(place.end for place in sections.values() if not place.row_bytes)
    return fixed + sum(count * sections[name].row_bytes for name, count in used.items())


def packed_bytes(layout: MemoryLayout, sequences: int, positions: int) -> int:
    """Size of the packed memory of B sequences of s positions, with room for a row at every position."""
    return next(reversed(_sections(layout, sequences, positions).values())).end


@dataclass(frozen=True)
class MicroBatchMemory:
    """Views into one packed tensor. Build with :meth:`allocate` (host side) or :meth:`unpack` (in the model).

    Attributes:
        layout: what the micro-batch brings.
        sequences: B.
        positions: s.
        packed: uint8 ``[bytes]``, the tensor that travels to the device.
        exchange: int64 ``[E, 2, T]`` on the host: for each exchange, how many rows this rank sends to each rank, and
            how many it receives from each.
    """

    layout: MemoryLayout
    sequences: int
    positions: int
    packed: torch.Tensor
    exchange: torch.Tensor

    @classmethod
    def allocate(
        cls, layout: MemoryLayout, sequence_number: int, sequences: int, positions: int, *, pin: bool = False
    ) -> MicroBatchMemory:
        """A host-side memory with header written and row 0 zeroed; the other sections are for the caller to fill."""
        size = packed_bytes(layout, sequences, positions)
        packed = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
        exchange = torch.zeros(len(layout.exchanged_rows), 2, layout.partition.size, dtype=torch.int64)
        memory = cls.unpack(layout, packed, exchange, sequences, positions)
        memory.header.zero_()
        memory.header[:4] = torch.tensor([MAGIC, sequence_number, sequences, positions])
        for graft in range(len(layout.grafts)):
            memory.rows_PR(graft)[0] = 0
        return memory

    @classmethod
    def unpack(
        cls, layout: MemoryLayout, packed: torch.Tensor, exchange: torch.Tensor, sequences: int, positions: int
    ) -> MicroBatchMemory:
        """Views of a packed tensor whose B, s and layout are known; reads nothing, so it never waits for a device.

        Raises:
            ValueError: the tensor's size does not fit them.
        """
        size = packed_bytes(layout, sequences, positions)
        if packed.dtype != torch.uint8 or packed.numel() != size:
            raise ValueError(
                f"packed memory has {packed.numel()} x {packed.dtype}, but {sequences} sequences of {positions} "
                f"positions with {len(layout.grafts)} reads of banks and {len(layout.exchanged_rows)} of tables need "
                f"{size} x torch.uint8"
            )
        return cls(layout, sequences, positions, packed, exchange)

    def section(self, name: str) -> torch.Tensor:
        """A section by its name in the module's table; writing to it writes to :attr:`packed`."""
        place = _sections(self.layout, self.sequences, self.positions)[name]
        return self.packed[place.start : place.end].view(place.dtype).view(place.shape)

    @property
    def header(self) -> torch.Tensor:
        """int64 ``[8 + n]``."""
        return self.section("header")

    @property
    def position_BS(self) -> torch.Tensor:
        """int32 ``[B, s]``, distance from the document's first token."""
        return self.section("position")

    def order_BS(self, bank: int) -> torch.Tensor:
        """uint8 ``[B, s]``, length of the n-gram matched in a bank; 0 at a miss."""
        return self.section(f"order.{bank}")

    def inverse_BS(self, bank: int) -> torch.Tensor:
        """int32 ``[B, s]``, index of each position's row among the gathered or received ones, from 1; 0 at a miss."""
        return self.section(f"inverse.{bank}")

    def rows_PR(self, graft: int) -> torch.Tensor:
        """uint8 ``[P + 1, R]``, rows as the bank stores them; row 0 is zero."""
        return self.section(f"rows.{graft}")

    def reads_BSh(self, engram: int) -> torch.Tensor:
        """int32 ``[B, s, h]``, index of each head's row among the received ones, from 1; 0 reads nothing."""
        return self.section(f"reads.{engram}")

    def requests(self, exchange: int) -> torch.Tensor:
        """int32 ``[n]``, rows of this rank's share that the ranks ask for, in the order of the ranks."""
        return self.section(f"requests.{exchange}")

    def graft_rows_SBD(self, graft: int, dtype: torch.dtype) -> torch.Tensor:
        """The values of every position's row, ``[s, B, D]`` of ``dtype``; zeros at a miss. Never waits for a device."""
        rows = self.layout.grafts[graft]
        return select_rows(rows.row_layout, self.rows_PR(graft), self.inverse_BS(rows.bank).t(), dtype)

    @property
    def sequence_number(self) -> int:
        """Number of the micro-batch (host side only: on a device this would wait for it)."""
        return int(self.header[1])

    def set_used(self, name: str, rows: int) -> None:
        """Say how many rows of a section of rows or requests are in use (host side only)."""
        self.header[self._used_word(name)] = rows

    def used(self, name: str) -> int:
        """How many rows of a section are in use (host side only)."""
        return int(self.header[self._used_word(name)])

    def used_ranges(self) -> list[tuple[int, int]]:
        """(first, end) of the bytes of :attr:`packed` that carry content (host side only)."""
        ranges, first_end = [], 0
        for name, place in _sections(self.layout, self.sequences, self.positions).items():
            if not place.row_bytes:
                first_end = place.end
            elif rows := self.used(name):
                ranges.append((place.start, place.start + rows * place.row_bytes))
        return [(0, first_end), *ranges]

    def _used_word(self, name: str) -> int:
        kind, _, number = name.partition(".")
        return _FIXED_WORDS + int(number) + (len(self.layout.grafts) if kind == "requests" else 0)
