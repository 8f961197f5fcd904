"""What sites read, and what a micro-batch brings to one rank for it."""

from __future__ import annotations

import itertools

import pytest

from megatron_graft.bank.row_layout import ROW_DTYPES, Columns, RowLayout
from megatron_graft.data.memory_layout import EngramReading, GraftReading, MemoryLayout, SiteReading
from megatron_graft.data.partition import Partition
from tests.helpers.memories import ranks

ROWS = RowLayout(dtype=ROW_DTYPES["int8"], widths=(5, 4, 6))
TABLE = EngramReading(num_rows=31, num_heads=6, head_dim=2, max_order=3)


def graft(bank: int = 0, columns: Columns = (0, 15), max_order: int = 4) -> GraftReading:
    return GraftReading(bank=bank, columns=columns, row_layout=ROWS, max_order=max_order)


def layout(*sites: SiteReading, partition: Partition | None = None) -> MemoryLayout:
    return MemoryLayout.of(sites, partition or Partition())


def test_a_site_reads_as_wide_and_as_far_back_as_its_memories() -> None:
    assert graft(columns=(3, 9)).width == 6
    assert TABLE.width == 12
    assert SiteReading(layer_number=1, graft=graft(max_order=4)).max_order == 4
    assert SiteReading(layer_number=1, engram=TABLE).max_order == 3
    assert SiteReading(layer_number=1, graft=graft(max_order=2), engram=TABLE).max_order == 3


def test_sites_that_read_the_same_columns_share_one_gather() -> None:
    first, second = (SiteReading(layer_number=layer, graft=graft(columns=(5, 9))) for layer in (2, 5))
    shared = layout(first, second)
    assert [(rows.bank, rows.columns) for rows in shared.grafts] == [(0, (5, 9))]
    assert shared.graft_of(first) == shared.graft_of(second) == 0


def test_sites_that_read_other_columns_share_the_lookup_only() -> None:
    first, second = (
        SiteReading(layer_number=layer, graft=graft(columns=columns)) for layer, columns in ((2, (0, 5)), (5, (5, 9)))
    )
    shared = layout(first, second)
    assert shared.banks == (0,)
    assert [rows.columns for rows in shared.grafts] == [(0, 5), (5, 9)]
    assert (shared.graft_of(first), shared.graft_of(second)) == (0, 1)


def test_banks_that_no_site_of_the_rank_reads_are_not_looked_up() -> None:
    sites = [SiteReading(layer_number=layer, graft=graft(bank)) for layer, bank in ((1, 3), (2, 1), (3, 3))]
    assert layout(*sites).banks == (1, 3)
    assert layout(SiteReading(layer_number=1, engram=TABLE)).banks == ()


def test_the_layout_does_not_depend_on_the_order_in_which_sites_are_named() -> None:
    sites = [
        SiteReading(layer_number=2, graft=graft(1), engram=TABLE),
        SiteReading(layer_number=3, graft=graft(0)),
        SiteReading(layer_number=7, engram=TABLE),
    ]
    layouts = {layout(*order) for order in itertools.permutations(sites)}
    assert len(layouts) == 1
    (only,) = layouts
    assert [rows.layer_number for rows in only.engrams] == [2, 7]
    assert [only.engram_of(site) for site in sites] == [0, None, 1]
    assert [only.graft_of(site) for site in sites] == [0, 1, None]
    assert [only.grafts[number].bank for number in (0, 1)] == [1, 0]


def test_each_site_has_a_table_of_its_own() -> None:
    sites = [SiteReading(layer_number=layer, engram=TABLE) for layer in (2, 4)]
    assert len(layout(*sites).engrams) == 2


def test_a_table_skips_hits_only_where_a_site_reads_both_exclusively() -> None:
    skipped = [
        layout(site).engrams[0].skip_hits_of
        for site in (
            SiteReading(layer_number=1, graft=graft(2), engram=TABLE, exclusive=True),
            SiteReading(layer_number=1, graft=graft(2), engram=TABLE),
            SiteReading(layer_number=1, engram=TABLE, exclusive=True),
        )
    ]
    assert skipped == [2, None, None]


@pytest.mark.parametrize("columns", [(0, 15), (5, 9), (3, 12)])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_column_slices_of_all_ranks_are_the_columns_of_the_site(size: int, columns: Columns) -> None:
    site = SiteReading(layer_number=2, graft=graft(columns=columns))
    slices = [layout(site, partition=place).grafts[0] for place in ranks(size, False)]
    read = [column for rows in slices for column in range(*rows.columns)]
    assert read == list(range(*columns))
    for rows in slices:
        assert rows.row_layout == ROWS.sliced(rows.columns)
        assert rows.row_layout.row_bytes() == ROWS.row_bytes(rows.columns)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_under_sequence_parallelism_every_rank_reads_whole_rows_and_all_heads(size: int) -> None:
    site = SiteReading(layer_number=2, graft=graft(columns=(3, 12)), engram=TABLE)
    for place in ranks(size, True):
        here = layout(site, partition=place)
        assert here.grafts[0].columns == (3, 12)
        assert here.engrams[0].heads == (0, 6)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_heads_of_all_ranks_are_the_heads_of_the_table(size: int) -> None:
    site = SiteReading(layer_number=2, engram=TABLE)
    heads = [layout(site, partition=place).engrams[0].heads for place in ranks(size, False)]
    assert [head for first, end in heads for head in range(first, end)] == list(range(6))
