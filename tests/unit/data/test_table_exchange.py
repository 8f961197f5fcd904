"""Hashed tables whose rows several ranks share: who asks whom for what, worked out by each rank on its own."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from megatron_graft.bank.reader import Bank
from megatron_graft.data.memory_layout import SiteReading
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
    oracle_rows,
    positions_of,
    random_tokens,
    ranks,
    small_bank,
    small_memory,
    small_tables,
)

LAYERS = (2, 5)  # layer 2 reads its table at misses only, layer 5 everywhere
LAYOUTS = [
    *(
        (size, parallel, (0, 1))
        for size, parallel in [(1, False), (1, True), *itertools.product((2, 3, 4), (False, True))]
    ),
    *itertools.product((1, 2, 3), (False, True), [(0, 2), (1, 2), (2, 3)]),
]


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return small_bank(tmp_path_factory.mktemp("exchange") / "bank")


@pytest.fixture(scope="module", params=[False, True], ids=["within documents", "across documents"])
def memory(request: pytest.FixtureRequest, bank: Bank) -> RunMemory:
    engram = small_tables(LAYERS, across_documents=request.param)
    first, second = (engram_reading(engram, layer) for layer in LAYERS)
    readings = [
        SiteReading(layer_number=2, graft=graft_reading(bank), engram=first, exclusive=True),
        SiteReading(layer_number=5, graft=graft_reading(bank), engram=second),
    ]
    return small_memory(*readings, banks=[bank], engram=engram)


def wanted_rows(memory: RunMemory, number: int, tokens: torch.Tensor) -> np.ndarray:
    """int64 ``[B, S, K]``: rows of a table that whole sequences read, -1 where nothing is read."""
    assert memory.engram is not None
    rows = oracle_rows(memory.engram, LAYERS[number], tokens)
    if LAYERS[number] == 2:
        (bank,) = memory.banks
        _, orders = brute_force_lookup(bank.rows_of_keys(), tokens.numpy(), EOD, bank.min_order, bank.max_order)
        assert 0 < (orders > 0).sum() < orders.size, "the test must meet hits and misses"
        rows[orders > 0] = -1
    return rows


def part_of(rows_BSK: np.ndarray, place: Partition) -> np.ndarray:
    """What one rank reads of them."""
    return rows_BSK[:, positions_of(place, rows_BSK.shape[1]), slice(*place.heads(rows_BSK.shape[2]))]


@dataclass
class Exchange:
    """What the ranks do with one table."""

    parts: list[MicroBatchMemory]
    number: int

    @property
    def num_rows(self) -> int:
        return self.parts[0].layout.engrams[self.number].reading.num_rows

    def sizes(self, rank: int) -> tuple[list[int], list[int]]:
        """How many rows a rank sends to each rank, and how many it receives from each."""
        sent, received = self.parts[rank].exchange[self.number].tolist()
        return sent, received

    def sent(self, source: int, target: int) -> np.ndarray:
        """Rows of the whole table that one rank sends to another."""
        place, (sizes, _) = self.parts[source].layout.partition, self.sizes(source)
        requests = self.parts[source].requests(self.number).numpy()
        of_target = requests[sum(sizes[:target]) : sum(sizes[: target + 1])]
        first, end = place.table_rows(self.num_rows)
        assert ((of_target >= 0) & (of_target < end - first)).all()
        return of_target + np.int64(first)

    def read(self, rank: int) -> np.ndarray:
        """int64 ``[B, s, h]``: rows of the whole table that a rank's reads find among what arrives; -1 is nothing."""
        arrived = [self.sent(source, rank) for source in range(len(self.parts))]
        return np.concatenate([[-1], *arrived])[self.parts[rank].reads_BSh(self.number).numpy()]


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return random_tokens(11)


def name_of(layout: tuple[int, bool, tuple[int, int]]) -> str:
    size, sequence_parallel, (context, contexts) = layout
    return f"T={size}{', sequence parallel' if sequence_parallel else ''}, context {context} of {contexts}"


@pytest.fixture(params=LAYOUTS, ids=name_of)
def parts(request: pytest.FixtureRequest, memory: RunMemory, tokens: torch.Tensor) -> list[MicroBatchMemory]:
    return fetch_on_all(memory, tokens, *request.param)


