"""The causal, dilated, depthwise convolution that lets a hit speak to the next few positions of its document.

Shapes: S positions of this rank, B sequences, H hidden size, K kernel width.
"""

from __future__ import annotations

import torch

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
    parts = [_convolved(context, x, kernel_KH, dilation, position) for context, x, position in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _convolved(
    context: torch.Tensor, x_SBH: torch.Tensor, kernel_KH: torch.Tensor, dilation: int, position_SB: torch.Tensor
) -> torch.Tensor:
    """The same of one run of positions, after its left context."""
    halo, length = context.shape[0], x_SBH.shape[0]
    padded = torch.cat([context, x_SBH])
    y = kernel_KH[0] * x_SBH
    for tap in range(1, kernel_KH.shape[0]):
        reach = tap * dilation
        shifted = padded[halo - reach : halo - reach + length]
        in_document = (position_SB >= reach).unsqueeze(-1)
        y = y + kernel_KH[tap] * torch.where(in_document, shifted, 0)
    return y
