"""Rows in a smaller type: what is stored for a row, and by how much its values change.

Shapes: N rows, D width of one donor layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron_graft.bank.bf16 import float32_from_bf16
from megatron_graft.errors import ConfigError

BUILD_DTYPES = ("bfloat16", "float16", "int8")
"""What a bank can be built as; int8 is made of bfloat16 rows by :func:`stored_as`."""
_INT8_MAX = np.float32(127)
_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class StoredRows:
    """Rows as ``write_bank`` takes them.

    Attributes:
        row_dtype: one of :data:`~megatron_graft.bank.row_layout.ROW_DTYPES`.
        layers: donor layer -> ``[N, D]``.
        scales: donor layer -> float32 ``[N]``; empty if the row dtype has none.
    """

    row_dtype: str
    layers: Mapping[int, np.ndarray]
    scales: Mapping[int, np.ndarray] = field(default_factory=dict)


def stored_as(row_dtype: str, layers: Mapping[int, np.ndarray]) -> StoredRows:
    """Bring bfloat16 rows into the type that a bank is to hold.

    Args:
        row_dtype: ``bfloat16``, which they are already, or ``int8``.
        layers: donor layer -> uint16 ``[N, D]``, bfloat16 bits, finite.

    Raises:
        ConfigError: rows cannot be brought into that type.
    """
    if row_dtype == "bfloat16":
        return StoredRows(row_dtype=row_dtype, layers=layers)
    if row_dtype != "int8":
        raise ConfigError("row_dtype", "cannot be built", got=row_dtype, expected="bfloat16 or int8")
    pairs = {layer: _int8_chunks(rows) for layer, rows in layers.items()}
    return StoredRows(
        row_dtype=row_dtype,
        layers={layer: elements for layer, (elements, _) in pairs.items()},
        scales={layer: scales for layer, (_, scales) in pairs.items()},
    )


def quantise_int8(values_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 with one scale a row: the row's largest magnitude becomes 127.

    A value ``element * scale`` differs from the given one by at most ``scale / 2`` and a few units in the last place of
    float32, that is, by less than 0.4 % of the row's largest magnitude.

    Args:
        values_ND: float32 ``[N, D]``, finite.

    Returns:
        elements int8 ``[N, D]`` in -127..127 and scales float32 ``[N]``; both 0 for a row of zeros.
    """
    scales_N = np.abs(values_ND).max(axis=1, initial=0) / _INT8_MAX
    # Below the normal numbers a scale is too coarse to divide by; such a row is nothing but zeros to any reader.
    scales_N[scales_N < np.finfo(np.float32).tiny] = 0
    scaled_ND = np.divide(values_ND, scales_N[:, None], out=np.zeros_like(values_ND), where=scales_N[:, None] > 0)
    return np.clip(np.rint(scaled_ND), -_INT8_MAX, _INT8_MAX).astype(np.int8), scales_N


def _int8_chunks(rows_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for bfloat16 bits, without a float32 copy of them all."""
    elements_ND = np.empty(rows_ND.shape, dtype=np.int8)
    scales_N = np.empty(len(rows_ND), dtype=np.float32)
    for begin in range(0, len(rows_ND), _CHUNK_ROWS):
        chunk = slice(begin, begin + _CHUNK_ROWS)
        elements_ND[chunk], scales_N[chunk] = quantise_int8(float32_from_bf16(rows_ND[chunk]))
    return elements_ND, scales_N
