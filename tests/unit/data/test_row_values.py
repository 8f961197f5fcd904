"""Stored rows as values: every row dtype, several donor layers, against NumPy and against arithmetic on single rows."""

import numpy as np
import pytest
import torch

from megatron_graft.bank.row_layout import ROW_DTYPES, RowLayout
from megatron_graft.data.row_values import select_rows

TORCH = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
    "float8_e4m3": torch.float8_e4m3fn,
}
WIDTHS = [(8,), (5,), (4, 4), (3, 6, 1)]


def stored_rows(layout: RowLayout, rows: int, seed: int = 0) -> torch.Tensor:
    """uint8 ``[rows, R]``: any element bits but those of NaN, scales between 0 and 2."""
    generator = torch.Generator().manual_seed(seed)
    kind = TORCH[layout.dtype.name]
    stored = torch.zeros(rows, layout.row_bytes(), dtype=torch.uint8)
    elements = torch.randint(0, 256, (rows, layout.row_dim * kind.itemsize), generator=generator, dtype=torch.uint8)
    if kind != torch.int8:
        elements[elements.view(kind).float().isnan().repeat_interleave(kind.itemsize, dim=1)] = 0
    stored[:, : elements.shape[1]] = elements
    if layout.dtype.scaled:
        scales = 2 * torch.rand(rows, len(layout.widths), generator=generator)
        stored[:, -4 * len(layout.widths) :] = scales.view(torch.uint8)
    return stored


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", TORCH)
def test_values_are_those_of_the_numpy_reference(name: str, widths: tuple[int, ...]) -> None:
    layout = RowLayout(dtype=ROW_DTYPES[name], widths=widths)
    stored = stored_rows(layout, 40)
    index = torch.randint(0, 40, (7, 3), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    values = select_rows(layout, stored, index, torch.float32)
    assert values.shape == (7, 3, layout.row_dim)
    np.testing.assert_array_equal(values.numpy(), layout.values(stored.numpy())[index.numpy()])


@pytest.mark.parametrize("name", ["int8", "float8_e4m3"])
def test_each_donor_layer_has_its_own_scale(name: str) -> None:
    layout = RowLayout(dtype=ROW_DTYPES[name], widths=(3, 2))
    stored = torch.zeros(2, layout.row_bytes(), dtype=torch.uint8)
    stored[1, :5] = torch.tensor([1.0, -2.0, 3.0, 4.0, -5.0]).to(TORCH[name]).view(torch.uint8)
    stored[1, 8:] = torch.tensor([0.5, 16.0]).view(torch.uint8)
    values = select_rows(layout, stored, torch.tensor([1, 0], dtype=torch.int32), torch.float32)
    assert values.tolist() == [[0.5, -1.0, 1.5, 64.0, -80.0], [0.0] * 5]


@pytest.mark.parametrize("name", ["int8", "float8_e4m3"])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16])
def test_a_scaled_value_is_rounded_once(name: str, wanted: torch.dtype) -> None:
    layout = RowLayout(dtype=ROW_DTYPES[name], widths=(64, 64))
    stored = stored_rows(layout, 50)
    index = torch.arange(50, dtype=torch.int32)
    values = select_rows(layout, stored, index, wanted)
    assert values.dtype == wanted
    exact = torch.from_numpy(layout.values(stored.numpy()))
    assert torch.equal(values, exact.to(wanted))


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_stored_floats_keep_their_bits(name: str) -> None:
    layout = RowLayout(dtype=ROW_DTYPES[name], widths=(4, 4))
    stored = stored_rows(layout, 3)
    index = torch.tensor([2, 1, 2], dtype=torch.int32)
    values = select_rows(layout, stored, index, TORCH[name])
    assert torch.equal(values.view(torch.uint8), stored[index.long()])


@pytest.mark.parametrize("name", TORCH)
def test_shapes_and_types_follow_from_the_arguments_alone(name: str) -> None:
    """On the meta device there is no content: whatever asked for some would fail, as it would wait for a GPU."""
    layout = RowLayout(dtype=ROW_DTYPES[name], widths=(5, 6))
    stored = torch.empty(9, layout.row_bytes(), dtype=torch.uint8, device="meta")
    index = torch.empty(4, 2, dtype=torch.int32, device="meta")
    values = select_rows(layout, stored, index, torch.bfloat16)
    assert (values.shape, values.dtype, values.device.type) == ((4, 2, 11), torch.bfloat16, "meta")
