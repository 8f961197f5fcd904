"""Duplicate row numbers, removed natively and in NumPy: ascending, with an inverse that leads back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_graft.bank.arrays import ArrayError
from megatron_graft.bank.unique import unique_rows
from megatron_graft.errors import ConfigError

IMPLEMENTATIONS = ["native", "reference"]
numbers = st.one_of(st.integers(-2, 6), st.integers(-(2**63), 2**63 - 1))


def call(rows: np.ndarray, implementation: str, spare: int = 0) -> tuple[list[int], list[int]]:
    unique, inverse = np.full(len(rows) + spare, -7, np.int64), np.full(len(rows), -7, np.int32)
    count = unique_rows(rows, unique, inverse, implementation)
    return unique[:count].tolist(), inverse.tolist()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(values=st.lists(numbers, max_size=60))
@settings(max_examples=200, deadline=None)
def test_the_inverse_leads_back_to_every_row_and_a_miss_to_nothing(values: list[int], implementation: str) -> None:
    unique, inverse = call(np.array(values, dtype=np.int64), implementation)
    assert unique == sorted({value for value in values if value >= 0})
    assert [unique[place - 1] if place else None for place in inverse] == [
        value if value >= 0 else None for value in values
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_rows_with_many_repeats(implementation: str) -> None:
    rows = np.random.default_rng(3).zipf(1.3, 20_000).astype(np.int64) % 2**40 - 2
    unique, inverse = call(rows, implementation, spare=5)
    assert np.array_equal(unique, np.unique(rows[rows >= 0]))
    table = np.array([-1, *unique])
    assert np.array_equal(table[inverse], np.maximum(rows, -1))


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("rows", np.zeros(4, np.int32)),
        ("rows", np.zeros((2, 2), np.int64)),
        ("unique_out", np.zeros(3, np.int64)),
        ("unique_out", np.zeros(4, np.uint64)),
        ("inverse_out", np.zeros(4, np.int64)),
        ("inverse_out", np.zeros(5, np.int32)),
        ("inverse_out", np.zeros(8, np.int32)[::2]),
    ],
)
def test_a_wrong_array_is_refused_before_anything_is_written(name: str, replacement: np.ndarray) -> None:
    arrays = {"rows": np.zeros(4, np.int64), "unique_out": np.full(4, 9), "inverse_out": np.full(4, 9, np.int32)}
    arrays[name] = replacement
    before = {key: value.copy() for key, value in arrays.items()}
    with pytest.raises(ArrayError, match=name):
        unique_rows(**arrays)
    assert all(np.array_equal(arrays[key], before[key]) for key in arrays)


def test_outputs_may_not_overlap_the_rows() -> None:
    rows = np.zeros(4, np.int64)
    with pytest.raises(ArrayError, match="unique_out: shares memory with rows"):
        unique_rows(rows, rows, np.zeros(4, np.int32))
    with pytest.raises(ArrayError, match="inverse_out: shares memory with rows"):
        unique_rows(rows, np.zeros(4, np.int64), rows.view(np.int32)[:4])


def test_an_implementation_that_is_none_is_refused() -> None:
    rows = np.zeros(2, dtype=np.int64)
    with pytest.raises(ConfigError, match="implementation: is unknown .got natve; expected native or reference"):
        unique_rows(rows, np.empty(2, dtype=np.int64), np.empty(2, dtype=np.int32), "natve")  # type: ignore[arg-type]
