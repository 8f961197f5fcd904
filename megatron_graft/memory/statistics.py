"""What a site tells about itself: sums over training forward passes, kept on the device so that a step never waits.

Shapes: S positions of this rank, B sequences, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

GATE_BINS = 64
SAMPLED_POSITIONS = 256
QUANTILES = (0.1, 0.5, 0.9)
_SUMS = ("active", "gate", "positions", "relative_delta", "participation", "samples")
WIDTH = len(_SUMS) + GATE_BINS


class SiteStatistics:
    """Running sums of one site, float64 ``[WIDTH]``: those of ``_SUMS``, then how many gates fell into each bin."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(
        self, gate_SB1: torch.Tensor, active_SB: torch.Tensor, delta_SBH: torch.Tensor, hidden_SBH: torch.Tensor
    ) -> None:
        """Count one micro-batch.

        Args:
            gate_SB1: the gate.
            active_SB: bool, where a row was read; the gate is counted there only.
            delta_SBH: what the site adds.
            hidden_SBH: what it adds that to.
        """
        gate_SB, active = gate_SB1[..., 0].float(), active_SB.double()
        ratio_SB = delta_SBH.float().norm(dim=-1) / hidden_SBH.float().norm(dim=-1).clamp_min(1e-12)
        participation, counted = _participation(delta_SBH)
        positions = torch.ones_like(active).sum()  # not from a Python number: that would be a copy to the device
        sums = torch.stack(
            [active.sum(), (gate_SB * active).sum(), positions, ratio_SB.double().sum(), participation, counted]
        )
        bins = (gate_SB * GATE_BINS).long().clamp(max=GATE_BINS - 1)
        in_bin = bins.unsqueeze(-1) == torch.arange(GATE_BINS, device=bins.device)
        sums = torch.cat([sums, (in_bin & active_SB.unsqueeze(-1)).sum(dim=(0, 1)).double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def drain(self, device: torch.device) -> torch.Tensor:
        """Return the sums, float64 ``[WIDTH]``, and start again from zero."""
        sums, self._sums = self._sums, None
        return torch.zeros(WIDTH, dtype=torch.float64, device=device) if sums is None else sums


def _participation(delta_SBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The participation ratio of what is added, and 1; twice 0 where nothing is.

    With C the second moment of the added vectors, (tr C)^2 / tr(C^2): in how many directions they lie, 1 if in one.
    Over at most ``SAMPLED_POSITIONS`` positions, evenly spaced: then it cannot exceed their number.
    """
    vectors_NH = delta_SBH.reshape(-1, delta_SBH.shape[-1])
    step = -(-len(vectors_NH) // SAMPLED_POSITIONS)
    sampled_nH = vectors_NH[::step].double()
    gram_nn = sampled_nH @ sampled_nH.t()
    spread = gram_nn.square().sum()
    counted = (spread > 0).double()
    return torch.where(spread > 0, gram_nn.diagonal().sum().square() / spread.clamp_min(1e-300), 0), counted


def summary(sums: Sequence[float]) -> dict[str, Any]:
    """Figures from sums over ranks and steps.

    Returns:
        ``gate_mean`` and ``gate_p10``, ``gate_p50``, ``gate_p90`` over positions that read a row; ``delta_ratio``, the
        mean of |delta| / |h| over all; ``participation``, the mean participation ratio of what was added. 0 where
        nothing was counted.
    """
    named, bins = dict(zip(_SUMS, sums, strict=False)), sums[len(_SUMS) :]
    figures = {"gate_mean": named["gate"] / max(1.0, named["active"])}
    figures |= {f"gate_p{round(100 * share)}": _quantile(bins, share) for share in QUANTILES}
    figures["delta_ratio"] = named["relative_delta"] / max(1.0, named["positions"])
    figures["participation"] = named["participation"] / max(1.0, named["samples"])
    return figures


def _quantile(bins: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the gates lie, evenly spread within each bin; 0 without gates."""
    wanted, below = share * sum(bins), 0.0
    for place, count in enumerate(bins):
        if count > 0 and below + count >= wanted:
            return (place + (wanted - below) / count) / len(bins)
        below += count
    return 0.0
