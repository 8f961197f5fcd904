"""The keys of a bank: which n-gram owns which row, and in which order the rows stand.

Shapes: N rows; a key's ids are right-aligned in ``[N, max_order]``, so that the last column is its newest
token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from megatron_graft.bank.arrays import check_array
from megatron_graft.bank.manifest import TokenizerIdentity
from megatron_graft.errors import BankFormatError

UNUSED = -1


@dataclass(frozen=True, kw_only=True)
class BankKeys:
    """The n-grams of a bank, one a row.

    Attributes:
        key_ids: int32 ``[N, max_order]``, oldest token first, :data:`UNUSED` to the left of a shorter key.
        key_orders: uint8 ``[N]``, number of tokens.
        key_counts: int64 ``[N]``, occurrences in the corpus the bank was counted on.
    """

    key_ids: np.ndarray
    key_orders: np.ndarray
    key_counts: np.ndarray


def canonical_order(keys: BankKeys) -> np.ndarray:
    """The permutation (int64 ``[N]``) that puts keys into a bank's order.

    Count descending, then order ascending, then ids ascending: a prefix of a bank is the bank of its most
    frequent keys, and the same keys always give the same bytes.
    """
    ids_by_significance = keys.key_ids.T[::-1]
    return np.lexsort((*ids_by_significance, keys.key_orders, -keys.key_counts))


def check_keys(keys: BankKeys, tokenizer: TokenizerIdentity, orders: tuple[int, ...], where: object) -> None:
    """Check what a linear pass over the keys can: each one against the identity, and the order they stand in.

    Raises:
        BankFormatError: naming the first row at fault. ``ArrayError`` if an array has the wrong dtype or
            shape.
    """
    ids, key_orders, counts = keys.key_ids, keys.key_orders, keys.key_counts
    check_array("key_ids", ids, dtypes=[np.int32], shape=(None, None))
    num_rows, max_order = ids.shape
    if max_order < max(orders):
        raise BankFormatError(where, "has too few columns", got=max_order, expected=f"at least {max(orders)}")
    check_array("key_orders", key_orders, dtypes=[np.uint8], shape=(num_rows,))
    check_array("key_counts", counts, dtypes=[np.int64], shape=(num_rows,))

    used = np.arange(max_order) >= max_order - key_orders[:, None].astype(np.int64)
    in_vocab = (ids >= 0) & (ids < tokenizer.vocab_size)
    sorted_by = "count descending, order ascending, ids ascending"
    refuse = partial(_refuse, where)
    refuse(~np.isin(key_orders, orders), key_orders, "has an unlisted order", list(orders))
    if missing := set(orders) - set(np.unique(key_orders).tolist()):
        raise BankFormatError(where, "has no key of a listed order", got=sorted(missing), expected=list(orders))
    refuse(counts < 1, counts, "has a count below 1", "at least 1")
    refuse(~used & (ids != UNUSED), ids, "has ids to the left of its tokens", f"{UNUSED} there")
    refuse(used & ~in_vocab, ids, "has a token outside the vocabulary", f"below {tokenizer.vocab_size}")
    refuse(used & (ids == tokenizer.eod), ids, "contains the end-of-document token", "keys without it")
    refuse(_misplaced(keys), ids, "is out of place", sorted_by)


def check_keys_distinct(keys: BankKeys, where: object) -> None:
    """Refuse a bank that has the same n-gram twice. Sorts all keys.

    Raises:
        BankFormatError: naming a row whose key stands in another row too.
    """
    order = np.lexsort(keys.key_ids.T)
    repeats = np.zeros(len(order), dtype=bool)
    repeats[order[1:]] = (keys.key_ids[order[1:]] == keys.key_ids[order[:-1]]).all(axis=1)
    _refuse(where, repeats, keys.key_ids, "has a key that another row has too", "distinct keys")


def _misplaced(keys: BankKeys) -> np.ndarray:
    """Boolean ``[N]``: the rows that do not come strictly after the row before them."""
    after = np.zeros(len(keys.key_orders), dtype=bool)
    after[:1] = True
    tied = ~after[1:]
    for column in (-keys.key_counts, keys.key_orders, *keys.key_ids.T):
        after[1:] |= tied & (column[1:] > column[:-1])
        tied &= column[1:] == column[:-1]
    return ~after


def _refuse(where: object, wrong: np.ndarray, values: np.ndarray, problem: str, expected: object) -> None:
    """Raise for the first row that has a true element in ``wrong``."""
    if not wrong.any():
        return
    row = int(np.argwhere(wrong)[0, 0])
    raise BankFormatError(where, f"row {row} {problem}", got=values[row].tolist(), expected=expected)
