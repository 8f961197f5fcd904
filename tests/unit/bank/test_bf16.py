from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_graft.bank.bf16 import bf16_from_float32, float32_from_bf16

UPPER_HALVES = np.arange(2**16, dtype=np.uint32)


@pytest.mark.parametrize("lower_half", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_rounding_agrees_with_torch_for_every_upper_half(lower_half):
    values = ((UPPER_HALVES << 16) | np.uint32(lower_half)).view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    found = bf16_from_float32(values)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(found[number], expected[number])
    assert np.isnan(float32_from_bf16(found[~number])).all()
    np.testing.assert_array_equal(np.signbit(float32_from_bf16(found)), np.signbit(values))


def test_widening_is_exact_and_undone_by_rounding():
    bits = UPPER_HALVES.astype(np.uint16).reshape(256, 256)
    values = float32_from_bf16(bits)
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(values, expected)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(bf16_from_float32(values)[number], bits[number])


def test_ties_go_to_even():
    above_even, above_odd = np.array([0x3F808000, 0x3F818000], dtype=np.uint32).view(np.float32)
    assert bf16_from_float32(np.array([above_even, above_odd])).tolist() == [0x3F80, 0x3F82]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3, 4)])
def test_shapes_are_kept(shape):
    assert bf16_from_float32(np.ones(shape, dtype=np.float32)).shape == shape
    assert float32_from_bf16(np.ones(shape, dtype=np.uint16)).shape == shape


def test_any_memory_layout_is_read_right():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(bf16_from_float32(values.T), bf16_from_float32(values).T)
    np.testing.assert_array_equal(float32_from_bf16(bf16_from_float32(values)[:, ::2]), values[:, ::2])
