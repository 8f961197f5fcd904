"""What the memory sites of a rank read, and what one micro-batch therefore brings them.

A *reading* says what one site reads, whatever the parallel layout. A :class:`MemoryLayout` is made from the readings of
the sites on one rank: banks that several sites read are looked up once, and the same columns are gathered once. Where
sites train rows of their own instead of reading the bank's, nothing is gathered: the rows found are asked for, as those
of a hashed table are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_graft.bank.row_layout import Columns, RowLayout
from megatron_graft.data.partition import Partition


@dataclass(frozen=True, kw_only=True)
class GraftReading:
    """The bank columns that a site reads.

    Attributes:
        bank: number of the bank among those of the run, from 0.
        columns: (first, end) within the bank's rows.
        row_layout: of the bank's whole rows.
        max_order: longest n-gram of the bank.
        trained_rows: how many rows the bank has, if the site trains rows of its own under the bank's keys; None if it
            reads the bank's.
    """

    bank: int
    columns: Columns
    row_layout: RowLayout
    max_order: int
    trained_rows: int | None = None

    @property
    def width(self) -> int:
        """D, number of columns."""
        return self.columns[1] - self.columns[0]


@dataclass(frozen=True, kw_only=True)
class EngramReading:
    """The hashed table that a site reads.

    Attributes:
        num_rows: of the whole table, all heads together.
        num_heads: rows read at each position.
        head_dim: elements of a row.
        max_order: longest n-gram that is hashed.
    """

    num_rows: int
    num_heads: int
    head_dim: int
    max_order: int

    @property
    def width(self) -> int:
        """D, elements read at each position."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class SiteReading:
    """What one site reads.

    Attributes:
        layer_number: Megatron's global, 1-based number of the layer.
        graft: a bank's columns, or None.
        engram: a hashed table, or None.
        exclusive: read the table only where the bank has no match; else everywhere.
    """

    layer_number: int
    graft: GraftReading | None = None
    engram: EngramReading | None = None
    exclusive: bool = False

    @property
    def max_order(self) -> int:
        """The site's longest n-gram."""
        return max(reading.max_order for reading in (self.graft, self.engram) if reading is not None)


@dataclass(frozen=True, kw_only=True)
class GraftRows:
    """Rows that a rank gathers for each micro-batch: a slice of a bank's columns.

    Attributes:
        bank: number of the bank.
        columns: (first, end) within the bank's rows.
        row_layout: of the slice.
    """

    bank: int
    columns: Columns
    row_layout: RowLayout


@dataclass(frozen=True, kw_only=True)
class EngramRows:
    """Rows of a trainable table that the ranks of a site exchange for each micro-batch.

    Attributes:
        layer_number: of the site.
        reading: the table.
        heads: (first, end) of the heads that this rank reads.
        skip_hits_of: number of the bank at whose hits nothing is read, or None.
    """

    layer_number: int
    reading: EngramReading
    heads: tuple[int, int]
    skip_hits_of: int | None


@dataclass(frozen=True, kw_only=True)
class TrainedRows:
    """Rows under a bank's keys that sites train, and that the ranks exchange for each micro-batch.

    Every site has rows of its own; which ones it reads follows from the bank, so sites of one bank share this.

    Attributes:
        bank: number of the bank.
        num_rows: of the bank, and of each of its sites' tables.
    """

    bank: int
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class MemoryLayout:
    """What one micro-batch brings to the sites of one rank.

    Exchanges are numbered: those of :attr:`engrams` come first, those of :attr:`trained` follow.

    Attributes:
        partition: the rank's place among the tensor- and context-parallel ranks.
        banks: numbers of the banks that are looked up, ascending.
        grafts: what is gathered.
        engrams: what is exchanged of hashed tables, by layer.
        trained: what is exchanged of trained rows, by bank.
    """

    partition: Partition
    banks: tuple[int, ...]
    grafts: tuple[GraftRows, ...]
    engrams: tuple[EngramRows, ...]
    trained: tuple[TrainedRows, ...]

    @classmethod
    def of(cls, sites: Iterable[SiteReading], partition: Partition) -> MemoryLayout:
        """The layout that serves the given sites of a rank.

        Raises:
            ValueError: rows are trained where a rank reads a slice of every row's columns.
        """
        by_layer = sorted(sites, key=lambda site: site.layer_number)
        readings = [site.graft for site in by_layer if site.graft]
        rows_of = {reading.bank: reading.trained_rows for reading in readings if reading.trained_rows is not None}
        if rows_of and partition.splits_columns:
            raise ValueError("trained rows are exchanged whole: no rank can read a slice of their columns")
        return cls(
            partition=partition,
            banks=tuple(sorted({reading.bank for reading in readings})),
            grafts=tuple(
                dict.fromkeys(_graft_rows(graft, partition) for graft in readings if graft.trained_rows is None)
            ),
            engrams=tuple(_engram_rows(site, site.engram, partition) for site in by_layer if site.engram),
            trained=tuple(TrainedRows(bank=bank, num_rows=rows) for bank, rows in sorted(rows_of.items())),
        )

    @property
    def exchanged_rows(self) -> tuple[int, ...]:
        """For each exchange the number of rows of the whole table."""
        return (*(engram.reading.num_rows for engram in self.engrams), *(rows.num_rows for rows in self.trained))

    def graft_of(self, site: SiteReading) -> int | None:
        """Place among :attr:`grafts` of what a site reads; None if it reads no frozen rows."""
        if site.graft is None or site.graft.trained_rows is not None:
            return None
        return self.grafts.index(_graft_rows(site.graft, self.partition))

    def engram_of(self, site: SiteReading) -> int | None:
        """Place among :attr:`engrams` of what a site reads, which is the number of its exchange."""
        layers = [rows.layer_number for rows in self.engrams]
        return layers.index(site.layer_number) if site.engram else None

    def trained_of(self, site: SiteReading) -> int | None:
        """Number of the exchange of a site's trained rows; None if it has none."""
        if site.graft is None or site.graft.trained_rows is None:
            return None
        return self.exchange_of_bank(site.graft.bank)

    def exchange_of_bank(self, bank: int) -> int | None:
        """Number of the exchange of rows trained under a bank's keys; None if no site trains any."""
        banks = [rows.bank for rows in self.trained]
        return len(self.engrams) + banks.index(bank) if bank in banks else None


def _graft_rows(reading: GraftReading, partition: Partition) -> GraftRows:
    first, end = partition.columns(reading.width)
    columns = (reading.columns[0] + first, reading.columns[0] + end)
    return GraftRows(bank=reading.bank, columns=columns, row_layout=reading.row_layout.sliced(columns))


def _engram_rows(site: SiteReading, reading: EngramReading, partition: Partition) -> EngramRows:
    return EngramRows(
        layer_number=site.layer_number,
        reading=reading,
        heads=partition.heads(reading.num_heads),
        skip_hits_of=site.graft.bank if site.exclusive and site.graft else None,
    )
