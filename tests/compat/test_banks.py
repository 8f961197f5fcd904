"""Banks of every format version so far: those of this one answer as on their first day, older ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_graft.bank.reader import open_bank
from megatron_graft.errors import BankVersionError
from megatron_graft.lookup.index import open_index
from tests.compat.make_bank import EOD, FIRST_ROWS, NUM_ROWS

HERE = Path(__file__).resolve().parent
EXPECTED = json.loads((HERE / "bank-v2.expected.json").read_text())


@pytest.mark.parametrize("verify", ["header", "sample", "full"])
@pytest.mark.parametrize("gather", ["native", "reference"])
def test_a_bank_of_version_2_opens_and_its_rows_are_what_was_written(verify, gather):
    bank = open_bank(HERE / "bank-v2", verify, gather=gather)
    assert bank.digest == EXPECTED["digest"]
    rows = np.array(list(map(int, EXPECTED["values"])))
    np.testing.assert_array_equal(bank.float_rows(rows), np.float32(list(EXPECTED["values"].values())))


@pytest.mark.parametrize("rows", [NUM_ROWS, FIRST_ROWS])
@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_bank_of_version_2_answers_as_ever(rows, implementation, dtype):
    bank = open_bank(HERE / "bank-v2", rows=rows)
    found = open_index(bank, implementation).lookup(np.array(EXPECTED["tokens"], dtype=dtype), eod=EOD)
    answers = EXPECTED["answers"][str(rows)]
    assert 4 in np.unique(answers["orders"]) and -1 in np.unique(answers["rows"])
    np.testing.assert_array_equal(found[0], answers["rows"])
    np.testing.assert_array_equal(found[1], answers["orders"])


def test_fewer_rows_answer_otherwise():
    assert EXPECTED["answers"][str(NUM_ROWS)] != EXPECTED["answers"][str(FIRST_ROWS)]


def test_a_bank_of_version_1_is_refused_with_the_way_out():
    with pytest.raises(BankVersionError) as caught:
        open_bank(HERE / "bank-v1")
    problem = "bank.json: was written by an older format version (got 1; expected 2)."
    remedy = "Rebuild the bank with tools/build_bank.py."
    assert str(caught.value).endswith(f"{problem} {remedy}")
