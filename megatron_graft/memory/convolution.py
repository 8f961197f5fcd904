"""The causal, dilated, depthwise convolution that lets a hit speak to the next few positions of its document.

Shapes: S positions of this rank, B sequences, H hidden size, K kernel width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_graft.memory.halo import SequenceSplit, left_context


def causal_depthwise_convolution(
    x_SBH: torch.Tensor,
    kernel_KH: torch.Tensor,
    dilation: int,
    position_SB: torch.Tensor,
    split: SequenceSplit,
) -> torch.Tensor:
    """``y[t] = sum_j kernel[j] * x[t - j * dilation]`` over the taps that lie in the document of position t.

    Args:
        x_SBH: input at this rank's positions.
        kernel_KH: tap j, applied ``j * dilation`` positions back, per channel.
        dilation: distance between taps, in positions.
        position_SB: integer distance of each position from its document's first token: a tap further back than that
            would read another document and contributes nothing.
        split: how the sequence is split over ranks.

    Returns:
        ``[S, B, H]``.
    """
    halo = (kernel_KH.shape[0] - 1) * dilation
    if not halo:
        return kernel_KH[0] * x_SBH
    lengths = split.lengths(x_SBH.shape[0])
    contexts = left_context(x_SBH, halo, split)
    runs = zip(contexts, x_SBH.split(lengths), position_SB.split(lengths), strict=True)
    parts = [
        _DocumentConvolution.apply(torch.cat([context, x]), kernel_KH, dilation, position)
        for context, x, position in runs
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _DocumentConvolution(torch.autograd.Function):
    """The same of one run of positions, after its left context.

    Taps outside the document are multiplied by zero: activations must be finite, as everywhere in a model. Written out,
    since this is bound by memory: autograd would keep and read a masked copy of the input for each tap, and fill a
    gradient as large as the input for each slice of it.
    """

    @staticmethod
    def forward(
        ctx: Any, padded_SBH: torch.Tensor, kernel_KH: torch.Tensor, dilation: int, position_SB: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(padded_SBH, kernel_KH, position_SB)
        ctx.dilation = dilation
        own, *taps = _taps(kernel_KH.shape[0], dilation, padded_SBH.shape[0])
        y_SBH = padded_SBH[own] * kernel_KH[0]
        masked_SBH = torch.empty_like(y_SBH)
        for tap, source in enumerate(taps, start=1):
            torch.mul(padded_SBH[source], _reached(position_SB, tap * dilation), out=masked_SBH)
            y_SBH.addcmul_(masked_SBH, kernel_KH[tap])
        return y_SBH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        padded_SBH, kernel_KH, position_SB = ctx.saved_tensors
        grad_kernel_KH, grad_padded_SBH = torch.empty_like(kernel_KH), torch.zeros_like(padded_SBH)
        masked_SBH, product_SBH = grad_SBH, torch.empty_like(grad_SBH)
        for tap, source in enumerate(_taps(kernel_KH.shape[0], ctx.dilation, padded_SBH.shape[0])):
            if tap:
                masked_SBH = grad_SBH * _reached(position_SB, tap * ctx.dilation)
            grad_padded_SBH[source].addcmul_(masked_SBH, kernel_KH[tap])
            torch.mul(masked_SBH, padded_SBH[source], out=product_SBH)
            torch.sum(product_SBH, (0, 1), out=grad_kernel_KH[tap])
        return grad_padded_SBH, grad_kernel_KH, None, None


def _taps(count: int, dilation: int, padded_length: int) -> list[slice]:
    """What each tap reads of the input with its left context."""
    halo = (count - 1) * dilation
    return [slice(halo - reach, padded_length - reach) for reach in range(0, halo + 1, dilation)]


def _reached(position_SB: torch.Tensor, reach: int) -> torch.Tensor:
    """Where a tap so far back still reads the position's own document."""
    return (position_SB >= reach).unsqueeze(-1)
