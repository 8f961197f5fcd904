"""From a donor's states to a bank's rows: normalise, centre, normalise again, store; block by block.

Shapes: N rows, D width of one donor layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_graft.bank.bf16 import bf16_from_float32
from megatron_graft.bank.manifest import Processing
from megatron_graft.bank.row_layout import ROW_DTYPES
from megatron_graft.errors import ConfigError, DonorError
from megatron_graft.log import Progress

RMS_EPSILON = 1e-6
_BLOCK_ROWS = 1 << 14  # fixed: the order in which the mean is summed must not depend on anything


class DonorStates(Protocol):
    """The donor's states in bank order, read as often as needed."""

    @property
    def num_rows(self) -> int:
        """N."""

    def rows(self, layer: int, start: int, stop: int) -> np.ndarray:
        """float32 ``[stop - start, D]``, the caller's own."""


@dataclass(frozen=True, kw_only=True)
class ProcessedLayer:
    """Rows of one donor layer, and what was found on the way.

    ``rows``: ``[N, D]``, bfloat16 bits in uint16 or float16. ``raw_norms``: float32 ``[N]``, Euclidean norms of the
    states as the donor gave them. ``mean``: float64 ``[D]``, what centring took away (of rows normalised before, if
    they are); None if it did not.
    """

    rows: np.ndarray
    raw_norms: np.ndarray
    mean: np.ndarray | None

    def statistics(self) -> dict[str, Any]:
        """What a bank's manifest keeps: the mean, and quantiles of the states' norms."""
        shares = (0, 0.01, 0.5, 0.99, 1)
        quantiles = np.quantile(self.raw_norms, shares)
        return {
            "state_norm_quantiles": {
                f"{share:g}": _short(value) for share, value in zip(shares, quantiles, strict=True)
            },
            "mean": None if self.mean is None else [_short(value) for value in self.mean],
        }


def process_layer(
    states: DonorStates, layer: int, processing: Processing, *, row_dtype: str = "bfloat16", path: Path | None = None
) -> ProcessedLayer:
    """Make a bank's rows of one donor layer.

    Normalising divides every row by its root mean square, as RMSNorm without a weight does; centring takes
    the mean over all rows away (states of one layer share a large common direction). With both, rows are
    normalised before the mean is taken and again afterwards: a few texts have states hundreds of times longer
    than the rest, along one dimension, and a mean of unscaled states would be theirs alone; taking it away
    would give every other row that dimension in place of its own contents.

    Args:
        states: of the donor, N rows. Read twice, a block at a time.
        layer: which of its layers.
        processing: which of the steps to take.
        row_dtype: ``bfloat16`` or ``float16``.
        path: a file to put the rows into, so that they need no memory; None keeps them in memory.

    Raises:
        DonorError: a state is not finite.
        ConfigError: a value does not fit into float16, or a single row is to be centred.
    """
    num_rows = states.num_rows
    if processing.centred and num_rows < 2:
        raise ConfigError(
            "--num-rows", "leaves one row, and centring takes the mean of all rows away", expected="at least 2 rows",
            remedy="Ask for more rows, or for --raw ones.",
        )  # fmt: skip
    raw_norms = np.empty(num_rows, dtype=np.float32)
    total: np.ndarray | None = None
    progress = Progress(f"process layer {layer}", num_rows, "rows")
    for start, stop in _blocks(num_rows):
        block = states.rows(layer, start, stop)
        _check_finite(block, start)
        raw_norms[start:stop] = np.linalg.norm(block, axis=1)
        if processing.normalised:
            _normalise(block)
        if processing.centred:
            sums = block.sum(axis=0, dtype=np.float64)
            total = sums if total is None else total + sums
    mean = None if total is None else total / num_rows
    rows: np.ndarray | None = None
    for start, stop in _blocks(num_rows):
        block = _finished(states.rows(layer, start, stop), processing, mean)
        if rows is None:
            rows = _new_rows((num_rows, block.shape[1]), row_dtype, path)
        rows[start:stop] = _stored(block, row_dtype)
        progress.advance(stop - start)
    assert rows is not None, "a bank has at least one row"
    return ProcessedLayer(rows=rows, raw_norms=raw_norms, mean=mean)


def _blocks(num_rows: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_rows, _BLOCK_ROWS):
        yield start, min(start + _BLOCK_ROWS, num_rows)


def _check_finite(block: np.ndarray, first_row: int) -> None:
    if not np.isfinite(block).all():
        row = first_row + int(np.argwhere(~np.isfinite(block))[0, 0])
        raise DonorError(
            "--donor", "gives states that are not finite", got=f"text number {row}",
            remedy="Run the donor with --donor-dtype float32.",
        )  # fmt: skip


def _finished(block: np.ndarray, processing: Processing, mean: np.ndarray | None) -> np.ndarray:
    if processing.normalised:
        _normalise(block)
    if mean is not None:
        block -= mean.astype(np.float32)
        if processing.normalised:
            _normalise(block)
    return block


def _normalise(block: np.ndarray) -> None:
    """Scale every row to a root mean square of 1, in place."""
    square = np.mean(block * block, axis=1, keepdims=True, dtype=np.float32)
    block /= np.sqrt(square + np.float32(RMS_EPSILON))


def _new_rows(shape: tuple[int, int], row_dtype: str, path: Path | None) -> np.ndarray:
    dtype = ROW_DTYPES[row_dtype].numpy
    return np.empty(shape, dtype) if path is None else np.lib.format.open_memmap(path, "w+", dtype, shape)


def _stored(block: np.ndarray, row_dtype: str) -> np.ndarray:
    if row_dtype == "bfloat16":
        return bf16_from_float32(block)
    largest = float(np.abs(block).max(initial=0))
    if largest > float(np.finfo(np.float16).max):
        raise ConfigError(
            "--row-dtype float16", "cannot hold a value of the rows", got=f"{largest:g}",
            expected=f"at most {np.finfo(np.float16).max:g}", remedy="Take bfloat16, or build without --raw.",
        )  # fmt: skip
    return block.astype(np.float16)


def _short(value: float) -> float:
    """Rounded to what float32 can tell apart."""
    return float(f"{value:.9g}")
