"""Norms of states and rows as quantiles by group: a donor whose states are of two kinds shows here first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_graft.bank.reader import Bank

PERCENTS = (0, 1, 5, 25, 50, 75, 95, 99, 100)
ALL = "all"
MOST_ROWS = 200_000
"""Stored rows that are read at most."""
_BLOCK_ROWS = 1 << 14
Quantiles = dict[str, dict[str, float | None]]


@dataclass(frozen=True, kw_only=True)
class LayerNorms:
    """Norms of one donor layer: group -> quantiles, as :func:`norm_quantiles` gives them.

    Attributes:
        by_order: grouped by the n-gram's number of tokens.
        by_donor_length: grouped by the donor tokens of its text, without BOS; None if they are not known.
    """

    by_order: Quantiles
    by_donor_length: Quantiles | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object of these norms."""
        return {"by_order": self.by_order, "by_donor_length": self.by_donor_length}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LayerNorms:
        """What :meth:`to_json` gave."""
        return cls(by_order=value["by_order"], by_donor_length=value.get("by_donor_length"))


def norm_quantiles(norms: np.ndarray, groups: np.ndarray) -> Quantiles:
    """Quantiles of norms, of all and by group.

    Args:
        norms: float32 ``[N]``, N at least 1.
        groups: integers ``[N]``, such as the orders of the rows.

    Returns:
        ``"all"`` and then every group, ascending -> ``rows``, how many of them are ``not_finite``, and for each of
        :data:`PERCENTS` that quantile of the finite ones, None if there are none.
    """
    order = np.argsort(groups, kind="stable")
    numbers, starts = np.unique(groups[order], return_index=True)
    parts = np.split(norms[order], starts[1:])
    named = {ALL: norms} | {str(int(number)): part for number, part in zip(numbers, parts, strict=True)}
    return {name: _quantiles(part) for name, part in named.items()}


def row_norms(rows_ND: np.ndarray) -> np.ndarray:
    """Euclidean norm of every row: float32 ``[N]`` of float32 ``[N, D]``, block by block."""
    norms = np.empty(len(rows_ND), dtype=np.float32)
    for start in range(0, len(rows_ND), _BLOCK_ROWS):
        block = rows_ND[start : start + _BLOCK_ROWS]
        norms[start : start + _BLOCK_ROWS] = np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64))
    return norms


def stored_norms(bank: Bank, most_rows: int = MOST_ROWS) -> dict[int, LayerNorms]:
    """Donor layer -> norms of the rows as the bank stores them, of evenly spread rows if it has many."""
    rows = np.unique(np.linspace(0, bank.num_rows - 1, min(bank.num_rows, most_rows)).astype(np.int64))
    orders = bank.key_orders[rows]
    norms: dict[int, LayerNorms] = {}
    first = 0
    for layer, width in zip(bank.rows_by_layer, bank.layer_widths, strict=True):
        columns = (first, first + width)
        blocks = [
            row_norms(bank.float_rows(rows[start : start + _BLOCK_ROWS], columns))
            for start in range(0, len(rows), _BLOCK_ROWS)
        ]
        norms[layer] = LayerNorms(by_order=norm_quantiles(np.concatenate(blocks), orders))
        first += width
    return norms


def _quantiles(norms: np.ndarray) -> dict[str, float | None]:
    finite = norms[np.isfinite(norms)].astype(np.float64)
    numbers: dict[str, float | None] = {"rows": len(norms), "not_finite": len(norms) - len(finite)}
    values = np.percentile(finite, PERCENTS).tolist() if len(finite) else [None] * len(PERCENTS)
    return numbers | {str(percent): value for percent, value in zip(PERCENTS, values, strict=True)}
