"""The sites' parameters: random numbers apart from every other generator of the run, and Megatron's tags.

The backbone's generators are never touched, so adding a site changes no other parameter's initial value. A draw depends
on the run's seed, the layer and the part of the site only: it is the same on every rank and in every parallel layout,
and one part's values do not depend on whether the site has another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_graft.bank.reader import Bank
from megatron_graft.bank.row_layout import Columns

# Values of rows ``first`` to ``end`` of a table: float32 ``[end - first, D]``.
type RowValues = Callable[[int, int], torch.Tensor]

HASHED_TABLE, BANK_ROWS = "engram table", "graft table"
_ROWS_PER_BLOCK = 1 << 12


@dataclass(frozen=True)
class BankValues:
    """The values of a bank's rows as numbers: what a site's trained rows start as.

    Attributes:
        bank: the run's.
        columns: (first, end) of those that the site reads.
    """

    bank: Bank
    columns: Columns

    def __call__(self, first: int, end: int) -> torch.Tensor:
        """Rows ``first`` to ``end``, float32 ``[end - first, D]``; of int8 and float8 rows element times scale."""
        out = torch.empty(end - first, self.columns[1] - self.columns[0])
        for low in range(first, end, _ROWS_PER_BLOCK):  # so that no more than the result is held at once
            high = min(end, low + _ROWS_PER_BLOCK)
            values = self.bank.float_rows(np.arange(low, high, dtype=np.int64), self.columns)
            out[low - first : high - first] = torch.from_numpy(values)
        return out


@dataclass(frozen=True, kw_only=True)
class SiteSeed:
    """Where the random numbers of one layer's site come from.

    Attributes:
        seed: of the run.
        layer_number: Megatron's global, 1-based number of the layer.
        std: standard deviation of what is drawn.
    """

    seed: int
    layer_number: int
    std: float

    def normal(self, part: str, *shape: int) -> torch.Tensor:
        """Normally distributed float32 numbers of mean 0 for one part (a name) of the site."""
        return torch.randn(*shape, generator=self._generator(part)) * self.std

    def table_rows(self, first: int, end: int, width: int, part: str = HASHED_TABLE) -> torch.Tensor:
        """Rows ``first`` to ``end`` of a table of the site, float32 ``[end - first, width]``, normally distributed.

        Drawn in whole blocks, each from a generator of its own: a shorter draw would not be the beginning of a longer
        one. So a rank draws its share and at most the rest of two blocks.
        """
        out = torch.empty(end - first, width)
        for block in range(first // _ROWS_PER_BLOCK, -(-end // _ROWS_PER_BLOCK)):
            start = block * _ROWS_PER_BLOCK
            low, high = max(first, start), min(end, start + _ROWS_PER_BLOCK)
            rows = self.normal(f"{part} {block}", _ROWS_PER_BLOCK, width)
            out[low - first : high - first] = rows[low - start : high - start]
        return out

    def _generator(self, part: str) -> torch.Generator:
        digest = hashlib.sha256(f"megatron-graft site {self.seed} {self.layer_number} {part}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def site_parameter(config: Any, value: torch.Tensor, *, split_axis: int | None = None) -> torch.nn.Parameter:
    """A parameter of a site, of the model's dtype and on its device.

    Args:
        config: Megatron's ``TransformerConfig``.
        value: what it starts as; for a split one this rank's slice.
        split_axis: the axis along which the tensor-parallel ranks hold slices, or None if each holds all of it. Then,
            under sequence parallelism, Megatron sums its gradient over the ranks, which see different positions.
    """
    device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
    # A copy always: two parameters made from one value must not share its storage.
    parameter: Any = torch.nn.Parameter(value.to(dtype=config.params_dtype, device=device, copy=True))
    parameter.sequence_parallel = config.sequence_parallel and split_axis is None
    if split_axis is not None:
        parameter.tensor_model_parallel = True  # else its gradient norm would count on one rank only
        parameter.partition_dim, parameter.partition_stride = split_axis, 1
    return parameter
