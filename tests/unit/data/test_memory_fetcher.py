"""From tokens to the packed memory: rows of banks, by the definition, for one rank and for all of them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.bank.row_layout import Columns
from megatron_graft.data.memory_fetcher import MemoryFetcher, MemorySources
from megatron_graft.data.memory_layout import MemoryLayout, SiteReading
from megatron_graft.data.microbatch import MicroBatchMemory
from megatron_graft.data.partition import Partition
from megatron_graft.lookup.index import open_index
from megatron_graft.ngram.oracle import brute_force_lookup
from megatron_graft.ngram.windows import positions_in_document
from tests.helpers.banks import EOD
from tests.helpers.memories import (
    VOCAB,
    contents,
    engram_reading,
    fetch_on_all,
    graft_reading,
    layout_of,
    random_tokens,
    small_bank,
    small_memory,
    small_tables,
)

ROW_DTYPES = ["bfloat16", "float16", "float32", "int8", "float8_e4m3"]


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return small_bank(tmp_path_factory.mktemp("fetcher") / "bank")


def bank_layout(bank: Bank, partition: Partition | None = None) -> MemoryLayout:
    return MemoryLayout.of([SiteReading(layer_number=2, graft=graft_reading(bank))], partition or Partition())


def fetcher_of(bank: Bank, implementation: str = "native") -> MemoryFetcher:
    opened = open_bank(bank.path, rows=bank.num_rows, gather=implementation)  # type: ignore[arg-type]
    index = open_index(opened, implementation)  # type: ignore[arg-type]
    sources = MemorySources(banks=[(opened, index)], eod=EOD, implementation=implementation)  # type: ignore[arg-type]
    return MemoryFetcher(sources, bank_layout(bank))


def expected_rows(bank: Bank, tokens: np.ndarray, columns: Columns | None = None) -> tuple[np.ndarray, np.ndarray]:
    """uint8 ``[B, S, R]`` rows as stored (zero at a miss) and orders, by the definition."""
    rows, orders = brute_force_lookup(bank.rows_of_keys(), tokens, EOD, bank.min_order, bank.max_order)
    gathered = np.empty((rows.size, bank.bytes_of_row(columns)), dtype=np.uint8)
    bank.gather(rows.ravel(), gathered, columns)
    return gathered.reshape(*rows.shape, -1), orders


def expected_values(bank: Bank, tokens: np.ndarray, columns: Columns) -> np.ndarray:
    """float32 ``[B, S, D]``: the numbers of those rows."""
    rows, _ = brute_force_lookup(bank.rows_of_keys(), tokens, EOD, bank.min_order, bank.max_order)
    return bank.float_rows(rows.ravel())[:, slice(*columns)].reshape(*rows.shape, -1)


def rows_by_position(memory: MicroBatchMemory, graft: int = 0) -> np.ndarray:
    """uint8 ``[B, S, R]``: what the inverse finds among the rows."""
    bank = memory.layout.grafts[graft].bank
    found: np.ndarray = memory.rows_PR(graft).numpy()[memory.inverse_BS(bank).numpy()]
    return found


def values_BSD(memory: MicroBatchMemory, graft: int = 0) -> np.ndarray:
    """float32 ``[B, S, D]``: what the site would read."""
    return memory.graft_rows_SBD(graft, torch.float32).transpose(0, 1).numpy()


@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize("seed", range(5))
def test_every_position_gets_the_row_of_its_longest_suffix(bank: Bank, seed: int, implementation: str) -> None:
    tokens = random_tokens(seed)
    fetched = fetcher_of(bank, implementation).fetch(tokens, 9)
    rows, orders = expected_rows(bank, tokens.numpy())
    assert orders.any(), "the test must meet hits"
    memory = fetched.memory
    assert np.array_equal(rows_by_position(memory), rows)
    assert np.array_equal(memory.order_BS(0).numpy(), orders)
    assert np.array_equal(memory.position_BS.numpy(), positions_in_document(tokens.numpy(), EOD))
    assert memory.sequence_number == 9
    counted = np.bincount(orders.ravel(), minlength=bank.max_order + 1).tolist()
    assert [orders_.tolist() for orders_ in fetched.counts.orders] == [counted]


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
def test_rows_of_every_dtype_travel_as_stored_and_mean_what_the_bank_says(tmp_path: Path, row_dtype: str) -> None:
    bank = small_bank(tmp_path / "bank", row_dtype=row_dtype)
    tokens = random_tokens(2)
    memory = fetcher_of(bank).fetch(tokens, 0).memory
    assert np.array_equal(rows_by_position(memory), expected_rows(bank, tokens.numpy())[0])
    np.testing.assert_array_equal(values_BSD(memory), expected_values(bank, tokens.numpy(), (0, bank.row_dim)))


@pytest.mark.parametrize("columns", [(0, 10), (5, 10), (2, 9)])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
def test_column_slices_of_all_ranks_mean_the_columns_that_the_site_reads(
    tmp_path: Path, row_dtype: str, size: int, columns: Columns
) -> None:
    bank = small_bank(tmp_path / "bank", row_dtype=row_dtype)
    memory = small_memory(SiteReading(layer_number=2, graft=graft_reading(bank, 0, columns)), banks=[bank])
    tokens = random_tokens(6)
    slices = [values_BSD(part) for part in fetch_on_all(memory, tokens, size, False)]
    assert len({part.shape for part in slices}) == 1 + ((columns[1] - columns[0]) % size > 0)
    np.testing.assert_array_equal(np.concatenate(slices, axis=2), expected_values(bank, tokens.numpy(), columns))


def test_a_bank_cut_to_its_first_rows_gives_those_only(bank: Bank) -> None:
    cut = open_bank(bank.path, rows=bank.num_rows // 3)
    tokens = random_tokens(3)
    memory = fetcher_of(cut).fetch(tokens, 0).memory
    rows, orders = expected_rows(cut, tokens.numpy())
    assert not np.array_equal(orders, expected_rows(bank, tokens.numpy())[1]), "the cut must be felt"
    assert np.array_equal(memory.order_BS(0).numpy(), orders)
    assert np.array_equal(rows_by_position(memory), rows)


def test_each_row_is_gathered_once(bank: Bank) -> None:
    fetched = fetcher_of(bank).fetch(random_tokens(0).repeat(4, 1), 0)
    inverse = fetched.memory.inverse_BS(0).numpy()
    assert fetched.counts.graft_rows == np.unique(inverse[inverse > 0]).size
    assert fetched.memory.used("rows.0") == 1 + fetched.counts.graft_rows
    assert inverse.max() == fetched.counts.graft_rows


def test_two_sites_that_read_the_same_of_a_bank_make_one_lookup_and_one_gather(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = small_bank(tmp_path / "bank")
    gathered: list[Columns | None] = []
    gather = bank.gather

    def counted(rows: np.ndarray, out: np.ndarray, columns: Columns | None = None) -> None:
        gathered.append(columns)
        gather(rows, out, columns)

    monkeypatch.setattr(bank, "gather", counted)
    columns = [(0, 5), (0, 5), (3, 9)]
    readings = [
        SiteReading(layer_number=layer, graft=graft_reading(bank, 0, of_site))
        for layer, of_site in enumerate(columns, start=1)
    ]
    memory = small_memory(*readings, banks=[bank])
    tokens = random_tokens(1)
    fetched = memory.fetcher(layout_of(memory)).fetch(tokens, 0)
    assert gathered == [(0, 5), (3, 9)]
    assert fetched.memory.layout.banks == (0,)
    assert fetched.counts.graft_rows == fetched.memory.used("rows.0") - 1 == fetched.memory.used("rows.1") - 1
    for reading, of_site in zip(readings, columns, strict=True):
        graft = fetched.memory.layout.graft_of(reading)
        assert graft is not None
        assert np.array_equal(rows_by_position(fetched.memory, graft), expected_rows(bank, tokens.numpy(), of_site)[0])


def test_sites_read_several_banks_side_by_side(bank: Bank, tmp_path: Path) -> None:
    """Of three banks two are read, in either order; matches are counted by bank."""
    banks = [bank, *(small_bank(tmp_path / name, seed=seed) for name, seed in (("other", 8), ("third", 9)))]
    readings = [
        SiteReading(layer_number=layer, graft=graft_reading(banks[number], number))
        for layer, number in ((1, 2), (2, 0))
    ]
    memory, tokens = small_memory(*readings, banks=banks), random_tokens(4)
    fetched = memory.fetcher(layout_of(memory)).fetch(tokens, 0)
    for graft, number in enumerate((2, 0)):
        rows, orders = expected_rows(banks[number], tokens.numpy())
        assert np.array_equal(rows_by_position(fetched.memory, graft), rows)
        assert np.array_equal(fetched.memory.order_BS(number).numpy(), orders)
        assert fetched.counts.orders[number].tolist() == np.bincount(orders.ravel(), minlength=5).tolist()
    assert fetched.counts.orders[1].tolist() == [0] * 5
    assert fetched.counts.graft_rows == sum(fetched.memory.used(f"rows.{graft}") - 1 for graft in range(2))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_slices_put_together_are_the_whole_sequence(bank: Bank, size: int) -> None:
    memory, tokens = (
        small_memory(SiteReading(layer_number=2, graft=graft_reading(bank)), banks=[bank]),
        random_tokens(1),
    )
    (whole,) = fetch_on_all(memory, tokens, 1, False)
    slices = fetch_on_all(memory, tokens, size, True)
    assert np.array_equal(np.concatenate([rows_by_position(part) for part in slices], axis=1), rows_by_position(whole))
    for name in ("order.0", "position"):
        assert torch.equal(torch.cat([part.section(name) for part in slices], dim=1), whole.section(name))


@pytest.mark.parametrize("fill", [EOD, VOCAB - 1])
def test_all_misses_and_full_hits_are_handled(bank: Bank, fill: int) -> None:
    tokens = torch.full((2, 8), fill)
    rows, _ = expected_rows(bank, tokens.numpy())
    assert np.array_equal(rows_by_position(fetcher_of(bank).fetch(tokens, 0).memory), rows)


@pytest.fixture
def fetcher(bank: Bank) -> MemoryFetcher:
    """Of a site that reads a bank and a table."""
    engram = small_tables()
    reading = SiteReading(layer_number=2, graft=graft_reading(bank), engram=engram_reading(engram), exclusive=True)
    memory = small_memory(reading, banks=[bank], engram=engram)
    return memory.fetcher(layout_of(memory))


def test_a_memory_is_not_touched_by_later_calls(fetcher: MemoryFetcher) -> None:
    """The scratch is used again; what was handed out is not."""
    first = fetcher.fetch(random_tokens(0), 0)
    before, counts = contents(first.memory), first.counts.orders[0].copy()
    for seed, shape in ((1, (3, 24)), (2, (1, 5)), (3, (3, 24))):
        fetcher.fetch(random_tokens(seed, *shape), seed)
    assert contents(first.memory) == before
    assert np.array_equal(first.counts.orders[0], counts)


def test_calls_of_one_shape_use_the_same_scratch_and_another_thread_its_own(fetcher: MemoryFetcher) -> None:
    def addresses() -> set[int]:
        fetcher.fetch(random_tokens(0), 0)
        buffers: dict[str, Any] = fetcher._scratch._buffers
        return {buffer.ctypes.data for buffer in buffers.values()}

    first = addresses()
    assert len(first) == 9 and addresses() == first
    elsewhere: list[set[int]] = []
    thread = threading.Thread(target=lambda: elsewhere.append(addresses()))
    thread.start()
    thread.join()
    assert elsewhere[0].isdisjoint(first)


def test_several_threads_at_once_get_what_each_asked_for(bank: Bank, fetcher: MemoryFetcher) -> None:
    batches = [random_tokens(seed) for seed in range(4)]
    rows = [expected_rows(bank, tokens.numpy())[0] for tokens in batches]
    wanted = [contents(fetcher.fetch(tokens, 0).memory) for tokens in batches]
    wrong: list[int] = []

    def repeat(number: int) -> None:
        for _ in range(50):
            memory = fetcher.fetch(batches[number], 0).memory
            if contents(memory) != wanted[number] or not np.array_equal(rows_by_position(memory), rows[number]):
                wrong.append(number)

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
