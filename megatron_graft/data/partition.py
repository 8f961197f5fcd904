"""How the tensor-parallel ranks of a layer share the work of its memory site. The one place of that arithmetic.

With sequence parallelism a rank works on its even slice of the positions, with whole rows. Without it a rank works on
all positions, with a slice of every row's columns; of a hashed table's row those of whole heads. Either way the rows of
a trainable table are split over the ranks, in order and without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def share(total: int, parts: int, part: int) -> tuple[int, int]:
    """(first, end) of one of ``parts`` contiguous shares of ``total`` things; the first shares have one more."""
    least, more = divmod(total, parts)
    first = part * least + min(part, more)
    return first, first + least + (part < more)


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One rank's place among the tensor-parallel ranks of a layer.

    Attributes:
        rank: this rank, from 0.
        size: T, the number of ranks.
        sequence_parallel: whether hidden states are split over them along the sequence.
    """

    rank: int = 0
    size: int = 1
    sequence_parallel: bool = False

    @property
    def sequence_parts(self) -> int:
        """Into how many slices the sequence is split."""
        return self.size if self.sequence_parallel else 1

    @property
    def splits_columns(self) -> bool:
        """Whether a rank reads a slice of every row's columns."""
        return self.size > 1 and not self.sequence_parallel

    def positions(self, length: int, rank: int | None = None) -> slice:
        """Which of ``length`` positions a rank (default: this one) works on."""
        if not self.sequence_parallel:
            return slice(0, length)
        return slice(*share(length, self.size, self._rank(rank)))

    def columns(self, width: int) -> tuple[int, int]:
        """(first, end) of the columns of a row of ``width`` elements that this rank reads."""
        return share(width, self.size, self.rank) if self.splits_columns else (0, width)

    def heads(self, num_heads: int, rank: int | None = None) -> tuple[int, int]:
        """(first, end) of the heads of a hashed table that a rank (default: this one) reads."""
        return share(num_heads, self.size, self._rank(rank)) if self.splits_columns else (0, num_heads)

    def table_bounds(self, num_rows: int) -> np.ndarray:
        """int64 ``[T + 1]``: rank r holds rows ``bounds[r]`` to ``bounds[r + 1]`` of a trainable table."""
        return np.array([*(share(num_rows, self.size, rank)[0] for rank in range(self.size)), num_rows], dtype=np.int64)

    def table_rows(self, num_rows: int) -> tuple[int, int]:
        """(first, end) of the rows of a trainable table that this rank holds."""
        return share(num_rows, self.size, self.rank)

    def _rank(self, rank: int | None) -> int:
        return self.rank if rank is None else rank
