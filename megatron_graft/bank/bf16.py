"""bfloat16 as bits in uint16. NumPy has no bfloat16; a bank's rows are stored and moved as these bits."""

from __future__ import annotations

import numpy as np

_ROUND_HALF = np.uint32(0x7FFF)
_QUIET_NAN = np.uint16(0x0040)


def bf16_from_float32(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, to nearest and ties to even, as the hardware does.

    Args:
        values: float32 array of any shape.

    Returns:
        uint16 array of the same shape holding bfloat16 bits. Infinities stay; a NaN stays a NaN.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    upper = (bits >> 16).astype(np.uint16)
    rounded = ((bits + _ROUND_HALF + (upper & np.uint16(1))) >> 16).astype(np.uint16)
    # Adding the rounding half could carry a NaN's payload into the sign bit: keep its upper half, made quiet.
    return np.where(np.isnan(values), upper | _QUIET_NAN, rounded).reshape(np.shape(values))


def float32_from_bf16(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bits (uint16, any shape) to float32 of the same shape. Exact."""
    widened = np.ascontiguousarray(bits, dtype=np.uint16).astype(np.uint32) << np.uint32(16)
    return widened.view(np.float32).reshape(np.shape(bits))
