"""One memory site: reads its memories for a micro-batch and adds what it makes of them to the residual stream.

Memory Grafting (arXiv 2605.20948), reading of its section 3, with gate and convolution of Engram (arXiv 2601.07372,
sections 2.3 and 2.4). For position t with hidden state h, bank row m (frozen, zero at a miss) and hashed rows e::

    k = W_K m + W'_K e        v = W_V m + W'_V e
    a = sigmoid( <RMSNorm(k), RMSNorm(h)> / sqrt(H) )       on request of sign(x) sqrt(|x|) of that product x
    u = a v
    h <- h + u + SiLU( CausalDepthwiseConv( RMSNorm(u) ) )

A site reads a bank, a table, or both; with both, the table is read everywhere ("sum") or only where the bank has no
match ("exclusive", as in Memory Grafting: there e is zero at a hit). Instead of the bank's frozen row m may be one that
the site trains, found by the same match.

Where nothing is read m and e are zero, and with no bias anywhere so are k, v and u: the site adds exactly nothing (the
convolution may still carry what was read before in the same document). ``W_V``, ``W'_V`` and the convolution kernel
start at zero, so a model with sites equals the stock model bit for bit before its first step.

Shapes: S positions of this rank, B sequences, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from megatron_graft.compat.parameter_groups import SITE_RATE, TABLE_ATTRIBUTE
from megatron_graft.data.memory_layout import MemoryLayout, SiteReading
from megatron_graft.data.microbatch import MicroBatchMemory
from megatron_graft.memory.convolution import causal_depthwise_convolution
from megatron_graft.memory.halo import SequenceSplit
from megatron_graft.memory.initialisation import RowValues, SiteSeed, site_parameter
from megatron_graft.memory.reader import EngramReader, GraftReader, RowReader, TrainedRowsReader
from megatron_graft.memory.sharding import sharded_whole
from megatron_graft.memory.statistics import SiteStatistics

Gate = Literal["plain", "signed-sqrt"]
Rows = Literal["frozen", "trained", "fresh"]

_SMALLEST_LOGIT = 1e-6  # below it the square root's slope would grow without bound; as in the published code


@dataclass(frozen=True, kw_only=True)
class SiteConfig:
    """What a site is, beyond the model's own configuration.

    Attributes:
        reading: what it reads.
        gate: the logit as it is, or its signed square root.
        conv_kernel: number of convolution taps; 0 leaves the convolution out.
        conv_dilation: distance between taps, in positions.
        seed: seed of the sites' own random numbers.
        init_std: standard deviation of what is drawn: tables and W_K.
        row_values: what rows trained under a bank's keys start as; None to draw them.
    """

    reading: SiteReading
    gate: Gate
    conv_kernel: int
    conv_dilation: int
    seed: int
    init_std: float
    row_values: RowValues | None = None

    @property
    def rows(self) -> Rows | None:
        """What the site reads under a bank's keys: the bank's frozen rows, trained ones that started from the bank's or
        ones that started fresh; None if it reads no bank."""
        graft = self.reading.graft
        if graft is None or graft.trained_rows is None:
            return None if graft is None else "frozen"
        return "fresh" if self.row_values is None else "trained"


class MemorySite(MegatronModule):  # type: ignore[misc]
    """Gated injection of memory before the attention of one layer.

    How tensor-parallel ranks share the work is said in :mod:`megatron_graft.data.partition`. Norms and the convolution
    are replicated; under sequence parallelism Megatron sums their gradients over the ranks. Context-parallel ranks are
    to parameters what data-parallel ones are.

    Args:
        config: Megatron's ``TransformerConfig``.
        site: see :class:`SiteConfig`.
        layout: what a micro-batch brings to the sites of this rank.
        tp_group: tensor-parallel group of the layer.
        sequence_group: group of the ranks over which a sequence is split; None if it is not.
    """

    def __init__(
        self, config: Any, site: SiteConfig, layout: MemoryLayout, tp_group: Any, sequence_group: Any = None
    ) -> None:
        super().__init__(config=config)
        self.site, self.layout, self.tp_group = site, layout, tp_group
        self.split = SequenceSplit(layout.partition, sequence_group)
        self.layer_number = site.reading.layer_number
        self.bypassed = False
        seed = SiteSeed(seed=site.seed, layer_number=self.layer_number, std=site.init_std)
        self._numbers = {"graft": layout.graft_of(site.reading), "engram": layout.engram_of(site.reading)}
        partition, trained = layout.partition, layout.trained_of(site.reading)
        if site.reading.graft and trained is None:
            self.graft: RowReader = GraftReader(config, site.reading.graft, partition, seed)
        elif site.reading.graft:
            self._numbers["graft"] = trained
            self.graft = TrainedRowsReader(config, site.reading.graft, partition, seed, tp_group, site.row_values)
        if site.reading.engram:
            self.engram = EngramReader(config, site.reading.engram, partition, seed, tp_group)
        ones = torch.ones(config.hidden_size)
        self.key_norm = site_parameter(config, ones)
        self.query_norm = site_parameter(config, ones)
        if site.conv_kernel:
            self.conv_norm = site_parameter(config, ones)
            self.conv_kernel = site_parameter(config, torch.zeros(site.conv_kernel, config.hidden_size))
        for parameter in self.parameters():
            if not hasattr(parameter, TABLE_ATTRIBUTE):
                setattr(parameter, SITE_RATE, True)
        self.statistics = SiteStatistics()

    def forward(self, hidden_SBH: torch.Tensor, packed: torch.Tensor, exchange: torch.Tensor) -> torch.Tensor:
        """Add the memory of one micro-batch.

        Args:
            hidden_SBH: hidden states before the layer's attention.
            packed: tensor of the micro-batch's :class:`MicroBatchMemory`, for this rank.
            exchange: its sizes of exchanges, on the host.

        Returns:
            ``[S, B, H]``, of ``hidden_SBH``'s dtype.
        """
        if self.bypassed:
            return hidden_SBH
        positions, sequences, _ = hidden_SBH.shape
        memory = MicroBatchMemory.unpack(self.layout, packed, exchange, sequences, positions)
        key_SBH, value_SBH = self._read(memory)
        gate_SB1 = torch.sigmoid(self._logit(key_SBH, hidden_SBH))
        delta_SBH = gated_SBH = gate_SB1 * value_SBH
        if self.site.conv_kernel:
            delta_SBH = gated_SBH + self._convolved(gated_SBH, memory)
        if self.training:
            with torch.no_grad():
                self.statistics.add(gate_SB1, self._active_SB(memory), delta_SBH, hidden_SBH)
        return hidden_SBH + delta_SBH

    def readers(self) -> list[tuple[str, RowReader, int]]:
        """Name, module and number within the micro-batch's memory of each reader."""
        return [(name, getattr(self, name), number) for name, number in self._numbers.items() if number is not None]

    def _read(self, memory: MicroBatchMemory) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, summed over the site's readers and over ranks that read slices of the columns."""
        keys, values = zip(*(reader(memory, number) for _, reader, number in self.readers()), strict=True)
        key_SBH, value_SBH = (parts[0] if len(parts) == 1 else parts[0] + parts[1] for parts in (keys, values))
        if not self.layout.partition.splits_columns:
            return key_SBH, value_SBH
        both = reduce_from_tensor_model_parallel_region(torch.cat([key_SBH, value_SBH], dim=-1), group=self.tp_group)
        return both.chunk(2, dim=-1)  # type: ignore[no-any-return]

    def _active_SB(self, memory: MicroBatchMemory) -> torch.Tensor:
        active = [reader.active_SB(memory, number) for _, reader, number in self.readers()]
        return active[0] if len(active) == 1 else active[0] | active[1]

    def _logit(self, key_SBH: torch.Tensor, hidden_SBH: torch.Tensor) -> torch.Tensor:
        agreement = self._norm(key_SBH, self.key_norm) * self._norm(hidden_SBH, self.query_norm)
        logit_SB1 = agreement.sum(dim=-1, keepdim=True) / hidden_SBH.shape[-1] ** 0.5
        if self.site.gate == "plain":
            return logit_SB1
        return logit_SB1.sign() * logit_SB1.abs().clamp_min(_SMALLEST_LOGIT).sqrt()

    def _convolved(self, gated_SBH: torch.Tensor, memory: MicroBatchMemory) -> torch.Tensor:
        mixed = causal_depthwise_convolution(
            self._norm(gated_SBH, self.conv_norm),
            self.conv_kernel,
            self.site.conv_dilation,
            memory.position_BS.t(),
            self.split,
        )
        return F.silu(mixed)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.layernorm_epsilon)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Entries of all parameters, keyed and named ``prefix`` + name; see :mod:`megatron_graft.memory.layer`."""
        groups = {"tp_group": self.tp_group, "dp_cp_group": ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]}
        entries = {
            f"{prefix}{name}": sharded_whole(f"{prefix}{name}", parameter, **groups)
            for name, parameter in self.named_parameters(recurse=False)
        }
        for name, reader, _ in self.readers():
            below = reader.sharded_entries(f"{prefix}{name}.", **groups)
            entries |= {f"{prefix}{name}.{parameter}": entry for parameter, entry in below.items()}
        return entries
