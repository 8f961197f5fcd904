import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.data.memory_fetcher import MemoryFetcher, SequenceSlice
from megatron_graft.lookup.index import open_index
from megatron_graft.ngram.oracle import brute_force_lookup
from megatron_graft.ngram.windows import positions_in_document
from tests.helpers.banks import EOD, make_bank

VOCAB = 12
ROW_DTYPES = ["bfloat16", "float16", "float32", "int8", "float8_e4m3"]


def write_bank(path: Path, row_dtype: str) -> Bank:
    generator = np.random.default_rng(5)
    counts = {tuple(map(int, generator.integers(1, VOCAB, order))): 10 for order in (2, 3, 4) for _ in range(60)}
    return make_bank(path / "bank", counts, vocab_size=VOCAB, layers=(3, 7), width=5, row_dtype=row_dtype)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return write_bank(tmp_path_factory.mktemp("fetcher"), "bfloat16")


def tokens_BS(seed: int, sequences: int = 3, positions: int = 16) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.integers(0, VOCAB, (sequences, positions)))


def expected_rows(bank: Bank, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 ``[B, S, R]`` rows as stored (zero at a miss) and orders, by the definition."""
    rows, orders = brute_force_lookup(bank.rows_of_keys(), tokens, EOD, bank.min_order, bank.max_order)
    gathered = np.empty((rows.size, bank.row_bytes), dtype=np.uint8)
    bank.gather(rows.ravel(), gathered)
    return gathered.reshape(*rows.shape, bank.row_bytes), orders


def rows_by_position(memory: object) -> np.ndarray:
    """uint8 ``[B, S, R]``: what the inverse finds among the rows."""
    return memory.rows_PR.numpy()[memory.inverse_BS.numpy()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize("seed", range(5))
def test_every_position_gets_the_row_of_its_longest_suffix(bank: Bank, seed: int, implementation: str) -> None:
    opened = open_bank(bank.path, gather=implementation)  # type: ignore[arg-type]
    fetcher = MemoryFetcher(opened, open_index(opened, implementation), SequenceSlice())  # type: ignore[arg-type]
    tokens = tokens_BS(seed)
    fetched = fetcher.fetch(tokens, 9)
    rows, orders = expected_rows(bank, tokens.numpy())
    assert orders.any(), "the test must meet hits"
    memory = fetched.memory
    assert np.array_equal(rows_by_position(memory), rows)
    assert np.array_equal(memory.order_BS.numpy(), orders)
    assert np.array_equal(memory.position_BS.numpy(), positions_in_document(tokens.numpy(), EOD))
    assert memory.sequence_number == 9
    assert fetched.order_counts.tolist() == np.bincount(orders.ravel(), minlength=bank.max_order + 1).tolist()


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
def test_rows_of_every_dtype_travel_as_stored_and_mean_what_the_bank_says(tmp_path: Path, row_dtype: str) -> None:
    bank = write_bank(tmp_path, row_dtype)
    tokens = tokens_BS(2)
    memory = MemoryFetcher(bank, open_index(bank), SequenceSlice()).fetch(tokens, 0).memory
    rows, orders = expected_rows(bank, tokens.numpy())
    assert np.array_equal(rows_by_position(memory), rows)
    values_BSD = bank.row_layout.values(rows.reshape(-1, bank.row_bytes)).reshape(*orders.shape, bank.row_dim)
    np.testing.assert_array_equal(memory.rows_SBD(torch.float32).transpose(0, 1).numpy(), values_BSD)


def test_a_bank_cut_to_its_first_rows_gives_those_only(bank: Bank) -> None:
    cut = open_bank(bank.path, rows=bank.num_rows // 3)
    tokens = tokens_BS(3)
    memory = MemoryFetcher(cut, open_index(cut), SequenceSlice()).fetch(tokens, 0).memory
    rows, orders = expected_rows(cut, tokens.numpy())
    assert not np.array_equal(orders, expected_rows(bank, tokens.numpy())[1]), "the cut must be felt"
    assert np.array_equal(memory.order_BS.numpy(), orders)
    assert np.array_equal(rows_by_position(memory), rows)


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
    joined = np.concatenate([rows_by_position(part) for part in slices], axis=1)
    assert np.array_equal(joined, rows_by_position(whole))
    for name in ("order_BS", "position_BS"):
        assert torch.equal(torch.cat([getattr(part, name) for part in slices], dim=1), getattr(whole, name))


@pytest.mark.parametrize("fill", [EOD, VOCAB - 1])
def test_all_misses_and_full_hits_are_handled(bank: Bank, fill: int) -> None:
    fetcher = MemoryFetcher(bank, open_index(bank), SequenceSlice())
    tokens = torch.full((2, 8), fill)
    rows, _ = expected_rows(bank, tokens.numpy())
    assert np.array_equal(rows_by_position(fetcher.fetch(tokens, 0).memory), rows)


def test_a_memory_is_not_touched_by_later_calls(bank: Bank) -> None:
    """The scratch is used again; what was handed out is not."""
    fetcher = MemoryFetcher(bank, open_index(bank), SequenceSlice())
    first = fetcher.fetch(tokens_BS(0), 0)
    used = first.memory.used_bytes()
    before, counts = first.memory.packed[:used].clone(), first.order_counts.copy()
    for seed, shape in ((1, (3, 16)), (2, (1, 5)), (3, (3, 16))):
        fetcher.fetch(tokens_BS(seed, *shape), seed)
    assert torch.equal(first.memory.packed[:used], before)
    assert np.array_equal(first.order_counts, counts)


def test_calls_of_one_shape_use_the_same_scratch_and_another_thread_its_own(bank: Bank) -> None:
    fetcher = MemoryFetcher(bank, open_index(bank), SequenceSlice())

    def addresses() -> set[int]:
        fetcher.fetch(tokens_BS(0), 0)
        return {buffer.ctypes.data for buffer in vars(fetcher._scratch).values() if isinstance(buffer, np.ndarray)}

    first = addresses()
    assert len(first) == 5 and addresses() == first
    elsewhere: list[set[int]] = []
    thread = threading.Thread(target=lambda: elsewhere.append(addresses()))
    thread.start()
    thread.join()
    assert elsewhere[0].isdisjoint(first)


def test_several_threads_at_once_get_what_each_asked_for(bank: Bank) -> None:
    fetcher = MemoryFetcher(bank, open_index(bank), SequenceSlice())
    batches = [tokens_BS(seed) for seed in range(4)]
    wanted = [expected_rows(bank, tokens.numpy())[0] for tokens in batches]
    wrong: list[int] = []

    def repeat(number: int) -> None:
        for _ in range(50):
            if not np.array_equal(rows_by_position(fetcher.fetch(batches[number], 0).memory), wanted[number]):
                wrong.append(number)

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
