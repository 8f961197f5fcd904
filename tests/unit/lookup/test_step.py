"""One token at a time, as generation does it: the answers of the whole-sequence call."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_graft.bank.arrays import ArrayError
from megatron_graft.bank.reader import Bank
from megatron_graft.lookup.index import SuffixIndex, open_index
from tests.helpers.banks import EOD, make_bank

VOCAB_SIZE = 6


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    rng = np.random.default_rng(0)
    keys = {tuple(rng.integers(1, VOCAB_SIZE, rng.integers(1, 9)).tolist()) for _ in range(400)}
    return make_bank(tmp_path_factory.mktemp("step") / "bank", dict.fromkeys(sorted(keys), 1), vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module", params=["native", "reference"])
def index(request: pytest.FixtureRequest, bank: Bank) -> SuffixIndex:
    return open_index(bank, request.param)


def steps(index: SuffixIndex, tokens_BS: np.ndarray, eod: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Every position's answer, asked for one at a time."""
    state = index.start(len(tokens_BS))
    answers = [index.step(state, np.ascontiguousarray(column), eod=eod) for column in tokens_BS.T]
    return np.stack([rows for rows, _ in answers], 1), np.stack([orders for _, orders in answers], 1)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.lists(st.integers(-1, VOCAB_SIZE), min_size=20, max_size=20), min_size=1, max_size=4),
    eod=st.sampled_from([EOD, 3, None]),
    dtype=st.sampled_from([np.int32, np.int64]),
)
def test_steps_answer_as_the_whole_sequence_does(index, tokens, eod, dtype):
    tokens_BS = np.array(tokens, dtype=dtype)
    rows, orders = steps(index, tokens_BS, eod)
    expected_rows, expected_orders = index.lookup(tokens_BS, eod=eod)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(orders, expected_orders)


def test_more_sequences_than_one_walk_takes(index):
    tokens = np.random.default_rng(2).integers(0, VOCAB_SIZE, (5000, 9))
    rows, orders = steps(index, tokens, EOD)
    np.testing.assert_array_equal(rows, index.lookup(tokens, eod=EOD)[0])
    assert set(np.unique(orders)) >= {0, 1, 2, 3}


def test_beams_may_be_reordered_and_become_more(index):
    rng = np.random.default_rng(3)
    parents = np.array([2, 0, 2, 1, 1])
    before, after = rng.integers(1, VOCAB_SIZE, (3, 7)), rng.integers(1, VOCAB_SIZE, (5, 4))
    state = index.start(3)
    for column in before.T:
        index.step(state, np.ascontiguousarray(column), eod=EOD)
    state.reorder(parents)
    assert state.sequences == 5
    whole = np.concatenate([before[parents], after], axis=1)
    expected, _ = index.lookup(whole, eod=EOD)
    for position, column in enumerate(after.T):
        rows, _ = index.step(state, np.ascontiguousarray(column), eod=EOD)
        np.testing.assert_array_equal(rows, expected[:, 7 + position])


def test_a_restarted_sequence_remembers_nothing_and_the_others_do(index, bank):
    key = next(ids for ids in bank.rows_of_keys() if len(ids) == 2)
    state = index.start(2)
    index.step(state, np.array([key[0]] * 2), eod=EOD)
    state.restart(1)
    rows, orders = index.step(state, np.array([key[1]] * 2), eod=EOD)
    assert orders[0] == 2 and orders[1] < 2 and rows[0] == bank.rows_of_keys()[key]


@pytest.mark.parametrize("wrong", [[0, 3], [-1], [2**40]])
def test_a_sequence_that_is_not_there_is_refused_and_changes_nothing(index, wrong):
    state = index.start(3)
    with pytest.raises(IndexError):
        state.reorder(np.array(wrong))
    assert state.sequences == 3
    for sequence in (3, -1):
        with pytest.raises(IndexError, match=f"sequence {sequence} of 3"):
            state.restart(sequence)


@pytest.mark.parametrize("wrong", [np.array([0.9, 1.9]), [0, 1], np.array([[0, 1]]), np.arange(4)[::2]])
def test_parents_are_taken_as_they_are_or_refused(index, wrong):
    state = index.start(3)
    with pytest.raises(ArrayError, match="parents_B"):
        state.reorder(wrong)
    assert state.sequences == 3
    state.reorder(np.array([2, 0], dtype=np.int32))
    assert state.sequences == 2


@pytest.mark.parametrize("other", ["native", "reference"])
def test_the_state_of_another_index_is_refused(index, bank, other):
    """Of as many tokens, so that nothing but the index tells the states apart."""
    with pytest.raises(ArrayError, match=r"^state: was started by another index\. Pass one"):
        index.step(open_index(bank, other).start(2), np.array([1, 2]), eod=EOD)


def test_outputs_are_reused_and_checked(index):
    state = index.start(2)
    rows, orders = np.empty(2, np.int64), np.empty(2, np.uint8)
    answer = index.step(state, np.array([1, 2]), eod=EOD, rows_out=rows, orders_out=orders)
    assert answer[0] is rows and answer[1] is orders
    for tokens in (np.array([1, 2, 3]), np.array([1.0, 2.0]), np.array([[1, 2]])):
        with pytest.raises(ArrayError):
            index.step(state, tokens, eod=EOD)
    with pytest.raises(ArrayError):
        index.step(state, np.array([1, 2]), eod=EOD, rows_out=np.empty(2, np.int32))
