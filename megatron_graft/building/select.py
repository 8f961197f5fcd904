"""Which n-grams get a row: the most frequent ones, over all orders or so many of each, that have a text.

Shapes: N n-grams; ids are right-aligned in ``[N, max_order]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from megatron_graft.bank.keys import UNUSED, BankKeys, canonical_order
from megatron_graft.errors import BankError, ConfigError
from megatron_graft.log import Progress, get_logger

RULES = ("special", "no_text", "blank")
"""Why an n-gram is passed over: special tokens alone; no text of its own (part of a multi-byte character, or a
special token among others); white space alone."""


class NgramTokenizer(Protocol):
    """What building needs of the recipient's tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def eod(self) -> int:
        """Id of the end-of-document token."""

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 that tells this tokenizer from any other."""

    @property
    def num_bytes_of_ids(self) -> np.ndarray:
        """int32 ``[vocab_size]``: UTF-8 bytes each id stands for; 0 for special tokens."""

    def ngram_text(self, ids: Sequence[int]) -> str | None:
        """The n-gram's own text, leading space kept; None if it has none."""


class CandidateNgrams(Protocol):
    """Counted n-grams to choose from (see :class:`~megatron_graft.building.count.CountedNgrams`)."""

    @property
    def orders(self) -> tuple[int, ...]:
        """The orders that were counted."""

    def count_histogram(self, order: int) -> tuple[np.ndarray, np.ndarray]:
        """Counts that occur, int64, ascending, and how many n-grams have each, int64."""

    def ngrams_with_at_least(self, order: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 ``[N, order]`` and counts int64 ``[N]`` of all n-grams with at least that count."""


@dataclass(frozen=True, kw_only=True)
class Quota:
    """How many n-grams to take of the most frequent ones."""

    num_rows: int | None
    """Over all orders; None: all that were counted."""
    by_order: Mapping[int, int] = field(default_factory=dict)
    """Order -> at most so many of that order, in place of ``num_rows``."""

    def groups(self, orders: Sequence[int]) -> list[tuple[tuple[int, ...], int | None]]:
        """Orders that share a limit, and the limit.

        Raises:
            ConfigError: a limit is no number of rows, or an order with a limit is not counted.
        """
        if self.num_rows is not None and self.num_rows < 1:
            raise ConfigError("--num-rows", "is not a number of rows", got=self.num_rows, expected="at least 1, or all")
        if not self.by_order:
            return [(tuple(orders), self.num_rows)]
        expected = "ORDER=ROWS with orders of --orders and at least 1 row in all"
        wrong = {order: rows for order, rows in self.by_order.items() if order not in orders or rows < 0}
        if wrong or not sum(self.by_order.values()):
            got = " ".join(f"{order}={rows}" for order, rows in (wrong or self.by_order).items())
            raise ConfigError("--rows-by-order", "cannot be met", got=got, expected=expected)
        return [((order,), rows) for order, rows in self.by_order.items() if rows]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The chosen n-grams in bank order, the text of each, and how many were passed over by which rule."""

    keys: BankKeys
    texts: list[str]
    skipped: dict[str, int]

    def facts(self) -> dict[str, Any]:
        """What a bank's provenance and report tell of the selection."""
        orders = np.unique(self.keys.key_orders).tolist()
        without_suffix = suffix_gaps(self.keys)
        return {
            "rows_by_order": {str(order): int((self.keys.key_orders == order).sum()) for order in orders},
            "smallest_count": int(self.keys.key_counts.min()),
            "skipped": self.skipped,
            "suffix_closed": without_suffix == 0,
            "rows_without_suffix": without_suffix,
        }


def select_ngrams(candidates: CandidateNgrams, tokenizer: NgramTokenizer, quota: Quota) -> Selection:
    """Choose the most frequent n-grams that have a text.

    Ties are broken by order, then by ids, ascending, so the same counts always give the same choice. Only as many
    candidates are put together as are needed.

    Raises:
        ConfigError: the quota cannot be met.
        BankError: no n-gram qualifies.
    """
    skipped = dict.fromkeys(RULES, 0)
    chosen: list[BankKeys] = []
    texts: list[str] = []
    for orders, limit in quota.groups(candidates.orders):
        keys, more = _choose_group(candidates, orders, limit, tokenizer, max(candidates.orders), skipped)
        chosen.append(keys)
        texts += more
    if not texts:
        total = sum(int(candidates.count_histogram(order)[1].sum()) for order in candidates.orders)
        found = ", ".join(f"{rule}: {number:,}" for rule, number in skipped.items())
        raise BankError(
            "--min-count", "leaves no n-gram with a text", got=f"{total:,} candidates, {found}",
            remedy="Lower it, or give more text.",
        )  # fmt: skip
    keys = _joined(chosen)
    if len(chosen) > 1:
        places = canonical_order(keys)
        keys, texts = take_keys(keys, places), [texts[place] for place in places]
    return Selection(keys=keys, texts=texts, skipped=skipped)


def _choose_group(
    candidates: CandidateNgrams,
    orders: tuple[int, ...],
    limit: int | None,
    tokenizer: NgramTokenizer,
    max_order: int,
    skipped: dict[str, int],
) -> tuple[BankKeys, list[str]]:
    """The first ``limit`` n-grams of some orders that have a text; adds to ``skipped``."""
    histogram = _histogram(candidates, orders)
    total = int(histogram[1].sum())
    take = total if limit is None else min(total, limit + limit // 8 + 64)
    while True:
        keys = _most_frequent(candidates, orders, _count_that_leaves(histogram, take), max_order)
        passed_over = dict.fromkeys(RULES, 0)
        rows, texts = _with_text(keys, tokenizer, limit, passed_over)
        if take == total or len(texts) == limit:
            break
        take = min(total, 2 * take)
    for rule, number in passed_over.items():
        skipped[rule] += number
    if limit is not None and len(texts) < limit:
        named = ", ".join(map(str, orders))
        get_logger().warning("only %s n-grams of order %s qualify of %s asked for", f"{len(texts):,}", named, limit)
    return take_keys(keys, rows), texts


def _histogram(candidates: CandidateNgrams, orders: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Counts, ascending, and how many n-grams of all ``orders`` have each."""
    counts, numbers = zip(*(candidates.count_histogram(order) for order in orders), strict=True)
    distinct, places = np.unique(np.concatenate(counts), return_inverse=True)
    together = np.zeros(len(distinct), dtype=np.int64)
    np.add.at(together, places, np.concatenate(numbers))
    return distinct, together


def _count_that_leaves(histogram: tuple[np.ndarray, np.ndarray], take: int) -> int:
    """The largest count that at least ``take`` n-grams have or exceed."""
    counts, numbers = histogram
    if not len(counts):
        return 1
    reached = np.cumsum(numbers[::-1])
    return int(counts[::-1][min(int(np.searchsorted(reached, take)), len(counts) - 1)])


def _most_frequent(candidates: CandidateNgrams, orders: Sequence[int], count: int, max_order: int) -> BankKeys:
    """All n-grams of some orders with at least a count, in bank order."""
    blocks = []
    for order in orders:
        ids, counts = candidates.ngrams_with_at_least(order, count)
        key_ids = np.full((len(counts), max_order), UNUSED, dtype=np.int32)
        key_ids[:, max_order - order :] = ids
        key_orders = np.full(len(counts), order, dtype=np.uint8)
        blocks.append(BankKeys(key_ids=key_ids, key_orders=key_orders, key_counts=counts))
    keys = _joined(blocks)
    return take_keys(keys, canonical_order(keys))


def _joined(blocks: Sequence[BankKeys]) -> BankKeys:
    return BankKeys(
        key_ids=np.concatenate([block.key_ids for block in blocks]),
        key_orders=np.concatenate([block.key_orders for block in blocks]),
        key_counts=np.concatenate([block.key_counts for block in blocks]),
    )


def take_keys(keys: BankKeys, rows: np.ndarray) -> BankKeys:
    """The keys at some places, in that order."""
    return BankKeys(key_ids=keys.key_ids[rows], key_orders=keys.key_orders[rows], key_counts=keys.key_counts[rows])


def _with_text(
    keys: BankKeys, tokenizer: NgramTokenizer, limit: int | None, skipped: dict[str, int]
) -> tuple[np.ndarray, list[str]]:
    """Places (int64) and texts of the first ``limit`` keys that have a text; counts those passed over."""
    rows: list[int] = []
    texts: list[str] = []
    special = _all_special(keys, tokenizer.num_bytes_of_ids)
    progress = Progress("selecting", len(keys.key_orders), "n-grams")
    for row, ids in enumerate(_id_lists(keys)):
        if len(rows) == limit:
            break
        progress.advance(1)
        text = None if special[row] else tokenizer.ngram_text(ids)
        if text is not None and text.strip():
            rows.append(row)
            texts.append(text)
        else:
            skipped["special" if special[row] else "no_text" if text is None else "blank"] += 1
    return np.array(rows, dtype=np.int64), texts


def _all_special(keys: BankKeys, num_bytes_of_ids: np.ndarray) -> np.ndarray:
    """Boolean ``[N]``: the keys that hold nothing but special tokens."""
    has_text = np.append(num_bytes_of_ids > 0, False)  # at the end, for UNUSED
    return ~has_text[keys.key_ids].any(axis=1)


def _id_lists(keys: BankKeys) -> Iterator[list[int]]:
    max_order = keys.key_ids.shape[1]
    for start in range(0, len(keys.key_orders), 1 << 16):
        block = slice(start, start + (1 << 16))
        for ids, order in zip(keys.key_ids[block].tolist(), keys.key_orders[block].tolist(), strict=True):
            yield ids[max_order - order :]


def suffix_gaps(keys: BankKeys) -> int:
    """How many keys, longer than the shortest order, have a suffix (all but the oldest token) that is no key.

    0 for any selection by count alone over all orders: a suffix is at least as frequent. The index adds an entry
    without a row for a missing suffix, so that lookups stay exact.
    """
    missing = 0
    max_order = keys.key_ids.shape[1]
    orders = np.unique(keys.key_orders).tolist()
    for order in orders[1:]:
        longer = keys.key_ids[keys.key_orders == order, max_order - order + 1 :]
        suffixes = keys.key_ids[keys.key_orders == order - 1, max_order - order + 1 :]
        missing += int((~np.isin(_as_scalars(longer), _as_scalars(suffixes))).sum())
    return missing


def _as_scalars(ids: np.ndarray) -> np.ndarray:
    """One comparable value a row: ``[N, n]`` -> ``[N]`` byte strings of the ids, big-endian."""
    wide = np.ascontiguousarray(ids.astype(">u4"))
    return wide.view(f"S{4 * wide.shape[1]}").reshape(-1)
