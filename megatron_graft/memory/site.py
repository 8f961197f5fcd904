"""One memory site: reads the rows of a frozen bank and adds what it makes of them to the residual stream.

Memory Grafting (arXiv 2605.20948), reading of its section 3, with the gate of Engram (arXiv 2601.07372, section 2.3).
For position t with hidden state h and bank row m (frozen, centred and RMS-normalised when the bank was built)::

    k = W_K m        v = W_V m
    a = sigmoid( <RMSNorm(k), RMSNorm(h)> / sqrt(H) )
    u = a v
    h <- h + u + SiLU( CausalDepthwiseConv( RMSNorm(u) ) )

At a miss m is zero, and with no bias anywhere so are k, v and u: the site adds exactly nothing (the convolution may
still carry earlier hits of the same document). ``W_V`` and the convolution kernel start at zero, and nothing else
does, so a model with sites equals the stock model bit for bit before its first step.

Shapes: S positions of this rank, B sequences, H hidden size, D width of a row, K kernel width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_graft.bank.row_layout import RowLayout
from megatron_graft.data.microbatch import MicroBatchMemory
from megatron_graft.memory.convolution import causal_depthwise_convolution
from megatron_graft.memory.initialisation import site_generator


@dataclass(frozen=True, kw_only=True)
class SiteConfig:
    """What a site is, beyond the model's own configuration.

    Attributes:
        row_layout: of the bank's rows, which have D elements.
        conv_kernel: K, number of convolution taps; 0 leaves the convolution out.
        conv_dilation: distance between taps, in positions.
        seed: seed of the sites' own parameter generator.
        init_std: standard deviation of W_K at the start.
    """

    row_layout: RowLayout
    conv_kernel: int
    conv_dilation: int
    seed: int
    init_std: float

    @property
    def row_dim(self) -> int:
        """D, elements of a bank row."""
        return self.row_layout.row_dim


class MemorySite(MegatronModule):  # type: ignore[misc]
    """Gated injection of bank rows before the attention of one layer.

    Its parameters are replicated over the tensor-parallel group. Under sequence parallelism each rank works on its own
    positions and the gradients are summed over the group by Megatron (``sequence_parallel`` tag).

    Args:
        config: Megatron's ``TransformerConfig``.
        site: see :class:`SiteConfig`.
        layer_number: Megatron's global, 1-based number of the layer that the site precedes.
        tp_group: tensor-parallel group of the layer.
    """

    def __init__(self, config: Any, site: SiteConfig, layer_number: int, tp_group: Any) -> None:
        super().__init__(config=config)
        self.site = site
        self.layer_number = layer_number
        self.tp_group = tp_group
        self.bypassed = False
        hidden, rows = config.hidden_size, site.row_dim
        generator = site_generator(site.seed, layer_number)
        self.key_weight = self._parameter(torch.randn(hidden, rows, generator=generator) * site.init_std)
        self.value_weight = self._parameter(torch.zeros(hidden, rows))
        self.key_norm = self._parameter(torch.ones(hidden))
        self.query_norm = self._parameter(torch.ones(hidden))
        if site.conv_kernel:
            self.conv_norm = self._parameter(torch.ones(hidden))
            self.conv_kernel = self._parameter(torch.zeros(site.conv_kernel, hidden))
        self.statistics = SiteStatistics()

    def _parameter(self, value: torch.Tensor) -> torch.nn.Parameter:
        device = torch.device("cpu") if self.config.use_cpu_initialization else torch.cuda.current_device()
        parameter = torch.nn.Parameter(value.to(dtype=self.config.params_dtype, device=device))
        parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        return parameter

    def forward(self, hidden_SBH: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """Add the memory of one micro-batch.

        Args:
            hidden_SBH: hidden states before the layer's attention.
            packed: the micro-batch's :class:`MicroBatchMemory`, for this rank's positions.

        Returns:
            ``[S, B, H]``, of ``hidden_SBH``'s dtype.
        """
        if self.bypassed:
            return hidden_SBH
        positions, sequences, _ = hidden_SBH.shape
        memory = MicroBatchMemory.unpack(packed, sequences, positions, self.site.row_layout)
        gate_SB1, gated_SBH = self._gated_value(hidden_SBH, memory)
        delta_SBH = gated_SBH
        if self.site.conv_kernel:
            delta_SBH = delta_SBH + self._convolved(gated_SBH, memory)
        if self.training:
            with torch.no_grad():
                self.statistics.add(gate_SB1, memory.order_BS, delta_SBH, hidden_SBH)
        return hidden_SBH + delta_SBH

    def _gated_value(self, hidden_SBH: torch.Tensor, memory: MicroBatchMemory) -> tuple[torch.Tensor, torch.Tensor]:
        rows_SBD = memory.rows_SBD(self.key_weight.dtype)
        key_SBH = F.linear(rows_SBD, self.key_weight)
        value_SBH = F.linear(rows_SBD, self.value_weight)
        agreement = self._norm(key_SBH, self.key_norm) * self._norm(hidden_SBH, self.query_norm)
        logit_SB1 = agreement.sum(dim=-1, keepdim=True) / hidden_SBH.shape[-1] ** 0.5
        gate_SB1 = torch.sigmoid(logit_SB1)
        return gate_SB1, gate_SB1 * value_SBH

    def _convolved(self, gated_SBH: torch.Tensor, memory: MicroBatchMemory) -> torch.Tensor:
        mixed = causal_depthwise_convolution(
            self._norm(gated_SBH, self.conv_norm),
            self.conv_kernel,
            self.site.conv_dilation,
            memory.position_BS.t(),
            self.tp_group if self.config.sequence_parallel else None,
        )
        return F.silu(mixed)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.layernorm_epsilon)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The site's parameters, each saved once by the group; see :mod:`megatron_graft.memory.layer` for the keys."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


class SiteStatistics:
    """Running sums over training forward passes, kept on the device so that a step never waits for them."""

    NAMES = ("hits", "gate", "positions", "relative_delta")

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(
        self, gate_SB1: torch.Tensor, order_BS: torch.Tensor, delta_SBH: torch.Tensor, hidden_SBH: torch.Tensor
    ) -> None:
        """Count one micro-batch: hits, sum of the gate over hits, positions, sum of |delta| / |h|."""
        hit_SB = (order_BS.t() > 0).float()
        ratio_SB = delta_SBH.float().norm(dim=-1) / hidden_SBH.float().norm(dim=-1).clamp_min(1e-12)
        positions = torch.ones_like(hit_SB).sum()  # not from a Python number: that would be a copy to the device
        sums = torch.stack([hit_SB.sum(), (gate_SB1[..., 0].float() * hit_SB).sum(), positions, ratio_SB.sum()])
        self._sums = sums if self._sums is None else self._sums + sums

    def drain(self, device: torch.device) -> torch.Tensor:
        """Return the sums, float32 ``[4]`` in the order of :attr:`NAMES`, and start again from zero."""
        sums, self._sums = self._sums, None
        return torch.zeros(len(self.NAMES), device=device) if sums is None else sums
