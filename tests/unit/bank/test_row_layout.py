from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_graft.bank.arrays import ArrayError
from megatron_graft.bank.row_layout import ROW_DTYPES, RowLayout, float32_from_elements

TORCH = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
    "float8_e4m3": torch.float8_e4m3fn,
}


def layout(name: str, *widths: int) -> RowLayout:
    return RowLayout(dtype=ROW_DTYPES[name], widths=widths)


@pytest.mark.parametrize("name", ROW_DTYPES)
def test_an_element_has_the_value_that_torch_gives_it(name):
    dtype = ROW_DTYPES[name]
    patterns = np.arange(2**16, dtype=np.uint16) if dtype.element_bytes == 2 else np.arange(256, dtype=np.uint8)
    if name == "float32":
        patterns = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    elements = patterns.view(dtype.numpy)
    expected = torch.from_numpy(patterns.view(np.uint8)).view(TORCH[name]).float().numpy()
    assert dtype.element_bytes == TORCH[name].itemsize
    np.testing.assert_array_equal(float32_from_elements(elements, dtype), expected)


@pytest.mark.parametrize(
    ("name", "widths", "columns", "row_bytes"),
    [
        ("bfloat16", (4, 4), None, 16),
        ("bfloat16", (5,), None, 12),  # padded
        ("bfloat16", (4, 4), (3, 6), 8),
        ("float32", (3, 2), (1, 5), 16),
        ("int8", (4, 4), None, 16),
        ("int8", (5, 4), None, 20),
        ("int8", (5, 4), (0, 1), 12),  # both layers' scales
        ("float8_e4m3", (1,), None, 8),
    ],
)
def test_a_row_is_padded_to_words_and_ends_with_all_scales(name, widths, columns, row_bytes):
    assert layout(name, *widths).row_bytes(columns) == row_bytes


def test_a_column_slice_takes_a_range_of_every_layer():
    rows = layout("bfloat16", 4, 3, 5)
    assert rows.row_dim == 12
    assert rows.byte_ranges() == [(0, 8), (0, 6), (0, 10)]
    assert rows.byte_ranges((2, 9)) == [(4, 8), (0, 6), (0, 4)]
    assert rows.byte_ranges((5, 6)) == [(8, 8), (2, 4), (0, 0)]


@pytest.mark.parametrize("columns", [(-1, 2), (2, 2), (3, 2), (0, 9), (8, 9)])
def test_columns_that_a_row_does_not_have_are_refused(columns):
    with pytest.raises(ArrayError, match="^columns: are no columns of a row"):
        layout("int8", 4, 4).row_bytes(columns)


def test_a_scaled_value_is_element_times_the_scale_of_its_layer():
    elements = np.array([[1, -2, 3, 100, -127]], dtype=np.int8)
    scales = np.array([[0.5, 3.0]], dtype=np.float32)
    padding = np.zeros((1, 3), dtype=np.uint8)
    packed = np.concatenate([elements.view(np.uint8), padding, scales.view(np.uint8)], axis=1)
    assert layout("int8", 2, 3).values(packed).tolist() == [[0.5, -1.0, 9.0, 300.0, -381.0]]
    sliced = np.concatenate(
        [elements[:, 1:4].view(np.uint8), np.zeros((1, 1), np.uint8), scales.view(np.uint8)], axis=1
    )
    assert layout("int8", 2, 3).values(sliced, (1, 4)).tolist() == [[-1.0, 9.0, 300.0]]


@pytest.mark.parametrize(
    ("columns", "widths"),
    [
        ((0, 12), (4, 3, 5)),
        ((2, 9), (2, 3, 2)),
        ((5, 6), (0, 1, 0)),  # a layer of which nothing is wanted stays a layer
        ((7, 12), (0, 0, 5)),
    ],
)
@pytest.mark.parametrize("name", ROW_DTYPES)
def test_a_slice_is_the_layout_of_rows_gathered_with_its_columns(name, columns, widths):
    whole = layout(name, 4, 3, 5)
    part = whole.sliced(columns)
    assert (part.dtype, part.widths, part.row_dim) == (whole.dtype, widths, columns[1] - columns[0])
    assert part.row_bytes() == whole.row_bytes(columns)
    packed = np.random.default_rng(0).integers(0, 256, (7, part.row_bytes()), dtype=np.uint8)
    np.testing.assert_array_equal(part.values(packed), whole.values(packed, columns))


def test_slices_of_a_slice_are_slices_of_the_whole():
    whole = layout("int8", 4, 3, 5)
    assert whole.sliced((2, 9)).sliced((1, 4)) == whole.sliced((3, 6))


@pytest.mark.parametrize("columns", [(-1, 2), (2, 2), (0, 13)])
def test_no_layout_is_made_of_columns_that_a_row_does_not_have(columns):
    with pytest.raises(ArrayError, match="^columns: are no columns of a row"):
        layout("bfloat16", 4, 3, 5).sliced(columns)
