"""Native, reference and oracle on random and adversarial input. A case is drawn from its number alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from megatron_graft.bank.manifest import MAX_ORDER
from megatron_graft.bank.reader import Bank
from megatron_graft.lookup.index import open_index
from megatron_graft.ngram.oracle import brute_force_lookup
from tests.helpers.banks import EOD, Key

IMPLEMENTATIONS = ("native", "reference")


def oracle(
    bank: Bank, tokens_BS: np.ndarray, eod: int | None, starts_BS: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The oracle on each document by itself: it knows nothing of document starts."""
    rows, orders = np.empty(tokens_BS.shape, np.int64), np.empty(tokens_BS.shape, np.uint8)
    keys = bank.rows_of_keys()
    for sequence in range(len(tokens_BS)):
        starts = [] if starts_BS is None else np.flatnonzero(starts_BS[sequence]).tolist()
        edges = [0, *starts, tokens_BS.shape[1]]
        for begin, end in zip(edges[:-1], edges[1:], strict=True):
            here = np.s_[sequence : sequence + 1, begin:end]
            rows[here], orders[here] = brute_force_lookup(keys, tokens_BS[here], eod, bank.min_order, bank.max_order)
    return rows, orders


def assert_all_agree(
    bank: Bank, tokens_BS: np.ndarray, eod: int | None = EOD, starts_BS: np.ndarray | None = None
) -> np.ndarray:
    """Check every implementation against the oracle; return the rows."""
    expected_rows, expected_orders = oracle(bank, tokens_BS, eod, starts_BS)
    for implementation in IMPLEMENTATIONS:
        index = open_index(bank, implementation)
        rows, orders = index.lookup(tokens_BS, eod=eod, document_starts_BS=starts_BS)
        assert (rows.dtype, orders.dtype) == (np.int64, np.uint8)
        np.testing.assert_array_equal(rows, expected_rows, err_msg=implementation)
        np.testing.assert_array_equal(orders, expected_orders, err_msg=implementation)
    return expected_rows


@dataclass(frozen=True)
class Case:
    """A random bank and a random batch that hits it often."""

    vocab_size: int
    keys: list[Key]
    tokens_BS: np.ndarray
    starts_BS: np.ndarray | None
    eod: int | None


def draw_case(number: int) -> Case:
    rng = np.random.default_rng(number)
    vocab_size = int(rng.choice([2, 3, 5, 50, 2**20]))
    orders = rng.choice([1, 2, 3, 4, 5, 8], size=rng.integers(1, 5), replace=False)  # holes are likely
    alphabet = np.unique(rng.integers(1, vocab_size, 4)) if vocab_size > 50 else np.arange(1, vocab_size)
    keys = {tuple(rng.choice(alphabet, order).tolist()) for order in rng.choice(orders, 60)}
    pieces = [list(key) for key in keys] + [[EOD], [EOD, EOD], [-1], [vocab_size], [2**31 - 1], [-(2**31)]]
    sequences, length = rng.integers(1, 5), rng.integers(1, 60)
    tokens: list[int] = []
    while len(tokens) < sequences * length:
        noise = rng.choice(alphabet, rng.integers(0, 3)).tolist()
        tokens += pieces[rng.integers(len(pieces))] + noise
    batch = np.array(tokens[: sequences * length]).reshape(sequences, length)
    return Case(
        vocab_size=vocab_size,
        keys=sorted(keys),
        tokens_BS=batch.astype(rng.choice([np.int32, np.int64])),
        starts_BS=rng.random(batch.shape) < 0.15 if rng.random() < 0.5 else None,
        eod=[EOD, EOD, int(alphabet[0]), None][rng.integers(4)],
    )


@pytest.mark.parametrize("number", range(80))
def test_all_agree_on_random_input(bank_of, number):
    case = draw_case(number)
    bank = bank_of(case.keys, vocab_size=case.vocab_size)
    assert_all_agree(bank, case.tokens_BS, case.eod, case.starts_BS)


