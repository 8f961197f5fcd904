"""The gather of rows: native, NumPy and the bytes that were written agree, and the binding takes nothing by guess."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_graft.bank.extension import load_extension
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.bank.row_layout import ROW_DTYPES
from megatron_graft.bank.writer import write_bank
from tests.helpers.banks import bank_arguments, random_counts, table_bytes
from tests.helpers.forked import check_in_fork

NUM_ROWS = 60
LAYERS = (12, 20, 3)
WIDTH = 7  # odd: elements of one and of two bytes need padding
SHARD_ROWS = {"bfloat16": 9, "float16": 60, "float32": 1, "int8": 25, "float8_e4m3": 59}
STREAMED_BYTES = 1_100_000  # more than an output that stays in the caches


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, np.ndarray]]:
    """For every row dtype a bank, in shards of another length each, and the bytes of its gathered rows."""
    directory = tmp_path_factory.mktemp("banks")
    made = {}
    for row_dtype in ROW_DTYPES:
        arguments = bank_arguments(
            random_counts(NUM_ROWS, seed=3),
            layers=LAYERS,
            width=WIDTH,
            row_dtype=row_dtype,
            shard_rows=SHARD_ROWS[row_dtype],
        )
        write_bank(directory / row_dtype, **arguments)  # type: ignore[arg-type]
        made[row_dtype] = (directory / row_dtype, table_bytes(arguments))
    return made


def gathered(bank: Bank, rows: np.ndarray, columns: tuple[int, int] | None = None) -> np.ndarray:
    out = np.full((len(rows), bank.bytes_of_row(columns)), 0xA5, dtype=np.uint8)
    bank.gather(rows, out, columns)
    return out


def expected_bytes(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.where(rows[:, None] < 0, np.uint8(0), table[np.maximum(rows, 0)])


@pytest.mark.parametrize("gather", ["native", "reference"])
@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
def test_rows_are_the_bytes_that_were_written(banks: Any, row_dtype: str, gather: Any) -> None:
    path, table = banks[row_dtype]
    bank = open_bank(path, gather=gather, threads=2)
    assert bank.row_bytes == table.shape[1]
    for length in (0, 1, 200, STREAMED_BYTES // bank.row_bytes + 1):
        rows = np.random.default_rng(length).integers(-10, NUM_ROWS, length)
        np.testing.assert_array_equal(gathered(bank, rows), expected_bytes(table, rows))


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_native_equals_the_reference_for_any_columns(banks: Any, row_dtype: str, data: st.DataObject) -> None:
    path, _ = banks[row_dtype]
    native, reference = open_bank(path), open_bank(path, gather="reference")
    first = data.draw(st.integers(0, native.row_dim - 1))
    columns = (first, data.draw(st.integers(first + 1, native.row_dim)))
    rows = np.array(data.draw(st.lists(st.integers(-3, NUM_ROWS - 1), max_size=40)), dtype=np.int64)
    np.testing.assert_array_equal(gathered(native, rows, columns), gathered(reference, rows, columns))


@pytest.mark.parametrize("gather", ["native", "reference"])
@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
def test_slices_of_columns_hold_the_values_of_whole_rows(banks: Any, row_dtype: str, gather: Any) -> None:
    bank = open_bank(banks[row_dtype][0], gather=gather)
    rows = np.array([5, -1, 59, 0, 5])
    whole = bank.float_rows(rows)
    for first in range(bank.row_dim):
        for end in range(first + 1, bank.row_dim + 1):
            np.testing.assert_array_equal(bank.float_rows(rows, (first, end)), whole[:, first:end])


def sample(threads: int = 1, scaled: bool = False) -> tuple[Any, np.ndarray]:
    """A gatherer of two layers in shards of 3 and 4 rows, and the bytes of all rows."""
    generator = np.random.default_rng(1)
    wide, narrow = (generator.integers(0, 256, (7, width), dtype=np.uint8) for width in (70, 5))
    scales = generator.random((2, 7), dtype=np.float32)
    gatherer = load_extension().RowGatherer(
        [[wide[:3], wide[3:]], [narrow[:3], narrow[3:]]],
        [[scale[:3], scale[3:]] for scale in scales] if scaled else [],
        threads,
    )
    parts = [wide, narrow, np.zeros((7, 1), np.uint8), *(scale[:, None].view(np.uint8) for scale in scales)]
    return gatherer, np.concatenate(parts if scaled else parts[:3], axis=1)


def test_the_gatherer_keeps_its_arrays_alive() -> None:
    gatherer, table = sample(scaled=True)
    rows = np.array([6, 0, -1, 2, 3])
    filler = [np.full((7, 70), 1, np.uint8) for _ in range(100)]  # takes the place of what was freed
    out = np.empty((5, table.shape[1]), np.uint8)
    gatherer.gather(rows, out)
    assert filler
    np.testing.assert_array_equal(out, expected_bytes(table, rows))


@pytest.mark.parametrize("body", ["auto", "plain", "portable", "avx2", "avx512"])
def test_every_body_of_the_machine_gives_the_same_bytes(body: str) -> None:
    gatherer, table = sample(threads=2, scaled=True)
    for length in (50, STREAMED_BYTES // table.shape[1] + 1):
        rows = np.random.default_rng(2).integers(-1, 7, length)
        out = np.empty((length, table.shape[1]), np.uint8)
        try:
            gatherer.gather(rows, out, body=body)
        except ValueError as error:
            assert body in ("avx2", "avx512") and "lacks the instructions" in str(error), error
            pytest.skip(f"{body}: {error}")
        np.testing.assert_array_equal(out, expected_bytes(table, rows))


ROWS, OUT = np.zeros(2, np.int64), np.zeros((2, 76), np.uint8)
READ_ONLY = OUT.copy()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((ROWS.astype(np.int32), OUT), TypeError, "incompatible function arguments"),
        ((ROWS, OUT.astype(np.int8)), TypeError, "incompatible function arguments"),
        ((ROWS, np.zeros((2, 152), np.uint8)[:, ::2]), TypeError, "incompatible function arguments"),
        ((ROWS.tolist(), OUT), TypeError, "incompatible function arguments"),
        ((ROWS, READ_ONLY), ValueError, "out is read-only"),
        ((ROWS[:1], OUT), ValueError, r"out is not \[M, 76\]"),
        ((ROWS, OUT[:, :75].copy()), ValueError, r"out is not \[M, 76\]"),
        ((ROWS, OUT.reshape(-1)), ValueError, r"rows is \[M\] and out is \[M, row_bytes\]"),
        ((ROWS[:, None], OUT), ValueError, r"rows is \[M\] and out is \[M, row_bytes\]"),
        ((ROWS + 7, OUT), IndexError, "row 7 of a bank of 7 rows"),
        ((ROWS, OUT, [(0, 70)]), ValueError, "one range for each layer"),
        ((ROWS, OUT, [(0, 71), (0, 5)]), ValueError, "inside its layer's row"),
        ((ROWS, OUT, [(0, 70), (-1, 5)]), TypeError, "incompatible function arguments"),
        ((ROWS, OUT, None, "fast"), ValueError, "body"),
    ],
)
def test_a_gather_of_what_does_not_fit_is_refused(arguments: Any, error: Any, message: str) -> None:
    gatherer, _ = sample()
    with pytest.raises(error, match=message):
        gatherer.gather(*arguments)


SHARD, SCALES = np.zeros((3, 8), np.uint8), np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[SHARD.astype(np.int16)]], [], 1), TypeError, "incompatible"),
        (([[SHARD[:, ::2]]], [], 1), TypeError, "incompatible"),
        (([[SHARD]], [[SCALES.astype(np.float64)]], 1), TypeError, "incompatible"),
        (([[SHARD.reshape(-1)]], [], 1), ValueError, "a shard is"),
        (([], [], 1), ValueError, "no layer"),
        (([[SHARD], [SHARD[:2]]], [], 1), ValueError, "layers differ"),
        (([[SHARD, SHARD[:, :4].copy()]], [], 1), ValueError, "shards of a layer differ in row_bytes"),
        (([[SHARD]], [[SCALES], [SCALES]], 1), ValueError, "one list for each layer"),
        (([[SHARD]], [[SCALES, SCALES]], 1), ValueError, "one array for each shard"),
        (([[SHARD]], [[SCALES[:2]]], 1), ValueError, "a shard's scales are not"),
        (([[SHARD], [SHARD]], [[SCALES], []], 1), ValueError, "only some layers have scales"),
        (([[SHARD]], [], 0), ValueError, "threads is 0"),
    ],
)
def test_rows_that_do_not_belong_together_make_no_gatherer(arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        load_extension().RowGatherer(*arguments)


def test_other_threads_run_while_rows_are_copied() -> None:
    shard = np.zeros((32, 1 << 20), np.uint8)
    gatherer = load_extension().RowGatherer([[shard]], [], 1)
    rows, out = np.arange(32), np.empty((32, 1 << 20), np.uint8)
    interval = sys.getswitchinterval()
    # Nobody is made to give up the interpreter's lock: the copier gives it away in the gather, or not before its end.
    sys.setswitchinterval(1000)
    try:
        for _ in range(50):  # on a busy machine this thread may wake only after the copy
            events: list[str] = []

            def copy(events: list[str] = events) -> None:
                events.append("before")
                gatherer.gather(rows, out)  # several milliseconds
                events.append("after")

            copier = threading.Thread(target=copy)
            copier.start()
            seen = list(events)
            copier.join()
            if seen == ["before"]:
                return
    finally:
        sys.setswitchinterval(interval)
    pytest.fail("no other thread ran during 50 gathers")


def test_a_forked_child_gathers_with_its_parents_gatherer() -> None:
    gatherer, table = sample(threads=3)
    rows = np.random.default_rng(4).integers(-1, 7, STREAMED_BYTES // table.shape[1] + 1)
    out = np.empty((len(rows), table.shape[1]), np.uint8)
    gatherer.gather(rows, out)  # the pool of three threads exists now
    expected = expected_bytes(table, rows)

    def check() -> None:
        out.fill(1)
        gatherer.gather(rows, out)
        np.testing.assert_array_equal(out, expected)

    check_in_fork(check)


def test_unique_rows_takes_arrays_as_they_are() -> None:
    unique_rows = load_extension().unique_rows
    rows, unique, inverse = np.array([5, -1, 3, 5]), np.zeros(4, np.int64), np.zeros(4, np.int32)
    assert unique_rows(rows, unique, inverse) == 2
    assert unique[:2].tolist() == [3, 5] and inverse.tolist() == [2, 0, 1, 2]
    for wrong in ((rows.astype(np.int32), unique, inverse), (rows, unique, inverse.astype(np.int64))):
        with pytest.raises(TypeError):
            unique_rows(*wrong)
    with pytest.raises(ValueError, match="not as long as rows"):
        unique_rows(rows, unique[:3], inverse)
    with pytest.raises(ValueError, match="one dimension"):
        unique_rows(rows[:, None], unique, inverse)
    inverse.flags.writeable = False
    with pytest.raises(ValueError, match="inverse_out is read-only"):
        unique_rows(rows, unique, inverse)
