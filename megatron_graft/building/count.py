"""Exact n-gram counts over documents, level by level, with exact 64-bit keys. NumPy only.

The key of an n-gram is ``(id of its first n-1 tokens << 32) | last token``, where the ids number the kept
n-grams of the level below in lexicographic order. So keys never collide at any order, sorted keys are sorted
n-grams, and an n-gram is only formed where both of its (n-1)-grams were frequent enough (none other can be).
A chunk of the corpus is counted by sorting its keys and measuring runs; chunks are merged by the same step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_graft.errors import ConfigError
from megatron_graft.log import Progress

MIN_ORDER, MAX_ORDER = 2, 8
CHUNK_TOKENS = 1 << 23
_TOKEN_BITS = np.uint64(32)
_TOKEN_MASK = np.uint64(0xFFFFFFFF)
_BARRIER = -1


@dataclass(frozen=True, kw_only=True)
class OrderCounts:
    """All n-grams of one order that are frequent enough.

    ``ids``: int32 ``[N, order]``, oldest token first, rows in lexicographic order. ``counts``: int64 ``[N]``.
    """

    order: int
    ids: np.ndarray
    counts: np.ndarray


def check_orders(orders: Sequence[int]) -> tuple[int, ...]:
    """Return ``orders`` as a tuple if they are ascending, without a gap, and within 2 to 8.

    Raises:
        ConfigError: they are not.
    """
    wanted = tuple(orders)
    contiguous = wanted == tuple(range(wanted[0], wanted[0] + len(wanted))) if wanted else False
    if not contiguous or wanted[0] < MIN_ORDER or wanted[-1] > MAX_ORDER:
        raise ConfigError(
            "--orders",
            "is not a range of orders that can be counted",
            got=" ".join(map(str, wanted)) or "none",
            expected=f"ascending, without a gap, within {MIN_ORDER} to {MAX_ORDER}, such as 2 3 4",
        )
    return wanted


def count_ngrams(
    documents: Iterable[np.ndarray],
    *,
    orders: Sequence[int],
    eod: int | None,
    min_count: int = 1,
    chunk_tokens: int = CHUNK_TOKENS,
) -> list[OrderCounts]:
    """Count the n-grams of every order in ``orders`` that occur at least ``min_count`` times.

    Args:
        documents: integer arrays of token ids (0 to 2^31 - 1), one per document; iterated once per level, so
            a one-shot iterator is first read into memory.
        orders: see :func:`check_orders`.
        eod: id of the end-of-document token, which ends a document and is in no n-gram; or None.
        min_count: rarer n-grams are dropped.
        chunk_tokens: about how many tokens are in memory at a time.

    Returns:
        one :class:`OrderCounts` per order, ascending.

    Raises:
        ConfigError: ``orders`` or ``min_count`` is unusable.
    """
    wanted = check_orders(orders)
    if min_count < 1:
        raise ConfigError("--min-count", "is not a count", got=min_count, expected="at least 1")
    if isinstance(documents, Iterator):
        documents = list(documents)
    levels: list[tuple[np.ndarray, np.ndarray]] = []  # (sorted keys, counts) of orders 2, 3, ...
    for order in range(MIN_ORDER, wanted[-1] + 1):
        lower_keys = [keys for keys, _ in levels]
        levels.append(_count_level(documents, lower_keys, order, eod, min_count, chunk_tokens))
    return [
        OrderCounts(order=order, ids=_ids_of_keys(levels, order), counts=levels[order - MIN_ORDER][1])
        for order in wanted
    ]


def _count_level(
    documents: Iterable[np.ndarray],
    lower_keys: Sequence[np.ndarray],
    order: int,
    eod: int | None,
    min_count: int,
    chunk_tokens: int,
) -> tuple[np.ndarray, np.ndarray]:
    keys, counts = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    progress = Progress(f"counting order {order}", _num_tokens(documents), "tokens")
    for chunk in _chunks(documents, eod, chunk_tokens):
        chunk_keys = _keys_of_chunk(chunk, lower_keys)
        chunk_keys.sort()
        keys, counts = _merge(keys, counts, *_run_lengths(chunk_keys))
        progress.advance(len(chunk))
    frequent = counts >= min_count
    return keys[frequent], counts[frequent]


def _num_tokens(documents: Iterable[np.ndarray]) -> int:
    known = getattr(documents, "num_tokens", None)
    return known if isinstance(known, int) else sum(len(document) for document in documents)


def _chunks(documents: Iterable[np.ndarray], eod: int | None, chunk_tokens: int) -> Iterator[np.ndarray]:
    """Concatenate documents to int64 ``[S]``, with a barrier after each one and in place of every EOD."""
    parts: list[np.ndarray] = []
    size = 0
    for document in documents:
        parts += [np.asarray(document, dtype=np.int64), np.full(1, _BARRIER, dtype=np.int64)]
        size += len(document) + 1
        if size >= chunk_tokens:
            yield _with_barriers(parts, eod)
            parts, size = [], 0
    if parts:
        yield _with_barriers(parts, eod)


def _with_barriers(parts: list[np.ndarray], eod: int | None) -> np.ndarray:
    tokens = np.concatenate(parts)
    if eod is not None:
        tokens[tokens == eod] = _BARRIER
    return tokens


def _keys_of_chunk(tokens: np.ndarray, lower_keys: Sequence[np.ndarray]) -> np.ndarray:
    """Keys (uint64) of all n-grams of the next level in a chunk, in no order.

    ``nodes[i]`` is the id of the kept n-gram that starts at position i, or -1. An n-gram may start where its
    prefix (at i) and its suffix (at i+1) are both kept; a barrier is kept nowhere, so nothing crosses one.
    """
    nodes = tokens
    for level, keys in enumerate(lower_keys, start=1):
        starts = _candidates(nodes)
        candidates = _join(nodes[starts], tokens[starts + level])
        found = np.searchsorted(keys, candidates)
        found[found == len(keys)] = 0
        hit = keys[found] == candidates if len(keys) else np.zeros(len(candidates), dtype=bool)
        nodes = np.full(len(nodes), _BARRIER, dtype=np.int64)
        nodes[starts[hit]] = found[hit]
    starts = _candidates(nodes)
    return _join(nodes[starts], tokens[starts + len(lower_keys) + 1])


def _candidates(nodes: np.ndarray) -> np.ndarray:
    return np.flatnonzero((nodes[:-1] >= 0) & (nodes[1:] >= 0))


def _join(nodes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return (nodes.astype(np.uint64) << _TOKEN_BITS) | tokens.astype(np.uint64)


def _run_lengths(sorted_keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not len(sorted_keys):
        return sorted_keys, np.empty(0, dtype=np.int64)
    starts = np.flatnonzero(np.concatenate(([True], sorted_keys[1:] != sorted_keys[:-1])))
    return sorted_keys[starts], np.diff(starts, append=len(sorted_keys)).astype(np.int64)


def _merge(
    keys: np.ndarray, counts: np.ndarray, more_keys: np.ndarray, more_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Add two sorted count tables."""
    if not len(keys):
        return more_keys, more_counts
    both = np.concatenate((keys, more_keys))
    by_key = np.argsort(both, kind="stable")
    both, amounts = both[by_key], np.concatenate((counts, more_counts))[by_key]
    if not len(both):
        return both, amounts
    starts = np.flatnonzero(np.concatenate(([True], both[1:] != both[:-1])))
    return both[starts], np.add.reduceat(amounts, starts)


def _ids_of_keys(levels: Sequence[tuple[np.ndarray, np.ndarray]], order: int) -> np.ndarray:
    """Walk the chain of prefixes down to token ids: int32 ``[N, order]``."""
    keys = levels[order - MIN_ORDER][0]
    ids = np.empty((len(keys), order), dtype=np.int32)
    for column in range(order - 1, 1, -1):
        ids[:, column] = keys & _TOKEN_MASK
        keys = levels[column - MIN_ORDER][0][(keys >> _TOKEN_BITS).astype(np.int64)]
    ids[:, 1] = keys & _TOKEN_MASK
    ids[:, 0] = keys >> _TOKEN_BITS
    return ids
