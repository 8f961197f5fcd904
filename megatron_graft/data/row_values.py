"""Stored rows -> the values that a site reads, on the device where the rows are.

A quantised value is its element times its row's scale of the donor layer. That product is taken here and nowhere
before: on the way, a row is the bytes that the bank stores (:class:`~megatron_graft.bank.row_layout.RowLayout`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_graft.bank.row_layout import RowLayout

_ELEMENTS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
    "float8_e4m3": torch.float8_e4m3fn,
}


def select_rows(layout: RowLayout, rows_PR: torch.Tensor, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of chosen rows. Never waits for a device: shapes follow from those of the arguments.

    Args:
        layout: of the rows.
        rows_PR: uint8 ``[P, R]`` rows as stored, contiguous, starting at a multiple of four bytes.
        index: int32 of any shape, which rows.
        dtype: floating-point type wanted.

    Returns:
        ``[*index.shape, D]`` of ``dtype``. Stored floats are converted; a product with a scale is rounded once.
    """
    elements_dtype = _ELEMENTS[layout.dtype.name]
    if not layout.dtype.scaled:
        elements_PD = rows_PR.view(elements_dtype)[:, : layout.row_dim]
        return F.embedding(index, elements_PD).to(dtype)
    # Chosen first, multiplied after: what moves is the packed row, in words.
    words = F.embedding(index, rows_PR.view(torch.int32))
    return _scaled(layout, words.view(elements_dtype), words.view(torch.float32), dtype)


def _scaled(layout: RowLayout, elements: torch.Tensor, floats: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Elements times scales; the arguments are one tensor of rows, seen as either, and a row ends with its scales."""
    if elements.dtype == torch.float8_e4m3fn:
        elements = elements.to(torch.float32)  # torch does not multiply it; exact
    scales = floats[..., -len(layout.widths) :]
    values = torch.empty(*elements.shape[:-1], layout.row_dim, dtype=dtype, device=elements.device)
    column = 0
    for layer, width in enumerate(layout.widths):
        end = column + width
        torch.mul(elements[..., column:end], scales[..., layer : layer + 1], out=values[..., column:end])
        column = end
    return values
