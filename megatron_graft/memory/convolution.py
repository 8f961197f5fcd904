"""The causal, dilated, depthwise convolution that lets a hit speak to the next few positions of its document.

Shapes: S positions of this rank, B sequences, H hidden size, K kernel width.
"""

from __future__ import annotations

import torch

from megatron_graft.memory.halo import left_context


def causal_depthwise_convolution(
    x_SBH: torch.Tensor,
    kernel_KH: torch.Tensor,
    dilation: int,
    position_SB: torch.Tensor,
    tp_group: torch.distributed.ProcessGroup | None,
) -> torch.Tensor:
    """``y[t] = sum_j kernel[j] * x[t - j * dilation]`` over the taps that lie in the document of position t.

    Args:
        x_SBH: input; under sequence parallelism this rank's slice of the sequence.
        kernel_KH: tap j, applied ``j * dilation`` positions back, per channel.
        dilation: distance between taps, in positions.
        position_SB: integer distance of each position from its document's first token: a tap further back than that
            would read another document and contributes nothing.
        tp_group: the group over which the sequence is split, or None if ``x_SBH`` is the whole sequence.

    Returns:
        ``[S, B, H]``.

    Raises:
        ConfigError: a slice is shorter than the left context that the taps reach into.
    """
    taps, length = kernel_KH.shape[0], x_SBH.shape[0]
    halo = (taps - 1) * dilation
    padded = torch.cat([left_context(x_SBH, halo, tp_group), x_SBH]) if halo else x_SBH
    y = kernel_KH[0] * x_SBH
    for tap in range(1, taps):
        reach = tap * dilation
        shifted = padded[halo - reach : halo - reach + length]
        in_document = (position_SB >= reach).unsqueeze(-1)
        y = y + kernel_KH[tap] * torch.where(in_document, shifted, 0)
    return y
