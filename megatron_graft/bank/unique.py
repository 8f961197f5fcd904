"""Removing duplicate row numbers before a gather, so that no row is read or sent twice."""

from __future__ import annotations

from typing import get_args

import numpy as np

from megatron_graft.bank.arrays import check_array, check_choice, check_no_overlap
from megatron_graft.bank.extension import load_extension
from megatron_graft.bank.rows import GatherImplementation


def unique_rows(
    rows: np.ndarray,
    unique_out: np.ndarray,
    inverse_out: np.ndarray,
    implementation: GatherImplementation = "native",
) -> int:
    """Find the distinct row numbers and, for each position, its place among them.

    Args:
        rows: int64 ``[M]`` row numbers; a negative one is a miss.
        unique_out: int64 ``[M]`` or longer, whose front is filled with the distinct row numbers, ascending; what
            lies behind them is unspecified.
        inverse_out: int32 ``[M]``, filled with 0 at a miss and k + 1 where ``rows`` holds the k-th distinct number.
        implementation: the compiled extension, or NumPy.

    Returns:
        How many distinct numbers there are.

    Raises:
        ArrayError: a wrong dtype, shape or layout, or an output overlaps another array.
        ConfigError: ``implementation`` is unknown.
        NativeExtensionError: ``"native"``, and the extension is not built.
    """
    check_choice("implementation", implementation, get_args(GatherImplementation))
    check_array("rows", rows, dtypes=[np.int64], shape=(None,))
    check_array("inverse_out", inverse_out, dtypes=[np.int32], shape=rows.shape, writable=True)
    check_array("unique_out", unique_out, dtypes=[np.int64], shape=(None,), writable=True)
    check_array("unique_out", unique_out[: len(rows)], dtypes=[np.int64], shape=rows.shape)
    check_no_overlap("unique_out", unique_out, "rows", rows)
    check_no_overlap("inverse_out", inverse_out, "rows", rows)
    check_no_overlap("inverse_out", inverse_out, "unique_out", unique_out)
    if implementation == "native":
        return int(load_extension().unique_rows(rows, unique_out, inverse_out))
    return _unique_rows_reference(rows, unique_out, inverse_out)


def _unique_rows_reference(rows: np.ndarray, unique_out: np.ndarray, inverse_out: np.ndarray) -> int:
    unique, inverse = np.unique(rows, return_inverse=True)
    misses = int(np.searchsorted(unique, 0))
    count = len(unique) - misses
    unique_out[:count] = unique[misses:]
    inverse_out[:] = np.maximum(inverse - misses + 1, 0)
    return count
