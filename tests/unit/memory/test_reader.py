"""Keys and values of both memories, and the gradient of a table, from what the look-ahead fetched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_graft.bank.reader import Bank
from megatron_graft.data.memory_layout import MemoryLayout, SiteReading
from megatron_graft.data.microbatch import MicroBatchMemory
from megatron_graft.memory.reader import EngramReader, GraftReader
from megatron_graft.ngram.oracle import brute_force_lookup
from megatron_graft.training.memory_setup import RunEngram
from tests.helpers.banks import EOD
from tests.helpers.memories import (
    HIDDEN,
    engram_reading,
    graft_reading,
    model_config,
    oracle_rows,
    random_tokens,
    randomise,
    ranks,
    small_bank,
    small_memory,
    small_site,
    small_tables,
)

COLUMNS = (3, 9)


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def bank(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return small_bank(tmp_path_factory.mktemp("reader") / "bank", row_dtype=request.param)


@pytest.fixture(scope="module")
def engram() -> RunEngram:
    return small_tables()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return random_tokens(8, 2, 18)


@pytest.fixture(scope="module")
def found(bank: Bank, tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows and orders, int64 and uint8 ``[B, S]``, by the definition."""
    rows, orders = brute_force_lookup(bank.rows_of_keys(), tokens.numpy(), EOD, bank.min_order, bank.max_order)
    assert 0 < (orders > 0).sum() < orders.size
    return rows, orders


class Reads:
    """A site of random weights, float64, and one micro-batch for it on one rank."""

    def __init__(self, bank: Bank, engram: RunEngram, tokens: torch.Tensor, place: Any, *, exclusive: bool) -> None:
        reading = SiteReading(
            layer_number=2, graft=graft_reading(bank, 0, COLUMNS), engram=engram_reading(engram), exclusive=exclusive
        )
        model = model_config(params_dtype=torch.float64, sequence_parallel=place.sequence_parallel)
        self.site = small_site(reading, place, model=model)
        randomise(self.site)
        memory = small_memory(reading, banks=[bank], engram=engram)
        layout = MemoryLayout.of([reading], place)
        self.memory: MicroBatchMemory = memory.fetcher(layout).fetch(tokens, 0).memory

    @property
    def graft(self) -> GraftReader:
        return self.site.graft

    @property
    def engram(self) -> EngramReader:
        return self.site.engram


@pytest.fixture(params=[True, False], ids=["exclusive", "sum"])
def reads(request: pytest.FixtureRequest, bank: Bank, engram: RunEngram, tokens: torch.Tensor) -> Reads:
    return Reads(bank, engram, tokens, ranks(1, False)[0], exclusive=request.param)


@pytest.fixture
def table_rows_SBK(
    reads: Reads, engram: RunEngram, tokens: torch.Tensor, found: tuple[np.ndarray, np.ndarray]
) -> torch.Tensor:
    """int64 ``[S, B, K]``: rows of the table that are read, by the oracle; -1 where nothing is."""
    rows = oracle_rows(engram, 2, tokens)
    if reads.site.site.reading.exclusive:
        rows[found[1] > 0] = -1
    return torch.from_numpy(rows).transpose(0, 1)


