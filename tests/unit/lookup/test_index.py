from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from megatron_graft.bank.arrays import ArrayError
from megatron_graft.bank.extension import MODULE_NAME
from megatron_graft.bank.reader import open_bank
from megatron_graft.errors import BankFormatError, ConfigError, NativeExtensionError
from megatron_graft.lookup.index import open_index
from megatron_graft.lookup.native import NativeIndex
from megatron_graft.lookup.reference import ReferenceIndex
from megatron_graft.ngram.windows import positions_in_document
from tests.helpers.banks import EOD, make_bank

KEYS = [(1, 2), (2, 3), (2, 2), (1, 2, 3), (3, 1, 2, 3)]


def random_tokens(seed: int, shape: tuple[int, int] = (3, 64)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, shape).astype(np.int32)


def test_auto_is_native_and_reference_has_to_be_asked_for(bank_of):
    bank = bank_of(KEYS)
    assert isinstance(open_index(bank), NativeIndex)
    assert isinstance(open_index(bank, "native"), NativeIndex)
    assert isinstance(open_index(bank, "reference"), ReferenceIndex)
    with pytest.raises(ConfigError, match="got fast; expected auto, native or reference"):
        open_index(bank, "fast")


@pytest.mark.parametrize("wanted", ["auto", "native"])
def test_a_missing_extension_is_an_error_and_never_a_slow_answer(bank_of, monkeypatch, wanted):
    bank = bank_of(KEYS)
    monkeypatch.setitem(sys.modules, MODULE_NAME, None)
    with pytest.raises(NativeExtensionError, match="make native"):
        open_index(bank, wanted)
    rows, _ = open_index(bank, "reference").lookup(np.array([[1, 2]]), eod=EOD)
    assert rows.tolist() == [[-1, bank.rows_of_keys()[(1, 2)]]]


def test_an_index_says_which_orders_it_knows(bank_of, implementation):
    index = open_index(bank_of(KEYS), implementation)
    assert (index.min_order, index.max_order) == (2, 4)


def test_changing_a_token_changes_nothing_before_it(bank_of, implementation):
    index = open_index(bank_of(KEYS), implementation)
    tokens = random_tokens(0, (1, 40))
    rows, orders = index.lookup(tokens, eod=EOD)
    changed_something = False
    for position in range(1, 40):
        for token in range(4):
            other = tokens.copy()
            other[0, position] = token
            other_rows, other_orders = index.lookup(other, eod=EOD)
            np.testing.assert_array_equal(other_rows[:, :position], rows[:, :position])
            np.testing.assert_array_equal(other_orders[:, :position], orders[:, :position])
            changed_something |= bool((other_rows != rows).any())
    assert changed_something


def test_nothing_matches_across_a_document_start(bank_of, implementation):
    bank = bank_of(KEYS)
    index, rows_of_keys = open_index(bank, implementation), bank.rows_of_keys()
    tokens = np.array([[3, 1, 2, 3], [3, 1, 2, 3], [3, 1, 2, 3], [3, EOD, 2, 3]], dtype=np.int32)
    starts = np.zeros((4, 4), dtype=bool)
    starts[1, 1] = starts[2, 3] = True
    rows, orders = index.lookup(tokens, eod=EOD, document_starts_BS=starts)
    assert orders.tolist() == [[0, 0, 2, 4], [0, 0, 2, 3], [0, 0, 2, 0], [0, 0, 0, 2]]
    assert rows[:, 3].tolist() == [
        rows_of_keys[(3, 1, 2, 3)],
        rows_of_keys[(1, 2, 3)],
        -1,
        rows_of_keys[(2, 3)],
    ]


def test_sequences_of_a_batch_do_not_see_one_another(bank_of, implementation):
    index = open_index(bank_of(KEYS), implementation)
    tokens = random_tokens(1, (6, 5))
    rows, orders = index.lookup(tokens, eod=EOD)
    for sequence in range(6):
        alone = index.lookup(tokens[sequence : sequence + 1], eod=EOD)
        np.testing.assert_array_equal(rows[sequence], alone[0][0])
        np.testing.assert_array_equal(orders[sequence], alone[1][0])


def test_a_document_start_where_eod_already_made_one_adds_nothing(bank_of, implementation):
    index = open_index(bank_of(KEYS), implementation)
    tokens = random_tokens(2)
    starts = np.zeros(tokens.shape, dtype=bool)
    starts[:, 0] = True
    starts[:, 1:] = tokens[:, :-1] == EOD
    for with_starts, without in zip(
        index.lookup(tokens, eod=None, document_starts_BS=starts & (tokens != EOD)),
        index.lookup(tokens, eod=EOD),
        strict=True,
    ):
        np.testing.assert_array_equal(with_starts, without)


def test_no_match_is_longer_than_its_document(bank_of, implementation):
    index = open_index(bank_of([(1,), *((1,) * order for order in range(2, 7))]), implementation)
    tokens = np.random.default_rng(0).integers(0, 2, (4, 50))
    orders = index.lookup(tokens, eod=EOD)[1]
    longest = np.minimum(positions_in_document(tokens, EOD) + 1, 6)
    np.testing.assert_array_equal(orders, np.where(tokens == EOD, 0, longest))  # every run of ones is a key


def test_given_outputs_are_written_in_full_and_returned(bank_of, implementation):
    index = open_index(bank_of(KEYS), implementation)
    tokens = random_tokens(3)
    rows_out, orders_out = np.full(tokens.shape, 77, np.int64), np.full(tokens.shape, 77, np.uint8)
    rows, orders = index.lookup(tokens, eod=EOD, rows_out=rows_out, orders_out=orders_out)
    assert rows is rows_out and orders is orders_out
    for found, fresh in zip((rows, orders), index.lookup(tokens, eod=EOD), strict=True):
        np.testing.assert_array_equal(found, fresh)


