"""Rows as bytes: the types of element a bank can hold, where a gathered row has what, and what its values are.

A row travels as it is stored; only tools, tests and the reference turn it into numbers here, in NumPy. Shapes: M rows,
D elements of a row over all donor layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_graft.bank.arrays import ArrayError
from megatron_graft.bank.bf16 import float32_from_bf16

WORD_BYTES = 4

Columns = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class RowDtype:
    """A type of row element.

    Attributes:
        name: as ``identity.row_dtype`` has it.
        tensor: the safetensors dtype.
        numpy: what an element is held as; types NumPy lacks are held as their bits.
        scaled: whether a value is its element times a float32 scale, one for every row and donor layer.
    """

    name: str
    tensor: str
    numpy: type[np.generic]
    scaled: bool = False

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return np.dtype(self.numpy).itemsize


ROW_DTYPES: Mapping[str, RowDtype] = {
    dtype.name: dtype
    for dtype in (
        RowDtype(name="bfloat16", tensor="BF16", numpy=np.uint16),
        RowDtype(name="float16", tensor="F16", numpy=np.float16),
        RowDtype(name="float32", tensor="F32", numpy=np.float32),
        RowDtype(name="int8", tensor="I8", numpy=np.int8, scaled=True),
        RowDtype(name="float8_e4m3", tensor="F8_E4M3", numpy=np.uint8, scaled=True),
    )
}


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """Where a gathered row has what.

    All donor layers' elements stand side by side, then zeros up to a multiple of 4 bytes, then, for a scaled type, one
    float32 scale for every donor layer.

    Attributes:
        dtype: of the elements.
        widths: elements of a row from each donor layer, in column order; of a slice, some may be 0.
    """

    dtype: RowDtype
    widths: tuple[int, ...]

    @property
    def row_dim(self) -> int:
        """D."""
        return sum(self.widths)

    def check_columns(self, columns: Columns | None) -> Columns:
        """``columns`` if they are a slice of a row that has elements; all columns for None.

        Raises:
            ArrayError: they are not.
        """
        first, end = (0, self.row_dim) if columns is None else columns
        if not 0 <= first < end <= self.row_dim:
            expected = f"0 <= first < end <= {self.row_dim}"
            raise ArrayError("columns", "are no columns of a row", got=[first, end], expected=expected)
        return first, end

    def row_bytes(self, columns: Columns | None = None) -> int:
        """Bytes of a gathered row, or of its elements ``columns[0]`` to ``columns[1]`` and all its scales."""
        first, end = self.check_columns(columns)
        return self._scales_at(end - first) + (WORD_BYTES * len(self.widths) if self.dtype.scaled else 0)

    def sliced(self, columns: Columns) -> RowLayout:
        """The layout of rows gathered with ``columns``: all scales come along, a donor layer may be left without width.

        Raises:
            ArrayError: they are no columns of a row.
        """
        self.check_columns(columns)
        size = self.dtype.element_bytes
        widths = tuple((end - first) // size for first, end in self.byte_ranges(columns))
        return RowLayout(dtype=self.dtype, widths=widths)

    def byte_ranges(self, columns: Columns | None = None) -> list[tuple[int, int]]:
        """For every donor layer, from where to where (in bytes) its stored row is wanted."""
        first, end = self.check_columns(columns)
        ranges, start = [], 0
        for width in self.widths:
            clipped = (min(max(column - start, 0), width) * self.dtype.element_bytes for column in (first, end))
            ranges.append((next(clipped), next(clipped)))
            start += width
        return ranges

    def values(self, packed: np.ndarray, columns: Columns | None = None) -> np.ndarray:
        """The numbers of gathered rows.

        Args:
            packed: uint8 ``[M, row_bytes(columns)]``, C-contiguous.
            columns: those that were gathered.

        Returns:
            float32 ``[M, elements]``; a scaled value is the float32 product of element and scale.
        """
        first, end = self.check_columns(columns)
        size = (end - first) * self.dtype.element_bytes
        elements = np.ascontiguousarray(packed[:, :size]).view(self.dtype.numpy)
        values = float32_from_elements(elements, self.dtype)
        if self.dtype.scaled:
            scales = np.ascontiguousarray(packed[:, self._scales_at(end - first) :]).view(np.float32)
            column = 0
            for layer, (begin, stop) in enumerate(self.byte_ranges(columns)):
                width = (stop - begin) // self.dtype.element_bytes
                values[:, column : column + width] *= scales[:, layer : layer + 1]
                column += width
        return values

    def _scales_at(self, elements: int) -> int:
        size = elements * self.dtype.element_bytes
        return size + -size % WORD_BYTES


def float32_from_elements(elements: np.ndarray, dtype: RowDtype) -> np.ndarray:
    """Stored elements (any shape) as float32, before any scale. Exact; always a new array."""
    if dtype.name == "bfloat16":
        return float32_from_bf16(elements)
    if dtype.name == "float8_e4m3":
        return _FLOAT8_E4M3_VALUES[elements]
    return elements.astype(np.float32)


def _float8_e4m3_values() -> np.ndarray:
    """float32 ``[256]``: the value of every bit pattern: 4 bits of exponent (bias 7), 3 of mantissa, no infinity."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, (bits & 7) / 8
    magnitude = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    magnitude[bits & 127 == 127] = np.nan
    return np.where(bits < 128, magnitude, -magnitude).astype(np.float32)


_FLOAT8_E4M3_VALUES = _float8_e4m3_values()
