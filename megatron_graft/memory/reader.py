"""What turns the memory of a micro-batch into keys and values: ``k = W_K m`` and ``v = W_V m``, without biases.

* :class:`GraftReader` reads the frozen rows of a bank, which the micro-batch brings along.
* :class:`TrainedRowsReader` reads a trainable table instead that has a row for each of the bank's keys.
* :class:`EngramReader` (Engram, arXiv 2601.07372, section 2.2) reads a trainable hashed table. All heads of all orders
  lie in one table, one after the other.

The rows of a table are split over the tensor-parallel ranks. The look-ahead has found or hashed them, removed
duplicates and worked out who asks whom for what (:mod:`megatron_graft.data.memory_fetcher`); what is left is to pick
this rank's rows, exchange them, and put them where they belong.

Shapes: S positions of this rank, B sequences, H hidden size, D elements of a row that this rank reads, d of a table's
row, h heads that this rank reads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.module import MegatronModule

from megatron_graft.compat.parameter_groups import ROWS_RATE, TABLE_ATTRIBUTE, TABLE_RATE
from megatron_graft.data.memory_layout import EngramReading, GraftReading
from megatron_graft.data.microbatch import MicroBatchMemory
from megatron_graft.data.partition import Partition
from megatron_graft.memory.initialisation import BANK_ROWS, RowValues, SiteSeed, site_parameter
from megatron_graft.memory.sharding import sharded_slice, sharded_whole

type Entries = dict[str, Any]


class RowReader(MegatronModule):  # type: ignore[misc]
    """The projections that all readers have.

    W_K starts random and W_V at zero. Where ranks read slices of the columns, their results are partial sums: the
    projections are row-parallel, and the site adds them up.

    Args:
        config: Megatron's ``TransformerConfig``.
        width: elements of a whole row.
        columns: (first, end) of those that this rank reads.
        partition: this rank's place among the tensor- and context-parallel ranks.
        seed: of the site's random numbers.
        part: name of the memory within the site.
    """

    def __init__(
        self, config: Any, *, width: int, columns: tuple[int, int], partition: Partition, seed: SiteSeed, part: str
    ) -> None:
        super().__init__(config=config)
        self.width, self.columns, self.partition = width, columns, partition
        key = seed.normal(f"{part} key_weight", config.hidden_size, width)[:, columns[0] : columns[1]].contiguous()
        axis = 1 if partition.splits_columns else None
        self.key_weight = site_parameter(config, key, split_axis=axis)
        self.value_weight = site_parameter(config, torch.zeros_like(key), split_axis=axis)

    def project(self, rows_SBD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[S, B, H]``: this rank's partial sums of them where columns are split."""
        return F.linear(rows_SBD, self.key_weight), F.linear(rows_SBD, self.value_weight)

    def sharded_entries(self, prefix: str, tp_group: Any, dp_cp_group: Any) -> Entries:
        """Parameter name -> its entry in a sharded state dict, under the key ``prefix`` + name."""
        groups = {"tp_group": tp_group, "dp_cp_group": dp_cp_group}
        weights = {"key_weight": self.key_weight, "value_weight": self.value_weight}
        if not self.partition.splits_columns:
            return {name: sharded_whole(f"{prefix}{name}", weight, **groups) for name, weight in weights.items()}
        place = {"axis": 1, "first": self.columns[0], "total": self.width}
        return {name: sharded_slice(f"{prefix}{name}", weight, **place, **groups) for name, weight in weights.items()}


