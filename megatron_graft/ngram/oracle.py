"""The definition of longest-suffix lookup, written to be read, not to be fast: every other lookup must agree."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

MISS = -1


def brute_force_lookup(
    rows_of_keys: Mapping[tuple[int, ...], int],
    tokens_BS: np.ndarray,
    eod: int | None,
    min_order: int,
    max_order: int,
) -> tuple[np.ndarray, np.ndarray]:
    """For every position, the row of the longest known n-gram that ends there.

    Args:
        rows_of_keys: n-gram (oldest token first) -> row.
        tokens_BS: integer ``[B, S]`` token ids.
        eod: id of the end-of-document token, or None.
        min_order: shortest n-gram to try.
        max_order: longest n-gram to try, first.

    Returns:
        rows int64 ``[B, S]`` (:data:`MISS` where nothing matches) and orders uint8 ``[B, S]`` (0 at a miss).
    """
    rows_BS = np.full(tokens_BS.shape, MISS, dtype=np.int64)
    orders_BS = np.zeros(tokens_BS.shape, dtype=np.uint8)
    for sequence, tokens in enumerate(tokens_BS.tolist()):
        for end in range(len(tokens)):
            for order in range(min(max_order, end + 1), min_order - 1, -1):
                key = tuple(tokens[end - order + 1 : end + 1])
                if eod in key or key not in rows_of_keys:
                    continue
                rows_BS[sequence, end] = rows_of_keys[key]
                orders_BS[sequence, end] = order
                break
    return rows_BS, orders_BS
