"""How the tensor- and context-parallel ranks of a layer share the work of its memory site. The one place of that
arithmetic.

Under context parallelism a sequence is cut into twice as many chunks as there are ranks, and a rank has one from the
front and its mirror image from the back, as Megatron cuts it. With sequence parallelism a tensor-parallel rank works on
its even slice of those positions, with whole rows. Without it a rank works on all of them, with a slice of every row's
columns; of a hashed table's row those of whole heads. Either way the rows of a trainable table are split over the
tensor-parallel ranks, in order and without padding; context-parallel ranks have copies, as data-parallel ones do.

So the positions of a rank are one or two *runs* of the whole sequence, end to end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


def share(total: int, parts: int, part: int) -> tuple[int, int]:
    """(first, end) of one of ``parts`` contiguous shares of ``total`` things; the first shares have one more."""
    least, more = divmod(total, parts)
    first = part * least + min(part, more)
    return first, first + least + (part < more)


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One rank's place among those that share the work of a layer.

    Attributes:
        rank: this rank among the tensor-parallel ones, from 0.
        size: T, the number of tensor-parallel ranks.
        sequence_parallel: whether hidden states are split over them along the sequence.
        context_rank: this rank among the context-parallel ones, from 0.
        context_size: C, the number of context-parallel ranks.
    """

    rank: int = 0
    size: int = 1
    sequence_parallel: bool = False
    context_rank: int = 0
    context_size: int = 1

    @property
    def sequence_parts(self) -> int:
        """Over how many tensor-parallel ranks the sequence is split."""
        return self.size if self.sequence_parallel else 1

    @property
    def splits_columns(self) -> bool:
        """Whether a rank reads a slice of every row's columns."""
        return self.size > 1 and not self.sequence_parallel

    def others(self) -> list[Partition]:
        """The places of all ranks that split the sequence: context by context, each tensor-parallel rank in turn."""
        ranks = range(self.size) if self.sequence_parallel else [self.rank]
        return [replace(self, rank=rank, context_rank=place) for place in range(self.context_size) for rank in ranks]

    def runs(self, length: int, rank: int | None = None) -> list[slice]:
        """Which of the ``length`` positions of a sequence a tensor-parallel rank (default: this one) works on.

        Returns:
            one or two slices; a rank's positions are those of the first, then those of the second.
        """
        chunks = [slice(0, length)]
        if self.context_size > 1:
            places = (self.context_rank, 2 * self.context_size - 1 - self.context_rank)
            chunks = [slice(*share(length, 2 * self.context_size, place)) for place in places]
        if not self.sequence_parallel:
            return chunks
        first, end = share(sum(_length(chunk) for chunk in chunks), self.size, self._rank(rank))
        runs, before = [], 0
        for chunk in chunks:
            start = chunk.start - before
            run = slice(max(chunk.start, start + first), min(chunk.stop, start + end))
            runs += [run] if _length(run) > 0 else []
            before += _length(chunk)
        return runs

    def num_positions(self, length: int) -> int:
        """s, of how many of the ``length`` positions of a sequence this rank has."""
        return sum(map(_length, self.runs(length)))

    def part(self, whole: np.ndarray, rank: int | None = None) -> np.ndarray:
        """A tensor-parallel rank's (default: this one's) positions ``[B, s, ...]`` of ``[B, S, ...]``; a view if it has
        one run."""
        parts = [whole[:, run] for run in self.runs(whole.shape[1], rank)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def position(self, length: int, place: int, rank: int | None = None) -> int:
        """The position in the whole sequence of the ``place``-th of a rank's positions."""
        for run in self.runs(length, rank):
            if place < _length(run):
                return int(run.start) + place
            place -= _length(run)
        raise IndexError(f"a rank has fewer of {length} positions")

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


def _length(run: slice) -> int:
    return int(run.stop) - int(run.start)
