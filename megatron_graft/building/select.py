"""Which n-grams get a row: the most frequent ones, over all orders, that have a text the donor can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_graft.bank.keys import UNUSED, BankKeys, canonical_order
from megatron_graft.building.count import OrderCounts
from megatron_graft.errors import BankError, ConfigError
from megatron_graft.log import get_logger


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

    def ngram_text(self, ids: Sequence[int]) -> str | None:
        """The n-gram's own text, leading space kept; None if it has none."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The chosen n-grams in bank order, the text of each, and how many were passed over by which rule."""

    keys: BankKeys
    texts: list[str]
    skipped: dict[str, int]


def select_ngrams(counts: Sequence[OrderCounts], tokenizer: NgramTokenizer, num_rows: int) -> Selection:
    """Choose the ``num_rows`` most frequent n-grams that have a text.

    Ties are broken by order, then by ids, ascending. Passed over: n-grams with no text of their own
    (``no_text``: part of a multi-byte character, a special token) and those of white space alone (``blank``).

    Args:
        counts: the candidates, as :func:`~megatron_graft.building.count.count_ngrams` returns them.
        tokenizer: gives their texts.
        num_rows: how many to choose; fewer are chosen, with a warning, if there are no more.

    Raises:
        ConfigError: ``num_rows`` is not positive.
        BankError: no n-gram qualifies.
    """
    if num_rows < 1:
        raise ConfigError("--num-rows", "is not a number of rows", got=num_rows, expected="at least 1")
    candidates = _candidates(counts)
    total = len(candidates.key_orders)
    take = min(total, 2 * num_rows)
    while True:
        selection = _choose(_most_frequent(candidates, take), tokenizer, num_rows)
        if len(selection.texts) == num_rows or take == total:
            break
        take = min(total, 2 * take)
    chosen = len(selection.texts)
    if chosen == 0:
        raise BankError(
            "--min-count",
            "leaves no n-gram with a text",
            got=f"{total:,} candidates, {_listed(selection.skipped)}",
            remedy="Lower it, or give more text.",
        )
    if chosen < num_rows:
        get_logger().warning("only %s n-grams qualify of the %s asked for", f"{chosen:,}", f"{num_rows:,}")
    return selection


def _listed(skipped: dict[str, int]) -> str:
    return ", ".join(f"{rule}: {number:,}" for rule, number in skipped.items())


def _candidates(counts: Sequence[OrderCounts]) -> BankKeys:
    """All n-grams of all orders as keys, in no particular order."""
    max_order = max(level.order for level in counts)
    blocks = []
    for level in counts:
        ids = np.full((len(level.counts), max_order), UNUSED, dtype=np.int32)
        ids[:, max_order - level.order :] = level.ids
        blocks.append((ids, np.full(len(ids), level.order, dtype=np.uint8), level.counts.astype(np.int64)))
    ids, orders, numbers = (np.concatenate(column) for column in zip(*blocks, strict=True))
    return BankKeys(key_ids=ids, key_orders=orders, key_counts=numbers)


def _most_frequent(keys: BankKeys, take: int) -> BankKeys:
    """At least the ``take`` first keys of the bank order, in that order: ties of the last count included."""
    if take == 0:
        return keys
    least = np.partition(keys.key_counts, -take)[-take]
    frequent = _rows(keys, np.flatnonzero(keys.key_counts >= least))
    return _rows(frequent, canonical_order(frequent))


def _rows(keys: BankKeys, rows: np.ndarray) -> BankKeys:
    return BankKeys(key_ids=keys.key_ids[rows], key_orders=keys.key_orders[rows], key_counts=keys.key_counts[rows])


def _choose(keys: BankKeys, tokenizer: NgramTokenizer, num_rows: int) -> Selection:
    texts: list[str] = []
    chosen: list[int] = []
    skipped = {"no_text": 0, "blank": 0}
    max_order = keys.key_ids.shape[1]
    for row, (ids, order) in enumerate(zip(keys.key_ids, keys.key_orders, strict=True)):
        if len(chosen) == num_rows:
            break
        text = tokenizer.ngram_text(ids[max_order - int(order) :].tolist())
        if text is None:
            skipped["no_text"] += 1
        elif not text.strip():
            skipped["blank"] += 1
        else:
            chosen.append(row)
            texts.append(text)
    return Selection(keys=_rows(keys, np.array(chosen, dtype=np.int64)), texts=texts, skipped=skipped)
