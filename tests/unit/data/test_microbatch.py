"""The packed tensor: what is written on the host is what the model finds, and nothing else travels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from megatron_graft.bank.row_layout import ROW_DTYPES, RowLayout
from megatron_graft.data.memory_layout import EngramReading, GraftReading, MemoryLayout, SiteReading
from megatron_graft.data.microbatch import MAGIC, MicroBatchMemory
from megatron_graft.data.partition import Partition
from tests.helpers.memories import section_names

BFLOAT16 = RowLayout(dtype=ROW_DTYPES["bfloat16"], widths=(3, 3))
INT8 = RowLayout(dtype=ROW_DTYPES["int8"], widths=(3, 3))
TABLE = EngramReading(num_rows=31, num_heads=6, head_dim=2, max_order=3)


def reading(row_layout: RowLayout, bank: int = 0) -> GraftReading:
    return GraftReading(bank=bank, columns=(0, row_layout.row_dim), row_layout=row_layout, max_order=4)


def bank_layout(row_layout: RowLayout = BFLOAT16) -> MemoryLayout:
    return MemoryLayout.of([SiteReading(layer_number=2, graft=reading(row_layout))], Partition())


def full_layout(size: int = 1, sequence_parallel: bool = False) -> MemoryLayout:
    """Two banks, of which the first is read twice and by other columns, and two tables."""
    half = GraftReading(bank=0, columns=(2, 5), row_layout=BFLOAT16, max_order=4)
    sites = [
        SiteReading(layer_number=2, graft=reading(BFLOAT16), engram=TABLE, exclusive=True),
        SiteReading(layer_number=3, graft=reading(INT8, 2)),
        SiteReading(layer_number=5, graft=half, engram=TABLE),
    ]
    return MemoryLayout.of(sites, Partition(rank=size - 1, size=size, sequence_parallel=sequence_parallel))


LAYOUTS = {
    "bfloat16": bank_layout(),
    "int8": bank_layout(INT8),
    "table alone": MemoryLayout.of([SiteReading(layer_number=1, engram=TABLE)], Partition()),
    "everything": full_layout(),
    "everything, three ranks": full_layout(3),
    "everything, two ranks, sequence parallel": full_layout(2, True),
}
FULL_SECTIONS = [
    "position", "order.0", "inverse.0", "order.2", "inverse.2", "reads.0", "reads.1", "rows.0", "rows.1", "rows.2",
    "requests.0", "requests.1",
]  # fmt: skip


def sections_of(layout: MemoryLayout) -> list[str]:
    return ["header", *section_names(layout)]


def test_what_is_written_on_the_host_is_read_back_from_the_packed_tensor() -> None:
    memory = MicroBatchMemory.allocate(bank_layout(), 41, 2, 5)
    memory.position_BS[:] = torch.arange(10).view(2, 5)
    memory.inverse_BS(0)[:] = torch.arange(10, 0, -1).view(2, 5)
    memory.order_BS(0)[:] = 4
    memory.rows_PR(0).view(torch.bfloat16)[1:] = torch.arange(60).view(10, 6)
    seen = MicroBatchMemory.unpack(memory.layout, memory.packed.clone(), memory.exchange, 2, 5)
    assert seen.header.tolist() == [MAGIC, 41, 2, 5, 0, 0, 0, 0, 0]
    assert seen.sequence_number == 41
    assert seen.position_BS.flatten().tolist() == list(range(10))
    assert seen.inverse_BS(0).flatten().tolist() == list(range(10, 0, -1))
    assert seen.order_BS(0).unique().tolist() == [4]
    assert seen.rows_PR(0).view(torch.bfloat16).float().flatten().tolist() == [0.0] * 6 + list(range(60))


def test_every_section_of_many_banks_and_tables_keeps_what_was_written() -> None:
    memory = MicroBatchMemory.allocate(full_layout(), 0, 2, 4)
    assert sections_of(memory.layout) == ["header", *FULL_SECTIONS]
    for value, name in enumerate(FULL_SECTIONS, start=1):
        memory.section(name).fill_(value)
    for number in range(2):
        memory.exchange[number] = number + 1
    seen = MicroBatchMemory.unpack(memory.layout, memory.packed.clone(), memory.exchange, 2, 4)
    found = [seen.section(name).unique().tolist() for name in FULL_SECTIONS]
    assert found == [[value] for value in range(1, len(FULL_SECTIONS) + 1)]
    assert seen.exchange.tolist() == [[[1], [1]], [[2], [2]]]


def test_sections_have_the_shapes_and_types_of_the_table() -> None:
    memory = MicroBatchMemory.allocate(full_layout(), 0, 2, 4)
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "header": ((8 + 5,), torch.int64),
        "position": ((2, 4), torch.int32),
        "order.2": ((2, 4), torch.uint8),
        "inverse.2": ((2, 4), torch.int32),
        "reads.1": ((2, 4, 6), torch.int32),
        "rows.0": ((9, 12), torch.uint8),
        "rows.1": ((9, 16), torch.uint8),
        "rows.2": ((9, 8), torch.uint8),
        "requests.1": ((2 * 4 * 6,), torch.int32),
    }
    found = {name: (tuple(memory.section(name).shape), memory.section(name).dtype) for name in wanted}
    assert found == wanted


@pytest.mark.parametrize(("size", "sequence_parallel", "heads"), [(3, False, 2), (2, True, 6)])
def test_a_rank_reads_its_heads_and_has_room_for_the_requests_of_all(
    size: int, sequence_parallel: bool, heads: int
) -> None:
    layout = full_layout(size, sequence_parallel)
    positions = 12 // layout.partition.sequence_parts
    memory = MicroBatchMemory.allocate(layout, 0, 2, positions)
    assert memory.reads_BSh(0).shape == (2, positions, heads)
    assert memory.requests(0).shape == (2 * 12 * 6,)
    assert memory.exchange.shape == (2, 2, size)


@pytest.mark.parametrize("name", LAYOUTS)
def test_sections_do_not_overlap_and_are_aligned(name: str) -> None:
    memory = MicroBatchMemory.allocate(LAYOUTS[name], 0, 3, 7)
    base = memory.packed.data_ptr()
    ends = [0]
    for section in sections_of(memory.layout):
        view = memory.section(section)
        start = view.data_ptr() - base
        assert start % 64 == 0
        assert start >= ends[-1]
        ends.append(start + view.numel() * view.element_size())
    assert ends[-1] == memory.packed.numel()


@pytest.mark.parametrize("name", LAYOUTS)
def test_used_bytes_are_the_fixed_sections_and_the_fronts_that_are_in_use(name: str) -> None:
    memory = MicroBatchMemory.allocate(LAYOUTS[name], 0, 2, 4)
    fronts = [section for section in sections_of(memory.layout) if section.startswith(("rows", "requests"))]
    for used, section in enumerate(fronts, start=2):
        memory.set_used(section, used)
    assert [memory.used(section) for section in fronts] == list(range(2, 2 + len(fronts)))
    travelled = torch.zeros(memory.packed.numel(), dtype=torch.bool)
    for first, end in memory.used_ranges():
        assert not travelled[first:end].any()
        travelled[first:end] = True
    seen = MicroBatchMemory.unpack(memory.layout, travelled.byte(), memory.exchange, 2, 4)
    for section in sections_of(memory.layout):
        view = seen.section(section).view(torch.uint8).bool()
        if section in fronts:
            width = view.numel() // len(view) if view.dim() > 1 else 4
            used = memory.used(section) * width
            assert view.flatten()[:used].all() and not view.flatten()[used:].any(), section
        else:
            assert view.all(), section


def test_a_section_that_is_not_in_use_does_not_travel() -> None:
    memory = MicroBatchMemory.allocate(bank_layout(), 0, 2, 4)
    last_fixed = memory.inverse_BS(0)
    end = last_fixed.data_ptr() + last_fixed.numel() * 4
    assert memory.used_ranges() == [(0, end - memory.packed.data_ptr())]


def other_sizes() -> list[tuple[MemoryLayout, int, int]]:
    wide = RowLayout(dtype=ROW_DTYPES["bfloat16"], widths=(4, 4))
    return [
        (bank_layout(wide), 2, 5), (bank_layout(INT8), 2, 5), (bank_layout(), 2, 6), (bank_layout(), 3, 5),
        (full_layout(), 2, 5),
    ]  # fmt: skip


@pytest.mark.parametrize(("layout", "sequences", "positions"), other_sizes())
def test_a_tensor_of_another_shape_is_refused(layout: MemoryLayout, sequences: int, positions: int) -> None:
    memory = MicroBatchMemory.allocate(bank_layout(), 0, 2, 5)
    with pytest.raises(ValueError, match="packed memory has"):
        MicroBatchMemory.unpack(layout, memory.packed, memory.exchange, sequences, positions)


def test_a_tensor_of_another_dtype_is_refused() -> None:
    memory = MicroBatchMemory.allocate(bank_layout(), 0, 2, 5)
    with pytest.raises(ValueError, match=r"torch\.int8"):
        MicroBatchMemory.unpack(memory.layout, memory.packed.view(torch.int8), memory.exchange, 2, 5)


def test_fresh_memory_has_a_zero_row_and_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def dirty(*size: Any, **options: Any) -> torch.Tensor:
        return empty(*size, **options).fill_(255)

    monkeypatch.setattr(torch, "empty", dirty)
    memory = MicroBatchMemory.allocate(full_layout(), 7, 2, 4)
    assert memory.header.tolist() == [MAGIC, 7, 2, 4, *[0] * 9]
    assert all(not memory.rows_PR(graft)[0].any() and memory.rows_PR(graft)[1:].all() for graft in range(3))
    assert not memory.exchange.any()


def test_rows_come_by_position_and_are_zero_at_a_miss() -> None:
    memory = MicroBatchMemory.allocate(bank_layout(INT8), 0, 2, 2)
    rows_PR = memory.rows_PR(0)
    rows_PR[1:] = 255  # rows not in use: elements -1, scales NaN
    rows_PR[1, :6] = torch.tensor([1, 2, 3, 4, 5, 6])
    rows_PR[1, 8:] = torch.tensor([2.0, 0.5]).view(torch.uint8)
    memory.inverse_BS(0)[:] = torch.tensor([[0, 1], [0, 0]])
    rows_SBD = memory.graft_rows_SBD(0, torch.float32)
    assert rows_SBD[1, 0].tolist() == [2.0, 4.0, 6.0, 2.0, 2.5, 3.0]
    assert rows_SBD[0].abs().sum() == rows_SBD[1, 1].abs().sum() == 0


def test_each_gather_is_read_by_the_places_of_its_own_bank() -> None:
    memory = MicroBatchMemory.allocate(full_layout(), 0, 1, 2)
    for graft, bank in enumerate((0, 2, 0)):
        memory.rows_PR(graft)[1:] = 0
        memory.inverse_BS(bank)[:] = torch.tensor([[1, 0]] if bank == 0 else [[0, 1]])
    memory.rows_PR(0)[1].view(torch.bfloat16)[:] = 3
    memory.rows_PR(1)[1, :6], memory.rows_PR(1)[1, 8:] = 5, torch.ones(2).view(torch.uint8)
    memory.rows_PR(2)[1, :6].view(torch.bfloat16)[:] = 7
    read = [memory.graft_rows_SBD(graft, torch.float64)[:, 0].tolist() for graft in range(3)]
    assert read == [[[3.0] * 6, [0.0] * 6], [[0.0] * 6, [5.0] * 6], [[7.0] * 3, [0.0] * 3]]


def test_layouts_of_equal_content_are_one_layout() -> None:
    """Sections are remembered by layout: the model's and the look-ahead's are made apart."""
    for first, second in itertools.combinations([full_layout() for _ in range(3)], 2):
        assert first == second and hash(first) == hash(second)