def test_random_input_holds_what_it_is_meant_to():
    """The cases above are worth something only if they hit, miss, restart and go out of range."""
    cases = [draw_case(number) for number in range(80)]
    assert {case.tokens_BS.dtype.name for case in cases} == {"int32", "int64"}
    assert {case.vocab_size for case in cases} == {2, 3, 5, 50, 2**20}
    assert any(case.starts_BS is None for case in cases) and any(case.eod is None for case in cases)
    lengths = [sorted({len(key) for key in case.keys}) for case in cases]
    assert any(len(orders) < orders[-1] - orders[0] + 1 for orders in lengths)  # orders with holes
    assert any(case.tokens_BS.shape[1] < orders[-1] for case, orders in zip(cases, lengths, strict=True))
    not_closed = [any(key[1:] and key[1:] not in case.keys for key in case.keys) for case in cases]
    assert any(not_closed)


def test_random_input_is_hit_and_missed(bank_of):
    case = draw_case(3)
    rows = assert_all_agree(bank_of(case.keys, vocab_size=case.vocab_size), case.tokens_BS)
    assert (rows >= 0).any() and (rows < 0).any()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (3, 2)])
def test_empty_and_short_batches(bank_of, dtype, shape):
    assert_all_agree(bank_of([(1, 2), (1, 1, 1, 2)]), np.ones(shape, dtype=dtype))


def test_all_equal_tokens(bank_of):
    bank = bank_of([(7,) * order for order in (1, 2, 4, 6)])
    rows = assert_all_agree(bank, np.full((2, 30), 7, dtype=np.int32))
    assert rows[0, :7].tolist() == [0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("pattern", [[EOD], [EOD, 1], [1, EOD], [1, 1, EOD], [EOD, 1, 1]])
def test_eod_everywhere(bank_of, pattern):
    tokens = np.array([(pattern * 10)[:17]], dtype=np.int64)
    assert_all_agree(bank_of([(1,), (1, 1), (1, 1, 1)]), tokens)


def test_every_position_starting_a_document_leaves_single_tokens(bank_of):
    bank = bank_of([(1,), (1, 1)])
    rows = assert_all_agree(bank, np.ones((2, 9), dtype=np.int32), starts_BS=np.ones((2, 9), dtype=bool))
    assert (rows == 0).all()


@pytest.mark.parametrize("token", [-1, -(2**31), 50, 51, 2**31 - 1])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_an_id_outside_the_vocabulary_is_in_no_match(bank_of, token, dtype):
    bank = bank_of([(1,), (2,), (1, 2), (1, 1, 1), (49, 49)], vocab_size=50)
    tokens = np.array([[1, 2, token, 2, token, token, 1, 2, 49, 49, token]], dtype=dtype)
    rows = assert_all_agree(bank, tokens)
    assert (rows[tokens == token] == -1).all()


@pytest.mark.parametrize("high", [2**32, 2**33, -(2**32), 2**62])
def test_ids_of_64_bits_are_not_cut_to_32(bank_of, high):
    bank = bank_of([(1,), (1, 2), (2, 1)])
    rows = assert_all_agree(bank, np.array([[1 + high, 2, 1, 2 + high]], dtype=np.int64))
    assert rows[0, 0] == rows[0, 3] == -1


def test_padding_of_short_keys_is_not_matched_by_negative_ids(bank_of):
    bank = bank_of([(1, 2), (1, 2, 3, 4)])
    assert_all_agree(bank, np.array([[-1, -1, 1, 2], [-1, 1, 2, 3]], dtype=np.int32))


def test_the_longest_order_a_bank_can_have(bank_of):
    rng = np.random.default_rng(0)
    longest = tuple(rng.integers(1, 50, MAX_ORDER).tolist())
    bank = bank_of([longest, longest[-5:], longest[-1:]])
    tokens = np.array([[5, *longest], [*longest[1:], 5, 5]], dtype=np.int64)
    assert_all_agree(bank, tokens)


def test_a_bank_of_many_keys(bank_of):
    """Enough keys for long probe sequences; looked up one key a sequence, so the oracle is not needed."""
    keys = [(a, b) for a in range(1, 150) for b in range(1, 150)]
    bank = bank_of(keys, vocab_size=150)
    rows_of_keys = bank.rows_of_keys()
    expected = np.array([rows_of_keys[key] for key in keys])
    for implementation in IMPLEMENTATIONS:
        rows, orders = open_index(bank, implementation).lookup(np.array(keys, dtype=np.int32), eod=EOD)
        np.testing.assert_array_equal(rows[:, 1], expected)
        assert (orders[:, 0] == 0).all() and (orders[:, 1] == 2).all()
