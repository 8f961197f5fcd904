"""What the memory sites of a rank read, and what one micro-batch therefore brings them.

A *reading* says what one site reads, whatever the parallel layout. A :class:`MemoryLayout` is made from the readings of
the sites on one rank: banks that several sites read are looked up once, and the same columns are gathered once.
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
    """

    bank: int
    columns: Columns
    row_layout: RowLayout
    max_order: int

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
class MemoryLayout:
    """What one micro-batch brings to the sites of one rank.

    Attributes:
        partition: the rank's place among the tensor-parallel ranks.
        banks: numbers of the banks that are looked up, ascending.
        grafts: what is gathered.
        engrams: what is exchanged, by layer.
    """

    partition: Partition
    banks: tuple[int, ...]
    grafts: tuple[GraftRows, ...]
    engrams: tuple[EngramRows, ...]

    @classmethod
    def of(cls, sites: Iterable[SiteReading], partition: Partition) -> MemoryLayout:
        """The layout that serves the given sites of a rank."""
        by_layer = sorted(sites, key=lambda site: site.layer_number)
        grafts = [_graft_rows(site.graft, partition) for site in by_layer if site.graft]
        return cls(
            partition=partition,
            banks=tuple(sorted({rows.bank for rows in grafts})),
            grafts=tuple(dict.fromkeys(grafts)),
            engrams=tuple(_engram_rows(site, site.engram, partition) for site in by_layer if site.engram),
        )

    def graft_of(self, site: SiteReading) -> int | None:
        """Place among :attr:`grafts` of what a site reads."""
        return self.grafts.index(_graft_rows(site.graft, self.partition)) if site.graft else None

    def engram_of(self, site: SiteReading) -> int | None:
        """Place among :attr:`engrams` of what a site reads."""
        layers = [rows.layer_number for rows in self.engrams]
        return layers.index(site.layer_number) if site.engram else None


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
