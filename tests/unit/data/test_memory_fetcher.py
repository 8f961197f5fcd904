from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_graft.bank.reader import Bank
from megatron_graft.data.memory_fetcher import MemoryFetcher, SequenceSlice
from megatron_graft.lookup.index import open_index
from megatron_graft.ngram.oracle import brute_force_lookup
from megatron_graft.ngram.windows import positions_in_document
from tests.helpers.banks import EOD, make_bank

VOCAB = 12


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    generator = np.random.default_rng(5)
    counts = {tuple(map(int, generator.integers(1, VOCAB, order))): 10 for order in (2, 3, 4) for _ in range(60)}
    path: Path = tmp_path_factory.mktemp("fetcher") / "bank"
    return make_bank(path, counts, vocab_size=VOCAB, layers=(3, 7), width=4)


def tokens_BS(seed: int, sequences: int = 3, positions: int = 16) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.integers(0, VOCAB, (sequences, positions)))


def expected_rows(bank: Bank, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint16 ``[B, S, D]`` rows (zero at a miss) and orders, by the definition."""
    rows, orders = brute_force_lookup(bank.rows_of_keys(), tokens, EOD, bank.min_order, bank.max_order)
    gathered = np.empty((rows.size, bank.row_dim), dtype=np.uint16)
    bank.gather(rows.ravel(), gathered)
    return gathered.reshape(*rows.shape, bank.row_dim), orders


@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize("seed", range(5))
def test_every_position_gets_the_row_of_its_longest_suffix(bank: Bank, seed: int, implementation: str) -> None:
    fetcher = MemoryFetcher(bank, open_index(bank, implementation), SequenceSlice())
    tokens = tokens_BS(seed)
    fetched = fetcher.fetch(tokens, 9)
    rows, orders = expected_rows(bank, tokens.numpy())
    assert orders.any(), "the test must meet hits"
    memory = fetched.memory
    assert np.array_equal(memory.row_bits()[memory.inverse_BS.numpy()], rows)
    assert np.array_equal(memory.order_BS.numpy(), orders)
    assert np.array_equal(memory.position_BS.numpy(), positions_in_document(tokens.numpy(), EOD))
    assert memory.sequence_number == 9
    assert fetched.order_counts.tolist() == np.bincount(orders.ravel(), minlength=bank.max_order + 1).tolist()


def test_each_row_is_gathered_once(bank: Bank) -> None:
    fetcher = MemoryFetcher(bank, open_index(bank), SequenceSlice())
    fetched = fetcher.fetch(tokens_BS(0).repeat(4, 1), 0)
    inverse = fetched.memory.inverse_BS.numpy()
    assert fetched.unique_rows == np.unique(inverse[inverse > 0]).size
    assert fetched.memory.header[5] == 1 + fetched.unique_rows
    assert inverse.max() == fetched.unique_rows


@pytest.mark.parametrize("parts", [2, 4])
def test_slices_put_together_are_the_whole_sequence(bank: Bank, parts: int) -> None:
    index, tokens = open_index(bank), tokens_BS(1)
    whole = MemoryFetcher(bank, index, SequenceSlice()).fetch(tokens, 0).memory
    slices = [
        MemoryFetcher(bank, index, SequenceSlice(part=part, parts=parts)).fetch(tokens, 0).memory
        for part in range(parts)
    ]
    joined = np.concatenate([part.row_bits()[part.inverse_BS.numpy()] for part in slices], axis=1)
    assert np.array_equal(joined, whole.row_bits()[whole.inverse_BS.numpy()])
    for name in ("order_BS", "position_BS"):
        assert torch.equal(torch.cat([getattr(part, name) for part in slices], dim=1), getattr(whole, name))


@pytest.mark.parametrize("fill", [EOD, VOCAB - 1])
def test_all_misses_and_full_hits_are_handled(bank: Bank, fill: int) -> None:
    fetcher = MemoryFetcher(bank, open_index(bank), SequenceSlice())
    tokens = torch.full((2, 8), fill)
    rows, _ = expected_rows(bank, tokens.numpy())
    memory = fetcher.fetch(tokens, 0).memory
    assert np.array_equal(memory.row_bits()[memory.inverse_BS.numpy()], rows)
