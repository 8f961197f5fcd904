from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_graft.bank import keys as keys_module
from megatron_graft.bank.arrays import ArrayError
from megatron_graft.bank.keys import BankKeys, canonical_order, check_keys, check_keys_distinct
from megatron_graft.errors import BankFormatError
from tests.helpers.banks import keys_of, tokenizer_identity

COUNTS = {(5, 6): 9, (1, 2, 3): 9, (1, 2): 7, (1, 3): 7, (2, 1): 7, (4, 4, 4): 2}


def check(keys: BankKeys, orders: tuple[int, ...] = (2, 3)) -> None:
    check_keys(keys, tokenizer_identity(vocab_size=10, eod=0), orders, "the keys")


def edited(name: str, row: int, value: object) -> BankKeys:
    keys = keys_of(COUNTS)
    array = getattr(keys, name).copy()
    array[row] = value
    return dataclasses.replace(keys, **{name: array})


def test_rows_stand_by_count_then_order_then_ids():
    shuffled = dict(sorted(COUNTS.items(), key=lambda item: hash(item)))
    keys = keys_of(shuffled)
    expected = sorted(COUNTS, key=lambda key: (-COUNTS[key], len(key), key))
    found = [tuple(i for i in ids if i >= 0) for ids in keys.key_ids.tolist()]
    assert found == expected
    assert keys.key_counts.tolist() == [COUNTS[key] for key in expected]
    assert canonical_order(keys).tolist() == list(range(len(COUNTS)))


@pytest.mark.parametrize("chunk", [1, 2, 4, 1000])
def test_good_keys_pass(monkeypatch, chunk):
    monkeypatch.setattr(keys_module, "_CHUNK_ROWS", chunk)
    check(keys_of(COUNTS))
    check_keys_distinct(keys_of(COUNTS), "the keys")


@pytest.mark.parametrize("chunk", [1, 2, 4, 1000])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (edited("key_orders", 0, 4), "row 0 has an unlisted order"),
        (edited("key_orders", 0, 0), "row 0 has an unlisted order"),
        (edited("key_counts", 5, 0), "row 5 has a count below 1"),
        (edited("key_counts", 5, -(2**63)), "row 5 has a count below 1"),
        (edited("key_ids", 0, [7, 5, 6]), "row 0 has ids to the left of its tokens"),
        (edited("key_ids", 0, [-2, 5, 6]), "row 0 has ids to the left of its tokens"),
        (edited("key_orders", 1, 2), "row 1 has ids to the left of its tokens"),
        (edited("key_ids", 1, [-1, 2, 3]), "row 1 has a token outside the vocabulary"),
        (edited("key_ids", 5, [4, 4, 10]), "row 5 has a token outside the vocabulary"),
        (edited("key_ids", 5, [4, 0, 4]), "row 5 contains the end-of-document token"),
        (edited("key_counts", 2, 10), "row 2 is out of place"),
        (edited("key_counts", 0, 8), "row 1 is out of place"),
        (edited("key_ids", 2, [-1, 1, 4]), "row 3 is out of place"),
        (edited("key_ids", 2, [-1, 1, 3]), "row 3 is out of place"),
    ],
)
def test_keys_at_odds_with_the_identity_are_refused(keys, message, monkeypatch, chunk):
    monkeypatch.setattr(keys_module, "_CHUNK_ROWS", chunk)
    with pytest.raises(BankFormatError, match=f"^the keys: {message}"):
        check(keys)


def test_a_listed_order_that_no_key_has_is_refused():
    with pytest.raises(BankFormatError, match=r"no key of a listed order .got \[4\]"):
        check(keys_of({**COUNTS, (1, 2, 3, 4, 5): 1}), (2, 3, 4, 5))
    with pytest.raises(BankFormatError, match="too few columns"):
        check(keys_of(COUNTS), (2, 3, 4))


def test_a_key_that_is_there_twice_is_refused():
    twice = edited("key_ids", 5, [1, 2, 3])
    check(twice)  # with another count it stands in order
    with pytest.raises(BankFormatError, match="row [15] has a key that another row has too"):
        check_keys_distinct(twice, "the keys")


@pytest.mark.parametrize(("name", "dtype"), [("key_ids", np.int64), ("key_orders", np.int32), ("key_counts", np.int32)])
def test_another_dtype_is_refused(name, dtype):
    keys = keys_of(COUNTS)
    with pytest.raises(ArrayError, match=f"^{name}: has the wrong dtype"):
        check(dataclasses.replace(keys, **{name: getattr(keys, name).astype(dtype)}))