class GraftReader(RowReader):
    """Reads frozen rows of a bank; see :class:`RowReader`."""

    def __init__(self, config: Any, reading: GraftReading, partition: Partition, seed: SiteSeed) -> None:
        columns = partition.columns(reading.width)
        super().__init__(config, width=reading.width, columns=columns, partition=partition, seed=seed, part="graft")
        self.bank = reading.bank

    def forward(self, memory: MicroBatchMemory, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[S, B, H]``, zero at a miss; ``number`` among the micro-batch's gathered rows."""
        return self.project(memory.graft_rows_SBD(number, self.key_weight.dtype))

    def active_SB(self, memory: MicroBatchMemory, number: int) -> torch.Tensor:
        """Bool ``[S, B]``: where a row is read."""
        return memory.order_BS(self.bank).t() > 0


class TableReader(RowReader):
    """Has a trainable table of which each tensor-parallel rank holds a share of the rows; see :class:`RowReader`.

    Back to the table go two sums in a fixed order: a received row's gradient over the positions that read it, then a
    table row's over the ranks that asked for it. Each position asks once, so no gradient is counted twice.

    Args:
        values: what this rank's rows start as.
        num_rows: of the whole table.
        rate: the attribute by which the table has its own learning rate.
        projections: arguments of :class:`RowReader`.
    """

    def __init__(self, config: Any, *, values: RowValues, num_rows: int, rate: str, tp_group: Any, **projections: Any):
        super().__init__(config, **projections)
        self.num_rows, self.tp_group = num_rows, tp_group
        rows = values(*self.partition.table_rows(num_rows))
        table: Any = site_parameter(config, rows, split_axis=0 if self.partition.size > 1 else None)
        table.sequence_parallel = False  # a rank's rows are its own, and their gradients complete
        setattr(table, TABLE_ATTRIBUTE, True)
        setattr(table, rate, True)
        self.table = table

    def received(self, memory: MicroBatchMemory, number: int) -> torch.Tensor:
        """``[n + 1, d]``: a zero row, then the rows that this rank reads, in the order of its places from 1."""
        sent, received = memory.exchange[number].tolist()  # a tensor of the host: nobody waits
        rows = F.embedding(memory.requests(number)[: sum(sent)], self.table)
        if self.partition.size > 1:
            rows = all_to_all(self.tp_group, rows, received, sent)
        return torch.cat([rows.new_zeros(1, rows.shape[1]), rows])

    def sharded_entries(self, prefix: str, tp_group: Any, dp_cp_group: Any) -> Entries:
        """As in :class:`RowReader`, and the table's."""
        first, _ = self.partition.table_rows(self.num_rows)
        place = {"axis": 0, "first": first, "total": self.num_rows}
        groups = {"tp_group": tp_group, "dp_cp_group": dp_cp_group}
        table = sharded_slice(f"{prefix}table", self.table, **place, **groups)
        return super().sharded_entries(prefix, tp_group, dp_cp_group) | {"table": table}


class TrainedRowsReader(TableReader):
    """Reads trainable rows under a bank's keys: at each position that of the longest match; see :class:`TableReader`.

    Args:
        values: what the rows start as, or None for random ones.
    """

    def __init__(
        self,
        config: Any,
        reading: GraftReading,
        partition: Partition,
        seed: SiteSeed,
        tp_group: Any,
        values: RowValues | None,
    ) -> None:
        if reading.trained_rows is None:
            raise ValueError("a site without trained rows has no table of them")
        width = reading.width

        def drawn(first: int, end: int) -> torch.Tensor:
            return seed.table_rows(first, end, width, BANK_ROWS)

        super().__init__(
            config, values=values or drawn, num_rows=reading.trained_rows, rate=ROWS_RATE, tp_group=tp_group,
            width=width, columns=(0, width), partition=partition, seed=seed, part="graft",
        )  # fmt: skip
        self.bank = reading.bank

    def forward(self, memory: MicroBatchMemory, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[S, B, H]``, zero at a miss; ``number`` among the micro-batch's exchanges."""
        rows = self.received(memory, number)
        return self.project(F.embedding(memory.inverse_BS(self.bank).t(), rows))

    def active_SB(self, memory: MicroBatchMemory, number: int) -> torch.Tensor:
        """Bool ``[S, B]``: where a row is read."""
        return memory.order_BS(self.bank).t() > 0


class EngramReader(TableReader):
    """Reads a hashed table; see :class:`TableReader`."""

    def __init__(
        self, config: Any, reading: EngramReading, partition: Partition, seed: SiteSeed, tp_group: Any
    ) -> None:
        first, end = (head * reading.head_dim for head in partition.heads(reading.num_heads))

        def drawn(first: int, end: int) -> torch.Tensor:
            return seed.table_rows(first, end, reading.head_dim)

        super().__init__(
            config, values=drawn, num_rows=reading.num_rows, rate=TABLE_RATE, tp_group=tp_group, width=reading.width,
            columns=(first, end), partition=partition, seed=seed, part="engram",
        )  # fmt: skip

    def forward(self, memory: MicroBatchMemory, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[S, B, H]``, zero where nothing is read; ``number`` among the micro-batch's exchanges."""
        rows_SBhd = F.embedding(memory.reads_BSh(number).transpose(0, 1), self.received(memory, number))
        return self.project(rows_SBhd.flatten(start_dim=2))

    def active_SB(self, memory: MicroBatchMemory, number: int) -> torch.Tensor:
        """Bool ``[S, B]``: where rows are read."""
        return memory.reads_BSh(number)[..., 0].t() > 0
