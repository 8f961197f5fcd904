"""Everything the memory sites of one rank need for one micro-batch, packed into a single tensor.

One tensor, because it travels through the model as an argument (``context``) and Megatron's activation recompute saves
tensors only: a replay of the forward pass then sees the memory of *its* micro-batch, whatever schedule runs.

Shapes: B sequences, S positions of this rank, P = B * S, R bytes of a row, D its elements. The layout depends on B, S
and the layout of the bank's rows alone, so the model finds its sections without asking the device for a number.

======== ========= =============== ====================================================================
section  dtype     shape           content
======== ========= =============== ====================================================================
header   int64     [8]             magic, sequence number, B, S, D, rows in use, R, a reserved word (0)
position int32     [B, S]          distance from the document's first token
inverse  int32     [B, S]          index into ``rows`` of the position's row; 0 at a miss
order    uint8     [B, S]          length of the matched n-gram; 0 at a miss
rows     uint8     [P + 1, R]      row 0 is zero; then the distinct rows of the micro-batch, then unspecified
======== ========= =============== ====================================================================

Rows travel as the bank stores them (:class:`~megatron_graft.bank.row_layout.RowLayout`). They come last, so that only
their used front needs to be copied to a device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_graft.bank.row_layout import RowLayout
from megatron_graft.data.row_values import select_rows

MAGIC = 0x6D67_6D65_6D02
_HEADER_WORDS = 8
_ALIGNMENT = 64


@dataclass(frozen=True)
class _Layout:
    """Byte offsets of the sections for given B, S and R."""

    sequences: int
    positions: int
    row_bytes: int

    @property
    def num_positions(self) -> int:
        return self.sequences * self.positions

    def offsets(self) -> dict[str, int]:
        sizes = {
            "header": _HEADER_WORDS * 8,
            "position": self.num_positions * 4,
            "inverse": self.num_positions * 4,
            "order": self.num_positions,
            "rows": (self.num_positions + 1) * self.row_bytes,
        }
        offsets, end = {}, 0
        for name, size in sizes.items():
            offsets[name] = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = offsets[name] + size
        offsets["end"] = end
        return offsets


@dataclass(frozen=True)
class MicroBatchMemory:
    """Views into one packed tensor. Build with :meth:`allocate` (host side) or :meth:`unpack` (in the model).

    Attributes:
        row_layout: where a row has what.
        packed: uint8 ``[bytes]``, the tensor that travels.
        header: int64 ``[8]``.
        position_BS: int32, distance from the document's first token.
        inverse_BS: int32, index into ``rows_PR``; 0 at a miss.
        order_BS: uint8, length of the matched n-gram; 0 at a miss.
        rows_PR: uint8 ``[P + 1, R]``, rows as the bank stores them; row 0 is zero.
    """

    row_layout: RowLayout
    packed: torch.Tensor
    header: torch.Tensor
    position_BS: torch.Tensor
    inverse_BS: torch.Tensor
    order_BS: torch.Tensor
    rows_PR: torch.Tensor

    @classmethod
    def allocate(
        cls, sequence_number: int, sequences: int, positions: int, row_layout: RowLayout, *, pin: bool = False
    ) -> MicroBatchMemory:
        """A host-side memory with header written and row 0 zeroed; the other sections are for the caller to fill."""
        row_bytes = row_layout.row_bytes()
        size = _Layout(sequences, positions, row_bytes).offsets()["end"]
        packed = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
        memory = cls.unpack(packed, sequences, positions, row_layout)
        shape = [sequences, positions, row_layout.row_dim]
        memory.header[:] = torch.tensor([MAGIC, sequence_number, *shape, 1, row_bytes, 0])
        memory.rows_PR[0] = 0
        return memory

    @classmethod
    def unpack(cls, packed: torch.Tensor, sequences: int, positions: int, row_layout: RowLayout) -> MicroBatchMemory:
        """Views of a packed tensor whose B, S and rows are known; reads nothing, so it never waits for a device.

        Raises:
            ValueError: the tensor's size does not fit them.
        """
        row_bytes = row_layout.row_bytes()
        offsets = _Layout(sequences, positions, row_bytes).offsets()
        if packed.dtype != torch.uint8 or packed.numel() != offsets["end"]:
            raise ValueError(
                f"packed memory has {packed.numel()} x {packed.dtype}, but {sequences} sequences of {positions} "
                f"positions with rows of {row_layout.row_dim} x {row_layout.dtype.name} need {offsets['end']} x "
                "torch.uint8"
            )
        shape, count = (sequences, positions), sequences * positions

        def section(name: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
            start = offsets[name]
            return packed[start : start + numel * dtype.itemsize].view(dtype)

        return cls(
            row_layout=row_layout,
            packed=packed,
            header=section("header", _HEADER_WORDS, torch.int64),
            position_BS=section("position", count, torch.int32).view(shape),
            inverse_BS=section("inverse", count, torch.int32).view(shape),
            order_BS=section("order", count, torch.uint8).view(shape),
            rows_PR=section("rows", (count + 1) * row_bytes, torch.uint8).view(count + 1, row_bytes),
        )

    def rows_SBD(self, dtype: torch.dtype) -> torch.Tensor:
        """The values of every position's row, ``[S, B, D]`` of ``dtype``; zeros at a miss. Never waits for a device."""
        return select_rows(self.row_layout, self.rows_PR, self.inverse_BS.t(), dtype)

    @property
    def sequence_number(self) -> int:
        """Number of the micro-batch (host side only: on a device this would wait for it)."""
        return int(self.header[1])

    def used_bytes(self) -> int:
        """How many leading bytes of ``packed`` carry content (host side only)."""
        return int(self.rows_PR.storage_offset()) + int(self.header[5]) * self.row_layout.row_bytes()
