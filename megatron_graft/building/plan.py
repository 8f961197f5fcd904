"""Which donor passes a list of texts needs: texts that begin others ride along, equal lengths run together.

Under causal attention the state at a position depends on nothing after it. So a sequence that is the
beginning of another one needs no run of its own: its state is the longer one's, at its own last position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class DonorBatch:
    """One forward pass: B sequences of S tokens each, and the M states to take out of it.

    ``tokens_BS``: int64. ``rows``, ``sequences``, ``positions``: int64 ``[M]``; the state of sequence
    ``sequences[i]`` at ``positions[i]`` belongs to row ``rows[i]``.
    """

    tokens_BS: np.ndarray
    rows: np.ndarray
    sequences: np.ndarray
    positions: np.ndarray


def plan_batches(token_lists: Sequence[Sequence[int]], batch_tokens: int) -> list[DonorBatch]:
    """Plan the passes that yield the last state of every token list, each list exactly once.

    Args:
        token_lists: donor ids of every text, none empty.
        batch_tokens: most tokens of one pass; a longer sequence runs alone.

    Returns:
        batches without padding, shortest sequences first. The same lists always give the same plan.
    """
    distinct = sorted({tuple(tokens) for tokens in token_lists})
    carrier = {tokens: tokens for tokens in distinct}
    for shorter, longer in zip(reversed(distinct[:-1]), reversed(distinct[1:]), strict=True):
        # Sorted, everything that begins with a sequence follows it directly.
        if longer[: len(shorter)] == shorter:
            carrier[shorter] = carrier[longer]
    rows_of: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for row, tokens in enumerate(token_lists):
        rows_of.setdefault(carrier[tuple(tokens)], []).append((row, len(tokens) - 1))
    runs = sorted(rows_of, key=lambda tokens: (len(tokens), tokens))
    return [_batch(group, rows_of) for group in _groups(runs, batch_tokens)]


def _groups(runs: Sequence[tuple[int, ...]], batch_tokens: int) -> Iterator[Sequence[tuple[int, ...]]]:
    start = 0
    while start < len(runs):
        length = len(runs[start])
        stop = start
        while stop < len(runs) and len(runs[stop]) == length and (stop - start + 1) * length <= batch_tokens:
            stop += 1
        stop = max(stop, start + 1)
        yield runs[start:stop]
        start = stop


def _batch(group: Sequence[tuple[int, ...]], rows_of: dict[tuple[int, ...], list[tuple[int, int]]]) -> DonorBatch:
    takes = [(row, sequence, position) for sequence, run in enumerate(group) for row, position in rows_of[run]]
    rows, sequences, positions = np.array(takes, dtype=np.int64).T
    return DonorBatch(tokens_BS=np.array(group, dtype=np.int64), rows=rows, sequences=sequences, positions=positions)