def test_tokens_are_left_alone(bank_of, implementation):
    tokens = random_tokens(4)
    tokens.flags.writeable = False
    open_index(bank_of(KEYS), implementation).lookup(tokens, eod=EOD)


TOKENS = random_tokens(5, (2, 6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokens_BS": TOKENS.astype(np.uint16)},
            "tokens_BS: has the wrong dtype .got uint16; expected int32 or",
        ),
        ({"tokens_BS": TOKENS.astype(np.float32)}, "tokens_BS: has the wrong dtype"),
        ({"tokens_BS": TOKENS.astype(">i4")}, "tokens_BS: has the wrong dtype"),
        ({"tokens_BS": TOKENS[0]}, "tokens_BS: has the wrong shape"),
        ({"tokens_BS": TOKENS.T}, "tokens_BS: is not C-contiguous"),
        ({"tokens_BS": TOKENS[:, ::2]}, "tokens_BS: is not C-contiguous"),
        ({"tokens_BS": TOKENS.tolist()}, "tokens_BS: is not a NumPy array"),
        ({"document_starts_BS": TOKENS.astype(np.uint8)}, "document_starts_BS: has the wrong dtype"),
        ({"document_starts_BS": np.zeros((2, 5), bool)}, "document_starts_BS: has the wrong shape"),
        ({"document_starts_BS": np.zeros((2, 12), bool)[:, ::2]}, "document_starts_BS: is not C-contiguous"),
        ({"rows_out": np.zeros((2, 6), np.int32)}, "rows_out: has the wrong dtype"),
        ({"rows_out": np.zeros((2, 5), np.int64)}, "rows_out: has the wrong shape"),
        ({"rows_out": np.zeros((6, 2), np.int64).T}, "rows_out: is not C-contiguous"),
        ({"rows_out": np.broadcast_to(np.int64(0), (2, 6))}, "rows_out: is not C-contiguous"),
        ({"orders_out": np.zeros((2, 6), np.int8)}, "orders_out: has the wrong dtype"),
        ({"orders_out": np.zeros((3, 6), np.uint8)}, "orders_out: has the wrong shape"),
        ({"orders_out": np.zeros(12, np.uint8)}, "orders_out: has the wrong shape"),
    ],
)
def test_an_array_that_does_not_fit_is_refused_by_name(bank_of, implementation, changes, message):
    index = open_index(bank_of(KEYS), implementation)
    arguments = {"tokens_BS": TOKENS, **changes}
    with pytest.raises(ArrayError, match=f"^{message}"):
        index.lookup(arguments.pop("tokens_BS"), eod=EOD, **arguments)


def test_a_read_only_output_is_refused(bank_of, implementation):
    index = open_index(bank_of(KEYS), implementation)
    for name, dtype in {"rows_out": np.int64, "orders_out": np.uint8}.items():
        output = np.zeros(TOKENS.shape, dtype)
        output.flags.writeable = False
        with pytest.raises(ArrayError, match=f"^{name}: is read-only"):
            index.lookup(TOKENS, eod=EOD, **{name: output})


def test_an_output_that_overlaps_the_tokens_is_refused(bank_of, implementation):
    index = open_index(bank_of(KEYS), implementation)
    tokens = TOKENS.astype(np.int64)
    with pytest.raises(ArrayError, match="^rows_out: shares memory with tokens_BS"):
        index.lookup(tokens, eod=EOD, rows_out=tokens)


def test_the_reference_refuses_a_bank_with_a_repeated_key(bank_of):
    bank = bank_of(KEYS)
    bank.key_ids = bank.key_ids.copy()
    bank.key_ids[1] = bank.key_ids[0]
    with pytest.raises(BankFormatError, match=r"keys\.safetensors: row [01] has a key"):
        open_index(bank, "reference")


def test_arrays_that_are_not_aligned_are_refused(bank_of, implementation):
    index = open_index(bank_of(KEYS), implementation)
    tokens = np.zeros(25, np.uint8)[1:].view(np.int64).reshape(1, 3)
    with pytest.raises(ArrayError, match="^tokens_BS: is not aligned"):
        index.lookup(tokens, eod=EOD)


@pytest.mark.parametrize("threads", [0, -1, 2000])
def test_a_number_of_threads_that_cannot_be_had_is_refused(bank_of, threads):
    with pytest.raises(ConfigError, match=f"^threads: is out of range .got {threads}; expected 1 to 1024"):
        open_index(bank_of(KEYS), threads=threads)


def test_the_index_of_another_bank_is_refused_even_if_the_bank_was_opened_without_it(bank_of):
    bank, other = bank_of(KEYS), bank_of([(1, 3), (2, 1), (2, 2), (1, 2, 1), (3, 1, 2, 1)])
    bank.index_path.write_bytes(other.index_path.read_bytes())
    with pytest.raises(BankFormatError, match="is the index of another bank: its keys_sha256 differs"):
        open_index(open_bank(bank.path, gather="reference"))


def test_a_directory_may_have_any_name(tmp_path):
    bank = make_bank(tmp_path / os.fsdecode(b"b\xff"), dict.fromkeys(KEYS, 1))
    rows, _ = open_index(open_bank(bank.path, "full")).lookup(np.array([[1, 2]]), eod=EOD)
    assert rows.tolist() == [[-1, bank.rows_of_keys()[(1, 2)]]]
