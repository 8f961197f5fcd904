"""Sizes of a bank's files, to the byte, from the definitions of ``docs/format.md``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_graft.bank.row_layout import ROW_DTYPES

_PAGE_BYTES = 4096
_SHARD_BYTES = 1 << 32
_BUCKET_BYTES, _BUCKET_NODES, _GUARD_BUCKETS = 64, 5, 31
_LANE_BITS = 26


@dataclass(frozen=True, kw_only=True)
class BankBytes:
    """Sizes of a bank's files, without its manifest of a few kB."""

    keys: int
    index: int
    rows: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.keys + self.index + self.rows


def bank_bytes(
    *, num_rows: int, entries: Mapping[int, int], nodes: int, vocab_size: int, widths: Sequence[int], row_dtype: str
) -> BankBytes:
    """Sizes of the files of a bank.

    They are exact as long as no node of the index is displaced too far, which does not happen to real keys.

    Args:
        num_rows: N.
        entries: order -> nodes of the index, keys and phantoms, from the shortest order of a key to the longest; the
            value at order 1 is not used.
        nodes: N and the phantoms.
        vocab_size: V.
        widths: elements of a row from each donor layer.
        row_dtype: one of ``bank.row_layout.ROW_DTYPES``.
    """
    dtype = ROW_DTYPES[row_dtype]
    row_bytes = [width * dtype.element_bytes + 4 * dtype.scaled for width in widths]
    shards = math.ceil(num_rows / max(1, _SHARD_BYTES // max(row_bytes)))
    return BankBytes(
        keys=_PAGE_BYTES + num_rows * (8 + 4 * max(entries) + 1),
        index=_index_bytes(entries, nodes, vocab_size),
        rows=num_rows * sum(row_bytes) + len(widths) * shards * _PAGE_BYTES,
    )


def _index_bytes(entries: Mapping[int, int], nodes: int, vocab_size: int) -> int:
    """The header, then one section an order, each at a multiple of a page."""
    token_bits = max(1, (vocab_size - 1).bit_length())
    key_bits = max((nodes - 1).bit_length(), token_bits) + token_bits
    fewest = 1 << max(0, key_bits - _LANE_BITS)
    size = _PAGE_BYTES
    if min(entries) == 1:
        size += 4 * vocab_size
    for order in range(2, max(entries) + 1):
        buckets = max(math.ceil(entries.get(order, 0) / _BUCKET_NODES), fewest)
        size = math.ceil(size / _PAGE_BYTES) * _PAGE_BYTES + (buckets + _GUARD_BUCKETS) * _BUCKET_BYTES
    return size
