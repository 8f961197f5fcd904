"""The yardstick that needs no training: an interpolated bigram model counted over the tokens a run has seen.

Interpolation is Witten and Bell's: a context v that was followed by T(v) distinct words keeps the share
T(v) / (c(v) + T(v)) for the unigram estimate, which keeps one part for the uniform distribution the same way.
There is nothing to tune.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class BigramModel:
    """Counts pairs, then answers with natural-log losses.

    Args:
        vocab_size: number of token ids.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._pairs: list[np.ndarray] = []
        self._keys = np.zeros(0, dtype=np.int64)
        self._counts = np.zeros(0, dtype=np.int64)

    @classmethod
    def fitted(cls, samples: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> BigramModel:
        """A model of (input tokens, next tokens) pairs, each an integer array of equal shape."""
        model = cls(vocab_size)
        pairs = [contexts.astype(np.int64) * vocab_size + words for contexts, words in samples]
        flat = np.concatenate([part.ravel() for part in pairs])
        model._keys, model._counts = np.unique(flat, return_counts=True)
        return model

    def losses(self, contexts: np.ndarray, words: np.ndarray) -> np.ndarray:
        """``-log p(word | context)`` in nats, float64, for integer arrays of equal shape."""
        unigram = self._unigram()
        context_of_key = self._keys // self.vocab_size
        total = np.bincount(context_of_key, weights=self._counts, minlength=self.vocab_size)
        distinct = np.bincount(context_of_key, minlength=self.vocab_size)
        keys = contexts.astype(np.int64) * self.vocab_size + words
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        count = np.where(self._keys[place] == keys, self._counts[place], 0)
        # A context never seen has no counts to interpolate with: the unigram estimate stands alone.
        kept = np.where(total[contexts] > 0, distinct[contexts], 1)
        return -np.log((count + kept * unigram[words]) / (total[contexts] + kept))

    def _unigram(self) -> np.ndarray:
        counts = np.bincount(self._keys % self.vocab_size, weights=self._counts, minlength=self.vocab_size)
        kept = max(1, int((counts > 0).sum()))
        return (counts + kept / self.vocab_size) / (counts.sum() + kept)
