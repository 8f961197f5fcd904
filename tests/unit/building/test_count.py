from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megatron_graft.building.count import count_ngrams
from megatron_graft.errors import ConfigError


def brute_force(documents: list[np.ndarray], order: int, eod: int | None, min_count: int) -> list:
    counts: Counter[tuple[int, ...]] = Counter()
    for document in documents:
        tokens = document.tolist()
        for start in range(len(tokens) - order + 1):
            ngram = tuple(tokens[start : start + order])
            if eod not in ngram:
                counts[ngram] += 1
    return sorted((ngram, count) for ngram, count in counts.items() if count >= min_count)


def as_pairs(level) -> list:
    return list(zip(map(tuple, level.ids.tolist()), level.counts.tolist(), strict=True))


@pytest.mark.parametrize("orders", [(2,), (2, 3, 4), (3, 4, 5), (8,), (2, 3, 4, 5, 6, 7, 8)])
@pytest.mark.parametrize("min_count", [1, 2, 3])
def test_counts_equal_brute_force(orders: tuple[int, ...], min_count: int) -> None:
    generator = np.random.default_rng([min_count, *orders])
    for trial in range(12):
        vocab, eod = int(generator.integers(2, 6)), 0 if trial % 3 else None
        sizes = generator.integers(0, 40, size=generator.integers(1, 9))
        documents = [generator.integers(0, vocab, size=size).astype(np.uint16) for size in sizes]
        levels = count_ngrams(
            documents, orders=orders, eod=eod, min_count=min_count, chunk_tokens=int(generator.integers(1, 80))
        )
        assert [level.order for level in levels] == list(orders)
        for level in levels:
            assert as_pairs(level) == brute_force(documents, level.order, eod, min_count)


def test_no_ngram_crosses_a_document_or_holds_an_eod() -> None:
    documents = [np.array([1, 2, 9]), np.array([3, 4]), np.array([5, 9, 6, 7])]
    (level,) = count_ngrams(documents, orders=[2], eod=9)
    assert level.ids.tolist() == [[1, 2], [3, 4], [6, 7]]


def test_the_largest_ids_are_counted_exactly() -> None:
    top = 2**31 - 1
    document = np.array([top, 0, top, 0, top], dtype=np.int64)
    levels = count_ngrams([document], orders=[2, 3], eod=None)
    assert as_pairs(levels[0]) == [((0, top), 2), ((top, 0), 2)]
    assert as_pairs(levels[1]) == [((0, top, 0), 1), ((top, 0, top), 2)]


def test_a_one_shot_iterator_is_counted_at_every_order() -> None:
    documents = [np.array([1, 2, 3, 1, 2, 3])]
    levels = count_ngrams(iter(documents), orders=[2, 3], eod=None)
    assert [len(level.counts) for level in levels] == [3, 3]


def test_documents_shorter_than_every_order_give_no_ngrams() -> None:
    levels = count_ngrams([np.array([1]), np.array([], dtype=np.int32)], orders=[2, 3], eod=None)
    assert [level.ids.shape for level in levels] == [(0, 2), (0, 3)]


@pytest.mark.parametrize("orders", [(), (1, 2), (2, 4), (3, 2), (2, 2), (2, 3, 4, 5, 6, 7, 8, 9)])
def test_unusable_orders_are_refused(orders: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="--orders"):
        count_ngrams([np.array([1, 2])], orders=orders, eod=None)


def test_a_count_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="--min-count.*got 0"):
        count_ngrams([np.array([1, 2])], orders=[2], eod=None, min_count=0)
