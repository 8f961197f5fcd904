from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from megatron_graft.bank.reader import open_bank
from megatron_graft.building import coverage
from megatron_graft.building.coverage import (
    Coverage,
    measure_coverage,
    sample_documents,
    write_coverage,
)
from megatron_graft.building.documents import MegatronDocuments
from megatron_graft.errors import DataError
from megatron_graft.lookup.index import open_index
from megatron_graft.ngram.oracle import brute_force_lookup
from tests.helpers.banks import EOD, make_bank
from tests.helpers.building import write_data_set

KEYS = {
    (1, 2): 9,
    (2, 3): 8,
    (1, 2, 3): 7,
    (3, 3): 5,
    (2, 3, 1, 2): 2,
    (3, 3, 2, 1): 2,
    (1, 1, 1, 1): 2,
    (2, 2, 1, 3): 1,
}


@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize("chunk_tokens", [1, 50, 1 << 20])
def test_coverage_equals_the_oracle_document_by_document(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    implementation: Literal["native", "reference"],
    chunk_tokens: int,
) -> None:
    monkeypatch.setattr(coverage, "_CHUNK_TOKENS", chunk_tokens)
    bank = make_bank(tmp_path / "bank", KEYS)
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 4, size=size).astype(np.uint16) for size in (40, 0, 1, 3, 90, 17)]
    expected = np.zeros(5, dtype=np.int64)
    for document in documents:
        _, orders_BS = brute_force_lookup(bank.rows_of_keys(), document[None].astype(np.int64), EOD, 2, 4)
        expected += np.bincount(orders_BS.reshape(-1), minlength=5)
    found = measure_coverage(open_index(bank, implementation), documents, orders=bank.orders, eod=bank.eod)
    assert found.positions == 151
    assert found.hits_by_order == {order: int(expected[order]) for order in (2, 3, 4)}
    assert all(found.hits_by_order.values())


def test_coverage_lies_beside_the_bank_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", KEYS)
    write_coverage(bank, {"train": Coverage(positions=4, hits_by_order={2: 1})})
    value = json.loads((tmp_path / "bank.coverage.json").read_text())
    assert value["bank"] == bank.digest
    assert value["data_sets"]["train"] == {"positions": 4, "hit_rate": 0.25, "share_by_order": {"2": 0.25}}
    assert open_bank(bank.path, verify="full").digest == bank.digest


def test_a_sample_of_data_sets_is_read_as_they_are_iterated(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    sizes = ([3, 0, 5, 8], [1, 9, 4])
    lists = [[generator.integers(0, 90, size).tolist() for size in part] for part in sizes]
    prefixes = [write_data_set(tmp_path / f"set{number}", part) for number, part in enumerate(lists)]
    documents = MegatronDocuments(prefixes, split=None, vocab_size=90)
    everything = [document.tolist() for document in documents]
    assert [document.tolist() for document in sample_documents(documents, 1 << 30)] == everything
    for picked in ([0, 3, 4, 6], [5], []):
        chosen = documents.chosen(lambda numbers, picked=picked: np.isin(numbers, picked))
        assert [document.tolist() for document in chosen] == [everything[number] for number in picked]
    narrow = MegatronDocuments(prefixes, split=None, vocab_size=2)
    with pytest.raises(DataError, match="outside the vocabulary, in entry 1"):
        list(narrow.chosen(lambda numbers: numbers == 5))
