from __future__ import annotations

import numpy as np
import pytest

from megatron_graft.bank.arrays import ArrayError, check_array, check_no_overlap
from megatron_graft.errors import GraftError

GOOD = np.zeros((2, 3), dtype=np.int32)


def check(array: object, **changes: object) -> np.ndarray:
    return check_array("tokens", array, **{"dtypes": [np.int32, np.int64], "shape": (None, 3), **changes})


def test_a_fitting_array_is_returned_itself():
    assert check(GOOD) is GOOD
    assert check(GOOD.astype(np.int64)).dtype == np.int64


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ([[1, 2, 3]], "is not a NumPy array .got list"),
        (GOOD.astype(np.uint32), "has the wrong dtype .got uint32; expected int32 or int64"),
        (GOOD.astype(">i4"), "has the wrong dtype"),
        (np.zeros((3, 2), dtype=np.int32), r"has the wrong shape .got \[3, 2\]; expected \[any, 3\]"),
        (np.zeros(3, dtype=np.int32), "has the wrong shape"),
        (np.zeros((2, 6), dtype=np.int32)[:, ::2], "is not C-contiguous"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(array, message):
    with pytest.raises(ArrayError, match=f"^tokens: {message}"):
        check(array)


def test_a_read_only_array_is_refused_only_as_an_output():
    array = GOOD.copy()
    array.flags.writeable = False
    check(array)
    with pytest.raises(ArrayError, match="is read-only"):
        check(array, writable=True)


def test_an_output_inside_an_input_is_refused():
    buffer = np.zeros(10, dtype=np.int64)
    check_no_overlap("rows_out", buffer[:5], "tokens_BS", buffer[5:])
    with pytest.raises(ArrayError, match="^rows_out: shares memory with tokens_BS"):
        check_no_overlap("rows_out", buffer[:6], "tokens_BS", buffer[5:])


def test_it_can_be_caught_as_ours_and_as_a_value_error():
    assert issubclass(ArrayError, GraftError) and issubclass(ArrayError, ValueError)
