"""The checks before any token is read, so that all implementations of lookup refuse the same input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_graft.bank.arrays import ArrayError, check_array, check_no_overlap


@dataclass(frozen=True, kw_only=True)
class LookupArguments:
    """Arrays that are as :meth:`SuffixIndex.lookup` documents them; the outputs are always there."""

    tokens_BS: np.ndarray
    document_starts_BS: np.ndarray | None
    rows_BS: np.ndarray
    orders_BS: np.ndarray


def check_arguments(
    tokens_BS: np.ndarray,
    document_starts_BS: np.ndarray | None,
    rows_out: np.ndarray | None,
    orders_out: np.ndarray | None,
) -> LookupArguments:
    """Check a lookup's arrays, and allocate the outputs that were not given.

    Raises:
        ArrayError: an array has the wrong dtype, shape or layout, or an output overlaps another array.
    """
    check_array("tokens_BS", tokens_BS, dtypes=[np.int32, np.int64], shape=(None, None))
    shape = tokens_BS.shape
    inputs = [("tokens_BS", tokens_BS)]
    if document_starts_BS is not None:
        check_array("document_starts_BS", document_starts_BS, dtypes=[np.bool_], shape=shape)
        inputs.append(("document_starts_BS", document_starts_BS))
    rows_BS = np.empty(shape, dtype=np.int64) if rows_out is None else rows_out
    orders_BS = np.empty(shape, dtype=np.uint8) if orders_out is None else orders_out
    check_array("rows_out", rows_BS, dtypes=[np.int64], shape=shape, writable=True)
    check_array("orders_out", orders_BS, dtypes=[np.uint8], shape=shape, writable=True)
    for name, array in inputs:
        check_no_overlap("rows_out", rows_BS, name, array)
        check_no_overlap("orders_out", orders_BS, name, array)
    check_no_overlap("orders_out", orders_BS, "rows_out", rows_BS)
    return LookupArguments(
        tokens_BS=tokens_BS, document_starts_BS=document_starts_BS, rows_BS=rows_BS, orders_BS=orders_BS
    )


class IndexState(Protocol):
    """What the checks want to know of a lookup's state."""

    @property
    def index(self) -> object:
        """The index that started it."""
        ...

    @property
    def sequences(self) -> int:
        """B."""
        ...


def check_step_arguments(
    index: object,
    state: IndexState,
    tokens_B: np.ndarray,
    rows_out: np.ndarray | None,
    orders_out: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Check state and arrays of one step of ``index``; return its outputs, allocated if not given.

    Raises:
        ArrayError: the state is of another index, an array has the wrong dtype, shape or layout, or an output overlaps
            another array.
    """
    if state.index is not index:
        raise ArrayError("state", "was started by another index", remedy="Pass one that start() of this index gave.")
    sequences = state.sequences
    check_array("tokens_B", tokens_B, dtypes=[np.int32, np.int64], shape=(sequences,))
    rows_B = np.empty(sequences, dtype=np.int64) if rows_out is None else rows_out
    orders_B = np.empty(sequences, dtype=np.uint8) if orders_out is None else orders_out
    check_array("rows_out", rows_B, dtypes=[np.int64], shape=(sequences,), writable=True)
    check_array("orders_out", orders_B, dtypes=[np.uint8], shape=(sequences,), writable=True)
    for name, array in (("rows_out", rows_B), ("orders_out", orders_B)):
        check_no_overlap(name, array, "tokens_B", tokens_B)
    check_no_overlap("orders_out", orders_B, "rows_out", rows_B)
    return rows_B, orders_B


def check_parents(parents_B: np.ndarray) -> np.ndarray:
    """Check the numbers of sequences that a state is reordered by; return them as int64.

    Raises:
        ArrayError: they have the wrong dtype, shape or layout.
    """
    return check_array("parents_B", parents_B, dtypes=[np.int32, np.int64], shape=(None,)).astype(np.int64)
