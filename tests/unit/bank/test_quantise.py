from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from megatron_graft.bank import quantise
from megatron_graft.bank.bf16 import bf16_from_float32, float32_from_bf16
from megatron_graft.bank.quantise import quantise_int8, stored_as
from megatron_graft.errors import ConfigError

ROWS = arrays.arrays(np.float32, (3, 5), elements=st.floats(-(2.0**100), 2.0**100, width=32))


@given(ROWS)
def test_no_value_moves_by_more_than_half_a_scale(values):
    elements, scales = quantise_int8(values)
    assert (elements.dtype, scales.dtype, scales.shape) == (np.int8, np.float32, (3,))
    moved = np.abs(elements.astype(np.float64) * scales[:, None] - values)
    largest = np.abs(values).max(axis=1, keepdims=True)
    # A row whose scale would be no normal number is stored as zeros.
    bound = np.where(scales[:, None] > 0, scales[:, None] / 2 + largest * 2.0**-22, 127 * np.finfo(np.float32).tiny)
    assert (moved <= bound).all()
    assert (moved[scales > 0] <= 0.004 * largest[scales > 0]).all()


def test_the_largest_magnitude_becomes_127_and_zeros_stay_zeros():
    values = np.array([[0, 0, 0], [1, -2, 0.5], [-1e-3, 1e-4, 0]], dtype=np.float32)
    elements, scales = quantise_int8(values)
    assert np.abs(elements).max(axis=1).tolist() == [0, 127, 127]
    assert scales[0] == 0 and elements[1].tolist() == [64, -127, 32]


def test_bfloat16_rows_are_quantised_alike_whatever_the_chunks(monkeypatch):
    values = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    layers = {12: bf16_from_float32(values), 20: bf16_from_float32(values * 7)}
    whole = stored_as("int8", layers)
    monkeypatch.setattr(quantise, "_CHUNK_ROWS", 7)
    chunked = stored_as("int8", layers)
    for layer, bits in layers.items():
        elements, scales = quantise_int8(float32_from_bf16(bits))
        for stored in (whole, chunked):
            np.testing.assert_array_equal(stored.layers[layer], elements)
            np.testing.assert_array_equal(stored.scales[layer], scales)
    assert whole.row_dtype == "int8"


def test_bfloat16_is_kept_and_anything_else_refused():
    layers = {12: np.zeros((2, 3), dtype=np.uint16)}
    stored = stored_as("bfloat16", layers)
    assert stored.layers[12] is layers[12] and not stored.scales
    with pytest.raises(ConfigError, match="row_dtype: cannot be built .got float16; expected bfloat16 or int8"):
        stored_as("float16", layers)
