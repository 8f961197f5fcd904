"""From the loss of every token of a text to what ``evaluation.json`` says of it. NumPy only.

Shapes: N predicted tokens of a text, in its order; M documents; B sequences, S positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_graft.lookup.index import SuffixIndex

MISS = "miss"
# Where each group of key counts begins. The same for every bank, so that runs with different banks can be set side by
# side; a group that no token of a text falls into is left out.
COUNT_GROUPS = (1, 2, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
_GROUP_BORDERS = np.array(COUNT_GROUPS[1:])


def count_group_name(group: int) -> str:
    """``"1"``, ``"2-3"``, ``"4-15"`` ...; the last group is open: ``"65536+"``."""
    first = COUNT_GROUPS[group]
    if group + 1 == len(COUNT_GROUPS):
        return f"{first}+"
    last = COUNT_GROUPS[group + 1] - 1
    return str(first) if first == last else f"{first}-{last}"


@dataclass(frozen=True, kw_only=True)
class Documents:
    """How the predicted tokens of a text are divided among its documents.

    Attributes:
        tokens_M: int64, predicted tokens of each.
        bytes_M: int64, UTF-8 bytes that they spell.
    """

    tokens_M: np.ndarray
    bytes_M: np.ndarray

    @classmethod
    def of(cls, lengths_M: np.ndarray, bytes_N: np.ndarray) -> Documents:
        """Of a text's documents.

        Args:
            lengths_M: int, tokens of each, EOD included; the first token of the text, which nothing predicts, too.
            bytes_N: int, UTF-8 bytes of every predicted token.
        """
        tokens_M = lengths_M.astype(np.int64)
        tokens_M[np.flatnonzero(tokens_M)[0]] -= 1
        return cls(tokens_M=tokens_M, bytes_M=_sums(bytes_N, tokens_M).astype(np.int64))

    def sums(self, values_N: np.ndarray) -> np.ndarray:
        """float64 ``[M]``: sums of ``values_N`` over the predicted tokens of each document."""
        return _sums(values_N, self.tokens_M)


@dataclass(frozen=True, kw_only=True)
class Matches:
    """What a bank finds at the positions that predict the tokens of a text.

    Attributes:
        orders_N: uint8, length of the match, 0 at a miss.
        counts_N: int64, count of the matched key in the bank's corpus, 0 at a miss.
    """

    orders_N: np.ndarray
    counts_N: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """The bank by whose matches losses are split.

    Attributes:
        index: finds the matches.
        key_counts: int64 ``[rows]``, count of every key in the bank's corpus.
    """

    index: SuffixIndex
    key_counts: np.ndarray

    def matches(self, batches: Iterable[tuple[np.ndarray, np.ndarray]], eod: int) -> Matches:
        """Look a text up as its model reads it.

        Args:
            batches: inputs int64 ``[B, S]``, every sequence by itself, and bool ``[B, S]``: which of the positions
                predict a token of the text.
            eod: id of the end-of-document token.
        """
        orders, counts = [], []
        for inputs_BS, mask_BS in batches:
            rows_BS, orders_BS = self.index.lookup(inputs_BS, eod=eod)
            orders.append(orders_BS[mask_BS])
            rows = rows_BS[mask_BS]
            counts.append(np.where(rows < 0, 0, self.key_counts[rows]))
        return Matches(orders_N=np.concatenate(orders), counts_N=np.concatenate(counts))


def summary(losses_N: np.ndarray, documents: Documents, matches: Matches | None) -> dict[str, Any]:
    """What is said of one pass over a text.

    Args:
        losses_N: float32 or float64, nats.
        documents: of the text.
        matches: by which losses are split; None if nothing was looked up.

    Returns:
        ``tokens``, ``bytes``, ``loss`` (mean, nats per token), ``bits_per_byte``, ``by_order`` (all are misses without
        ``matches``), ``documents`` (lists over the documents: predicted ``tokens``, their ``bytes``, the sum of their
        ``loss`` in nats) and, with ``matches``, ``by_order_and_count``.
    """
    total, num_bytes = float(losses_N.sum(dtype=np.float64)), int(documents.bytes_M.sum())
    orders_N = np.zeros(losses_N.size, np.uint8) if matches is None else matches.orders_N
    result = {
        "tokens": losses_N.size,
        "bytes": num_bytes,
        "loss": total / losses_N.size,
        "bits_per_byte": total / math.log(2) / num_bytes,
        "by_order": {_order_name(order): mean for order, mean in _means(losses_N, orders_N).items()},
        "documents": {
            "tokens": documents.tokens_M.tolist(),
            "bytes": documents.bytes_M.tolist(),
            "loss": documents.sums(losses_N).tolist(),
        },
    }
    if matches is not None:
        result["by_order_and_count"] = _by_order_and_count(losses_N, matches)
    return result


def _by_order_and_count(losses_N: np.ndarray, matches: Matches) -> dict[str, Any]:
    groups_N = np.searchsorted(_GROUP_BORDERS, matches.counts_N, side="right")
    # Both in one number: a miss, whose count is 0, is in group 0 of order 0.
    both_N = matches.orders_N.astype(np.int64) * len(COUNT_GROUPS) + groups_N
    result: dict[str, Any] = {}
    for both, mean in _means(losses_N, both_N).items():
        order, group = divmod(both, len(COUNT_GROUPS))
        if order == 0:
            result[MISS] = mean
        else:
            result.setdefault(str(order), {})[count_group_name(group)] = mean
    return result


def _order_name(order: int) -> str:
    return str(order) if order else MISS


def _means(losses_N: np.ndarray, classes_N: np.ndarray) -> dict[int, dict[str, Any]]:
    """Number of tokens and mean loss of every class that has tokens, ascending."""
    tokens, sums = np.bincount(classes_N), np.bincount(classes_N, weights=losses_N)
    return {
        number: {"tokens": int(tokens[number]), "loss": float(sums[number] / tokens[number])}
        for number in np.flatnonzero(tokens).tolist()
    }


def _sums(values_N: np.ndarray, tokens_M: np.ndarray) -> np.ndarray:
    document_N = np.repeat(np.arange(tokens_M.size), tokens_M)
    return np.bincount(document_N, weights=values_N, minlength=tokens_M.size)