@pytest.mark.parametrize("number", [0, 1])
def test_reads_find_every_positions_hashed_rows_among_those_that_arrive(
    memory: RunMemory, tokens: torch.Tensor, parts: list[MicroBatchMemory], number: int
) -> None:
    rows, exchange = wanted_rows(memory, number, tokens), Exchange(parts, number)
    for rank, part in enumerate(parts):
        assert np.array_equal(exchange.read(rank), part_of(rows, part.layout.partition))


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_is_sent_the_distinct_rows_that_it_reads_of_each_share_and_no_others(
    memory: RunMemory, tokens: torch.Tensor, parts: list[MicroBatchMemory], number: int
) -> None:
    rows, exchange = wanted_rows(memory, number, tokens), Exchange(parts, number)
    for source, target in itertools.product(range(len(parts)), repeat=2):
        distinct = np.unique(part_of(rows, parts[target].layout.partition))
        first, end = parts[source].layout.partition.table_rows(exchange.num_rows)
        assert exchange.sent(source, target).tolist() == [row for row in distinct.tolist() if first <= row < end]


@pytest.mark.parametrize("number", [0, 1])
def test_what_one_rank_sends_another_expects(parts: list[MicroBatchMemory], number: int) -> None:
    exchange = Exchange(parts, number)
    sent = np.array([exchange.sizes(rank)[0] for rank in range(len(parts))])
    received = np.array([exchange.sizes(rank)[1] for rank in range(len(parts))])
    assert np.array_equal(sent, received.T)
    assert sent.sum() > 0
    for rank, part in enumerate(parts):
        assert part.used(f"requests.{number}") == sent[rank].sum()


def test_no_rank_has_to_be_told_anything_by_another(memory: RunMemory, tokens: torch.Tensor) -> None:
    """A rank's memory follows from tokens and its place: the same again, whoever else fetched."""
    for place in ranks(3, False):
        alone = memory.fetcher(layout_of(memory, place)).fetch(tokens, 0).memory
        assert contents(alone) == contents(fetch_on_all(memory, tokens, 3, False)[place.rank])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_the_reference_path_fetches_the_same_bytes(
    memory: RunMemory, layout: tuple[int, bool, tuple[int, int]], seed: int
) -> None:
    tokens = random_tokens(seed, 2, 12)
    for place in ranks(*layout):
        brought = layout_of(memory, place)
        native = memory.fetcher(brought).fetch(tokens, 3).memory
        reference = memory.reference_fetcher(brought).fetch(tokens, 3).memory
        assert contents(native) == contents(reference)
        assert native.header.tolist() == reference.header.tolist()


def test_an_exclusive_site_asks_for_nothing_at_a_hit_and_a_summing_one_everywhere(
    memory: RunMemory, tokens: torch.Tensor
) -> None:
    (part,) = fetch_on_all(memory, tokens, 1, False)
    hits_BS = part.order_BS(0) > 0
    assert torch.equal(part.reads_BSh(0) == 0, hits_BS.unsqueeze(-1).expand(*hits_BS.shape, 6))
    assert (part.reads_BSh(1) > 0).all()


def test_where_every_position_matches_an_exclusive_site_exchanges_nothing(bank: Bank) -> None:
    engram = small_tables()
    reading = SiteReading(layer_number=2, graft=graft_reading(bank), engram=engram_reading(engram), exclusive=True)
    memory = small_memory(reading, banks=[bank], engram=engram)
    key = next(key for key in bank.rows_of_keys() if len(key) == 2 and key[0] != key[1])
    tokens = torch.tensor([key])  # its first position is a miss, its second a hit
    first, second = fetch_on_all(memory, tokens, 2, True)
    assert first.exchange[0, 1].sum() > 0
    assert second.exchange[0, 1].sum() == 0 and not second.reads_BSh(0).any()


def test_rows_that_are_read_are_counted_and_distinct_ones_among_them(
    memory: RunMemory, tokens: torch.Tensor, parts: list[MicroBatchMemory]
) -> None:
    for part in parts:
        counts = memory.fetcher(part.layout).fetch(tokens, 0).counts
        rows = [part_of(wanted_rows(memory, number, tokens), part.layout.partition) for number in range(2)]
        assert counts.engram_requests == sum(np.count_nonzero(of_table >= 0) for of_table in rows)
        assert counts.engram_rows == sum(np.unique(of_table[of_table >= 0]).size for of_table in rows)


def test_a_table_needs_no_bank(tokens: torch.Tensor) -> None:
    engram = small_tables((3,))
    memory = small_memory(SiteReading(layer_number=3, engram=engram_reading(engram, 3)), engram=engram)
    (part,) = fetch_on_all(memory, tokens, 1, False)
    assert (part.layout.banks, part.layout.grafts) == ((), ())
    assert np.array_equal(Exchange([part], 0).read(0), oracle_rows(engram, 3, tokens))
