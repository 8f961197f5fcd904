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
from megatron_graft.log import Progress

UNUSED = -1
_CHUNK_ROWS = 1 << 18


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
    _check_arrays(keys, orders, where)
    num_rows = len(keys.key_orders)
    progress = Progress(f"check {where}", num_rows, "keys")
    present: set[int] = set()
    for begin in range(0, num_rows, _CHUNK_ROWS):
        end = min(begin + _CHUNK_ROWS, num_rows)
        check_key_range(keys, (begin, end), tokenizer, orders, where)
        present.update(np.unique(keys.key_orders[begin:end]).tolist())
        progress.advance(end - begin)
    if missing := set(orders) - present:
        raise BankFormatError(where, "has no key of a listed order", got=sorted(missing), expected=list(orders))


def check_key_range(
    keys: BankKeys, span: tuple[int, int], tokenizer: TokenizerIdentity, orders: tuple[int, ...], where: object
) -> None:
    """Check rows ``span[0]`` to ``span[1]``, and that each of them comes after the row before it.

    Raises:
        BankFormatError: naming the first row at fault.
    """
    # The row before the first one is needed to see whether they are in order.
    first = max(0, span[0] - 1)
    ids, key_orders, counts = (array[first : span[1]] for array in (keys.key_ids, keys.key_orders, keys.key_counts))
    max_order = ids.shape[1]
    used = np.arange(max_order) >= max_order - key_orders[:, None].astype(np.int64)
    in_vocab = (ids >= 0) & (ids < tokenizer.vocab_size)
    sorted_by = "count descending, order ascending, ids ascending"
    refuse = partial(_refuse, where, first)
    refuse(~np.isin(key_orders, orders), key_orders, "has an unlisted order", list(orders))
    refuse(counts < 1, counts, "has a count below 1", "at least 1")
    refuse(~used & (ids != UNUSED), ids, "has ids to the left of its tokens", f"{UNUSED} there")
    refuse(used & ~in_vocab, ids, "has a token outside the vocabulary", f"below {tokenizer.vocab_size}")
    refuse(used & (ids == tokenizer.eod), ids, "contains the end-of-document token", "keys without it")
    refuse(_misplaced(ids, key_orders, counts), ids, "is out of place", sorted_by)


def _check_arrays(keys: BankKeys, orders: tuple[int, ...], where: object) -> None:
    check_array("key_ids", keys.key_ids, dtypes=[np.int32], shape=(None, None))
    num_rows, max_order = keys.key_ids.shape
    if max_order < max(orders):
        raise BankFormatError(where, "has too few columns", got=max_order, expected=f"at least {max(orders)}")
    check_array("key_orders", keys.key_orders, dtypes=[np.uint8], shape=(num_rows,))
    check_array("key_counts", keys.key_counts, dtypes=[np.int64], shape=(num_rows,))


def check_keys_distinct(keys: BankKeys, where: object) -> None:
    """Refuse a bank that has the same n-gram twice. Sorts all keys.

    Raises:
        BankFormatError: naming a row whose key stands in another row too.
    """
    order = np.lexsort(keys.key_ids.T)
    repeats = np.zeros(len(order), dtype=bool)
    repeats[order[1:]] = (keys.key_ids[order[1:]] == keys.key_ids[order[:-1]]).all(axis=1)
    _refuse(where, 0, repeats, keys.key_ids, "has a key that another row has too", "distinct keys")


def _misplaced(ids: np.ndarray, key_orders: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Boolean: the rows that do not come strictly after the row before them; never the first."""
    after = np.zeros(len(key_orders), dtype=bool)
    after[:1] = True
    tied = ~after[1:]
    for column in (-counts, key_orders, *ids.T):
        after[1:] |= tied & (column[1:] > column[:-1])
        tied &= column[1:] == column[:-1]
    return ~after


def _refuse(
    where: object, first_row: int, wrong: np.ndarray, values: np.ndarray, problem: str, expected: object
) -> None:
    """Raise for the first row that has a true element in ``wrong``; element 0 belongs to row ``first_row``."""
    if not wrong.any():
        return
    place = int(np.argwhere(wrong)[0, 0])
    raise BankFormatError(where, f"row {first_row + place} {problem}", got=values[place].tolist(), expected=expected)
