from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_graft.building.documents import MegatronDocuments, training_share
from megatron_graft.errors import DataError
from tests.helpers.building import write_data_set


def training_entries_of_megatron(prefix: str, split: str, cache: Path) -> list[int]:
    """The entries that Megatron's own builder trains on."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=4, blend=([prefix], None), split=split, path_to_cache=str(cache),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        tokenizer=SimpleNamespace(eod=0, pad=0, vocab_size=10, unique_identifiers={"class": "test"}),
    )  # fmt: skip
    train, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [4, None, None], lambda: True, config).build()
    return train.indices.tolist()


@pytest.mark.parametrize("split", ["969,30,1", "1", "90,5,5", "1,1,1", "0.5,0.5", "3,1"])
@pytest.mark.parametrize("num_documents", [17, 50])
def test_the_training_share_is_megatrons(tmp_path: Path, split: str, num_documents: int) -> None:
    prefix = write_data_set(tmp_path / "data", [[entry % 7 + 1] * (entry % 3 + 4) for entry in range(num_documents)])
    documents = MegatronDocuments([prefix], split=split, vocab_size=10)
    expected = training_entries_of_megatron(prefix, split, tmp_path / "cache")
    assert list(range(documents.num_documents)) == expected
    assert len(list(documents)) == len(expected)


def test_all_data_sets_are_read_entry_by_entry_and_as_often_as_asked(tmp_path: Path) -> None:
    first = write_data_set(tmp_path / "first", [[1, 2, 3], [4]])
    second = write_data_set(tmp_path / "second", [[5, 6]], dtype=np.int32)
    documents = MegatronDocuments([first, second], split=None, vocab_size=7)
    for _ in range(2):
        assert [tokens.tolist() for tokens in documents] == [[1, 2, 3], [4], [5, 6]]
    assert (documents.num_documents, documents.num_tokens) == (3, 6)


def test_the_fingerprint_tells_data_sets_apart(tmp_path: Path) -> None:
    prefixes = [write_data_set(tmp_path / name, lists) for name, lists in (("a", [[1, 2], [3]]), ("b", [[1], [2, 3]]))]
    first, second = (MegatronDocuments([prefix], split=None, vocab_size=7).fingerprint() for prefix in prefixes)
    assert first != second


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    prefix = write_data_set(tmp_path / "data", [[1, 2]])
    Path(prefix + suffix).unlink()
    with pytest.raises(DataError, match=rf"data\{suffix}: does not exist"):
        MegatronDocuments([prefix], split=None, vocab_size=7)


def test_a_prefix_without_the_ending_that_preprocessing_adds_is_told_of_it(tmp_path: Path) -> None:
    write_data_set(tmp_path / "data_text_document", [[1, 2]])
    with pytest.raises(DataError, match=r"data\.idx: does not exist\. Did you mean \S*/data_text_document\?"):
        MegatronDocuments([str(tmp_path / "data")], split=None, vocab_size=7)


def test_a_truncated_data_file_is_refused(tmp_path: Path) -> None:
    prefix = write_data_set(tmp_path / "data", [[1, 2, 3, 4]])
    Path(f"{prefix}.bin").write_bytes(Path(f"{prefix}.bin").read_bytes()[:-2])
    with pytest.raises(DataError, match="got 6 bytes; expected 8 bytes"):
        MegatronDocuments([prefix], split=None, vocab_size=7)


@pytest.mark.parametrize("content", [b"", b"MMIDIDX\0\0", b"something else entirely, and long enough to be read"])
def test_a_file_that_is_no_index_is_refused(tmp_path: Path, content: bytes) -> None:
    prefix = write_data_set(tmp_path / "data", [[1, 2, 3, 4]])
    Path(f"{prefix}.idx").write_bytes(content)
    with pytest.raises(DataError, match=r"data\.idx"):
        MegatronDocuments([prefix], split=None, vocab_size=7)


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    prefix = write_data_set(tmp_path / "data", [])
    with pytest.raises(DataError, match="empty"):
        MegatronDocuments([prefix], split=None, vocab_size=7)


def test_no_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="--data-prefix"):
        MegatronDocuments([], split=None, vocab_size=7)


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    prefix = write_data_set(tmp_path / "data", [[1, 2], [3, 7]])
    with pytest.raises(DataError, match="entry 1 .got 7; expected 0 to 6"):
        list(MegatronDocuments([prefix], split=None, vocab_size=7))


def test_a_split_that_leaves_no_training_entry_is_refused(tmp_path: Path) -> None:
    prefix = write_data_set(tmp_path / "data", [[1, 2], [3, 4]])
    with pytest.raises(DataError, match="no training tokens"):
        MegatronDocuments([prefix], split="1,99,0", vocab_size=7)


@pytest.mark.parametrize("split", ["", "a,b", "-1,2", "0,1", "1,2,3,4", "1..2", "nan", "."])
def test_a_malformed_split_is_refused(split: str) -> None:
    with pytest.raises(DataError, match="--split"):
        training_share(split)


def test_megatrons_own_reader_finds_the_same_documents(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    generator = np.random.default_rng(4)
    lists = [generator.integers(0, 7, size=size).tolist() for size in generator.integers(0, 2000, size=3000)]
    prefix = write_data_set(tmp_path / "data", lists)
    theirs = IndexedDataset(prefix, mmap=True)
    ours = list(MegatronDocuments([prefix], split=None, vocab_size=7))  # more than one read of ids
    assert len(ours) == len(theirs.sequence_lengths)
    assert all(np.array_equal(document, theirs.get(entry)) for entry, document in enumerate(ours))


@pytest.mark.parametrize(("field", "value"), [("length", 3), ("length", -1), ("offset", 6), ("offset", -2)])
def test_entries_that_do_not_lie_end_to_end_are_refused(tmp_path: Path, field: str, value: int) -> None:
    prefix = write_data_set(tmp_path / "data", [[1, 2], [3, 4], [5]])
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    place = 34 + 4 if field == "length" else 34 + 3 * 4 + 8
    size = 4 if field == "length" else 8
    index[place : place + size] = value.to_bytes(size, "little", signed=True)
    Path(f"{prefix}.idx").write_bytes(index)
    with pytest.raises(DataError, match="end to end: entry [12]"):
        MegatronDocuments([prefix], split=None, vocab_size=7)


def test_ids_of_another_type_are_refused(tmp_path: Path) -> None:
    prefix = write_data_set(tmp_path / "data", [[1, 2]], dtype=np.int64)
    with pytest.raises(DataError, match="dtype code 5; expected 4"):
        MegatronDocuments([prefix], split=None, vocab_size=7)


def test_file_states_tell_when_a_file_was_replaced(tmp_path: Path) -> None:
    prefix = write_data_set(tmp_path / "data", [[1, 2]])
    documents = MegatronDocuments([prefix], split=None, vocab_size=7)
    before = documents.file_states()
    assert sorted(before) == [f"{prefix}.bin", f"{prefix}.idx"]
    assert before[f"{prefix}.bin"]["size"] == 4
    assert documents.file_states() == before
    os.utime(f"{prefix}.bin", ns=(1, 1))
    after = documents.file_states()
    assert after[f"{prefix}.bin"] == {"size": 4, "mtime_ns": 1} and after[f"{prefix}.idx"] == before[f"{prefix}.idx"]


def test_the_entry_of_a_token_is_found(tmp_path: Path) -> None:
    prefix = write_data_set(tmp_path / "data", [[1, 2], [], [3], [4, 5, 6]])
    (data,) = MegatronDocuments([prefix], split=None, vocab_size=7).data_sets
    assert [data.entry_at(token) for token in range(6)] == [0, 0, 2, 3, 3, 3]
    with pytest.raises(DataError, match="fewer tokens"):
        data.entry_at(6)
