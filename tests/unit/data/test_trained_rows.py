"""Rows trained under a bank's keys: which ones each rank asks for, and that nothing is gathered from the bank."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_graft.bank.reader import Bank
from megatron_graft.data.memory_layout import GraftReading, MemoryLayout, SiteReading, TrainedRows
from megatron_graft.data.microbatch import MicroBatchMemory
from megatron_graft.data.partition import Partition
from megatron_graft.ngram.oracle import brute_force_lookup
from megatron_graft.training.memory_setup import RunMemory
from tests.helpers.banks import EOD
from tests.helpers.memories import (
    contents,
    engram_reading,
    fetch_on_all,
    graft_reading,
    layout_of,
    positions_of,
    random_tokens,
    ranks,
    small_bank,
    small_memory,
    small_tables,
)

LAYOUTS = [(1, False), (1, True), (2, True), (3, True), (4, True), (2, True, (1, 2)), (1, True, (1, 3))]


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> list[Bank]:
    directory = tmp_path_factory.mktemp("trained")
    return [small_bank(directory / f"bank-{seed}", seed=seed, keys=keys) for seed, keys in ((5, 60), (6, 31))]


def trained(bank: Bank, number: int = 0, columns: tuple[int, int] | None = None) -> GraftReading:
    """What a site reads that trains rows of its own."""
    return dataclasses.replace(graft_reading(bank, number, columns), trained_rows=bank.num_rows)


@pytest.fixture(scope="module")
def memory(banks: list[Bank]) -> RunMemory:
    """Two sites of the first bank, one with a table at its misses, and one of the second."""
    engram = small_tables((2,))
    readings = [
        SiteReading(layer_number=2, graft=trained(banks[0]), engram=engram_reading(engram), exclusive=True),
        SiteReading(layer_number=3, graft=trained(banks[1], 1)),
        SiteReading(layer_number=5, graft=trained(banks[0], 0, (2, 9))),
    ]
    return small_memory(*readings, banks=banks, engram=engram)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return random_tokens(11)


@pytest.fixture(params=LAYOUTS, ids=str)
def parts(request: pytest.FixtureRequest, memory: RunMemory, tokens: torch.Tensor) -> list[MicroBatchMemory]:
    return fetch_on_all(memory, tokens, *request.param)


def rows_of(bank: Bank, tokens: torch.Tensor) -> np.ndarray:
    """int64 ``[B, S]``: rows by the definition, -1 at a miss."""
    rows, _ = brute_force_lookup(bank.rows_of_keys(), tokens.numpy(), EOD, bank.min_order, bank.max_order)
    assert 0 < (rows >= 0).sum() < rows.size, "the test must meet hits and misses"
    return rows


def sent(part: MicroBatchMemory, number: int, target: int) -> np.ndarray:
    """Rows of the whole table that a rank sends to another."""
    sizes = part.exchange[number, 0].tolist()
    requests = part.requests(number).numpy()[sum(sizes[:target]) : sum(sizes[: target + 1])]
    first, end = part.layout.partition.table_rows(part.layout.exchanged_rows[number])
    assert ((requests >= 0) & (requests < end - first)).all()
    return requests + np.int64(first)


def test_sites_of_a_bank_share_an_exchange_and_exchanges_follow_those_of_tables(
    memory: RunMemory, banks: list[Bank]
) -> None:
    layout = layout_of(memory)
    assert (layout.banks, layout.grafts) == ((0, 1), ())
    assert layout.trained == (
        TrainedRows(bank=0, num_rows=banks[0].num_rows), TrainedRows(bank=1, num_rows=banks[1].num_rows)
    )  # fmt: skip
    table = layout.engrams[0].reading.num_rows
    assert layout.exchanged_rows == (table, banks[0].num_rows, banks[1].num_rows)
    assert {layer: layout.trained_of(site.reading) for layer, site in memory.sites.items()} == {2: 1, 3: 2, 5: 1}
    assert [layout.graft_of(site.reading) for site in memory.sites.values()] == [None] * 3
    assert (layout.exchange_of_bank(0), layout.exchange_of_bank(1), layout.exchange_of_bank(2)) == (1, 2, None)


def test_frozen_rows_need_no_exchange(banks: list[Bank]) -> None:
    site = SiteReading(layer_number=2, graft=graft_reading(banks[0]))
    layout = MemoryLayout.of([site], Partition())
    assert (layout.trained, layout.exchanged_rows, layout.trained_of(site)) == ((), (), None)


def test_some_sites_may_train_rows_while_others_read_the_banks(banks: list[Bank], tokens: torch.Tensor) -> None:
    bank = banks[0]
    own, frozen = SiteReading(layer_number=2, graft=trained(bank)), SiteReading(layer_number=3, graft=trained(bank))
    frozen = dataclasses.replace(frozen, graft=graft_reading(bank))
    memory = small_memory(own, frozen, banks=[bank])
    (part,) = fetch_on_all(memory, tokens, 1, False)
    layout = part.layout
    assert (layout.trained_of(own), layout.graft_of(own)) == (0, None)
    assert (layout.trained_of(frozen), layout.graft_of(frozen)) == (None, 0)
    rows = rows_of(bank, tokens)
    values = part.graft_rows_SBD(0, torch.float32).transpose(0, 1).numpy()
    assert np.array_equal(values, bank.float_rows(rows.ravel()).reshape(values.shape))
    assert np.array_equal(np.concatenate([[-1], sent(part, 0, 0)])[part.inverse_BS(0).numpy()], rows)


def test_a_rank_that_reads_slices_of_columns_cannot_have_trained_rows(banks: list[Bank]) -> None:
    site = SiteReading(layer_number=2, graft=trained(banks[0]))
    with pytest.raises(ValueError, match="trained rows are exchanged whole"):
        MemoryLayout.of([site], Partition(rank=1, size=2))


@pytest.mark.parametrize("bank", [0, 1])
def test_places_find_every_positions_row_among_those_that_arrive(
    banks: list[Bank], tokens: torch.Tensor, parts: list[MicroBatchMemory], bank: int
) -> None:
    rows, number = rows_of(banks[bank], tokens), 1 + bank
    for rank, part in enumerate(parts):
        arrived = np.concatenate([[-1], *(sent(source, number, rank) for source in parts)])
        assert np.array_equal(arrived[part.inverse_BS(bank).numpy()], rows[:, positions_of(part.layout.partition, 24)])
        received = [len(sent(source, number, rank)) for source in parts]
        assert part.exchange[number, 1].tolist() == received
        assert len(np.unique(arrived)) == len(arrived), "a row is asked for twice"
        assert part.used(f"requests.{number}") == sum(part.exchange[number, 0].tolist())


def test_nothing_is_gathered_from_the_bank(
    memory: RunMemory, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(*_: object) -> None:
        raise AssertionError("a row was gathered")

    monkeypatch.setattr(Bank, "gather", gather)
    (part,) = fetch_on_all(memory, tokens, 1, False)
    assert [name for name in contents(part) if name.startswith("rows")] == []
    with pytest.raises(KeyError):
        part.section("rows.0")


def test_the_reference_path_fetches_the_same_bytes(memory: RunMemory) -> None:
    tokens = random_tokens(3, 2, 12)
    for place in [Partition(), *ranks(3, True)]:
        layout = layout_of(memory, place)
        native, reference = (
            fetcher.fetch(tokens, 3).memory for fetcher in (memory.fetcher(layout), memory.reference_fetcher(layout))
        )
        assert contents(native) == contents(reference)
        assert native.header.tolist() == reference.header.tolist()
        for number in (1, 2):
            used = native.used(f"requests.{number}")
            assert torch.equal(native.requests(number)[:used], reference.requests(number)[:used])


def test_matches_and_distinct_rows_are_counted_as_those_of_frozen_rows(
    memory: RunMemory, banks: list[Bank], tokens: torch.Tensor
) -> None:
    frozen = small_memory(
        *(dataclasses.replace(site.reading, graft=graft_reading(banks[number], number), engram=None)
          for site, number in zip(memory.sites.values(), (0, 1, 0), strict=True)),
        banks=banks,
    )  # fmt: skip
    for place in [Partition(), *ranks(2, True)]:
        counts, expected = (m.fetcher(layout_of(m, place)).fetch(tokens, 0).counts for m in (memory, frozen))
        assert counts.graft_rows == expected.graft_rows > 0
        assert all(np.array_equal(*pair) for pair in zip(counts.orders, expected.orders, strict=True))