def bank_values(bank: Bank, found: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
    """float64 ``[S, B, D]`` of the site's columns, zero at a miss."""
    rows_BS = found[0]
    values = bank.float_rows(rows_BS.ravel())[:, slice(*COLUMNS)].reshape(*rows_BS.shape, -1)
    return torch.from_numpy(values).double().transpose(0, 1)


def test_a_banks_keys_and_values_are_projections_of_its_rows(
    reads: Reads, bank: Bank, found: tuple[np.ndarray, np.ndarray]
) -> None:
    keys, values = reads.graft(reads.memory, 0)
    rows = bank_values(bank, found)
    assert keys.shape == (18, 2, HIDDEN)
    assert torch.allclose(keys, rows @ reads.graft.key_weight.T, rtol=1e-12)
    assert torch.allclose(values, rows @ reads.graft.value_weight.T, rtol=1e-12)
    misses = torch.from_numpy(found[1]).t() == 0
    assert not keys[misses].any() and not values[misses].any()
    assert torch.equal(reads.graft.active_SB(reads.memory, 0), ~misses)


def test_a_tables_keys_and_values_are_projections_of_all_heads_rows_side_by_side(
    reads: Reads, table_rows_SBK: torch.Tensor
) -> None:
    keys, values = reads.engram(reads.memory, 0)
    for s, b in np.ndindex(18, 2):
        read = [reads.engram.table[row] if row >= 0 else torch.zeros(2).double() for row in table_rows_SBK[s, b]]
        assert torch.allclose(keys[s, b], reads.engram.key_weight @ torch.cat(read), rtol=1e-12, atol=1e-14)
        assert torch.allclose(values[s, b], reads.engram.value_weight @ torch.cat(read), rtol=1e-12, atol=1e-14)
    nothing = table_rows_SBK[..., 0] < 0
    assert not keys[nothing].any() and not values[nothing].any()
    assert torch.equal(reads.engram.active_SB(reads.memory, 0), ~nothing)


def table_gradient_by_hand(reads: Reads, table_rows_SBK: torch.Tensor, of_keys: torch.Tensor) -> torch.Tensor:
    """Position by position and head by head: what the keys' gradient makes of each row that was read."""
    gradient = torch.zeros_like(reads.engram.table)
    for s, b, head in np.ndindex(*table_rows_SBK.shape):
        row = int(table_rows_SBK[s, b, head])
        if row >= 0:
            gradient[row] += of_keys[s, b] @ reads.engram.key_weight[:, 2 * head : 2 * head + 2]
    return gradient


def test_a_tables_gradient_is_a_scatter_to_the_rows_that_were_read(reads: Reads, table_rows_SBK: torch.Tensor) -> None:
    keys, _ = reads.engram(reads.memory, 0)
    of_keys = torch.randn(keys.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    keys.backward(of_keys)
    gradient = reads.engram.table.grad
    assert gradient is not None
    with torch.no_grad():
        assert torch.allclose(gradient, table_gradient_by_hand(reads, table_rows_SBK, of_keys), rtol=1e-12)
    read = torch.zeros(len(gradient), dtype=torch.bool)
    read[table_rows_SBK[table_rows_SBK >= 0]] = True
    assert 0 < read.sum() < len(read), "the test must leave rows unread"
    assert gradient[read].any(dim=1).all()
    assert not gradient[~read].any()


def test_an_exclusive_site_reads_no_row_at_a_hit_and_a_summing_one_does(
    reads: Reads, found: tuple[np.ndarray, np.ndarray]
) -> None:
    """Shown by the gradient: of the keys at hits alone."""
    hits = torch.from_numpy(found[1]).t() > 0
    keys, _ = reads.engram(reads.memory, 0)
    keys[hits].sum().backward()
    gradient = reads.engram.table.grad
    assert gradient is not None
    assert bool(gradient.any()) != reads.site.site.reading.exclusive
    assert bool(keys[hits].any()) != reads.site.site.reading.exclusive


def test_rows_that_nobody_asked_for_are_not_touched(reads: Reads) -> None:
    """What lies behind the requests in use is unspecified: here it would be a row out of bounds."""
    expected, _ = reads.engram(reads.memory, 0)
    reads.memory.requests(0)[reads.memory.used("requests.0") :] = 1_000_000
    assert torch.equal(reads.engram(reads.memory, 0)[0], expected)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_column_slices_of_all_ranks_add_up_to_the_banks_keys_and_values(
    bank: Bank, engram: RunEngram, tokens: torch.Tensor, size: int
) -> None:
    whole = Reads(bank, engram, tokens, ranks(1, False)[0], exclusive=True)
    keys = values = torch.zeros(18, 2, HIDDEN, dtype=torch.float64)
    for place in ranks(size, False):
        part = Reads(bank, engram, tokens, place, exclusive=True)
        with torch.no_grad():
            for name in ("key_weight", "value_weight"):
                getattr(part.graft, name).copy_(getattr(whole.graft, name)[:, slice(*place.columns(6))])
        part_keys, part_values = part.graft(part.memory, 0)
        keys, values = keys + part_keys, values + part_values
    for summed, expected in zip((keys, values), whole.graft(whole.memory, 0), strict=True):
        assert torch.allclose(summed, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_slices_of_the_sequence_are_the_banks_keys_and_values_one_after_the_other(
    bank: Bank, engram: RunEngram, tokens: torch.Tensor, size: int
) -> None:
    whole = Reads(bank, engram, tokens, ranks(1, False)[0], exclusive=True)
    parts = [Reads(bank, engram, tokens, place, exclusive=True) for place in ranks(size, True)]
    joined = torch.cat([part.graft(part.memory, 0)[0] for part in parts])
    assert torch.allclose(joined, whole.graft(whole.memory, 0)[0], rtol=1e-12)
