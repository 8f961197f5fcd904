"""Counted n-grams by the plainest means: a Counter. What selection chooses from, and what counting is held to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


class CandidatesInMemory:
    """All n-grams of token lists, none with the end-of-document token."""

    def __init__(self, token_lists: Sequence[Sequence[int]], orders: Sequence[int], eod: int | None) -> None:
        self.orders = tuple(orders)
        self.counts: dict[int, Counter[tuple[int, ...]]] = {order: Counter() for order in orders}
        for order, counter in self.counts.items():
            for tokens in token_lists:
                ngrams = (tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1))
                counter.update(ngram for ngram in ngrams if eod not in ngram)

    def count_histogram(self, order: int) -> tuple[np.ndarray, np.ndarray]:
        counts, numbers = np.unique(np.array(list(self.counts[order].values()), dtype=np.int64), return_counts=True)
        return counts, numbers.astype(np.int64)

    def ngrams_with_at_least(self, order: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        kept = sorted((ngram, number) for ngram, number in self.counts[order].items() if number >= count)
        ids = np.array([ngram for ngram, _ in kept], dtype=np.int32).reshape(-1, order)
        return ids, np.array([number for _, number in kept], dtype=np.int64)
