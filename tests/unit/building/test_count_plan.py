from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_graft.building.count_plan import MIN_MEMORY_BYTES, UNITS_OF_COUNT, CountPlan
from megatron_graft.building.documents import MegatronDocuments
from megatron_graft.errors import ConfigError, DataError
from tests.helpers.count_oracle import open_sets, plan_of

SETS = [[[1, 2, 3], [4], [], [5, 6, 1, 2]], [[1] * 40], [[2, 3], [3, 4]]]


@pytest.mark.parametrize("num_slices", [1, 2, 3, 5, 8, 30, 500])
def test_slices_hold_every_entry_once_and_in_order(tmp_path: Path, num_slices: int) -> None:
    documents = open_sets(tmp_path, SETS, 7)
    plan = plan_of(documents, orders=(2,), num_slices=num_slices)
    assert len(plan.slices) == num_slices
    found: list[tuple[int, np.ndarray]] = []
    for piece in (piece for pieces in plan.slices for piece in pieces):
        data = documents.data_sets[piece.data_set]
        lengths = np.concatenate(list(data.lengths(piece.first_entry, piece.first_entry + piece.num_entries)))
        assert lengths.sum() == piece.num_tokens > 0
        before = np.concatenate([[0], *data.lengths(0, piece.first_entry)]).sum()
        assert before == piece.first_token
        found += [(piece.data_set, length) for length in lengths.tolist() if length]
    assert found == [(n, len(document)) for n, documents in enumerate(SETS) for document in documents if document]


def test_slices_have_about_equally_many_bytes(tmp_path: Path) -> None:
    sets = [[[1] * 7 for _ in range(500)], [[2] * 5 for _ in range(700)]]
    documents = open_sets(tmp_path, sets, 7)  # 2 and 4 bytes an id
    plan = plan_of(documents, orders=(2,), num_slices=6)
    sizes = [sum(p.num_tokens * plan.data_sets[p.data_set].id_bytes for p in pieces) for pieces in plan.slices]
    assert sum(sizes) == 500 * 14 + 700 * 20
    assert max(sizes) - min(sizes) <= 2 * 20


def test_only_the_training_share_is_cut(tmp_path: Path) -> None:
    documents = open_sets(tmp_path, [[[1, 2]] * 10], 7)
    documents = MegatronDocuments(documents.prefixes, split="70,30,0", vocab_size=7)
    plan = plan_of(documents, orders=(2,), num_slices=3)
    assert sum(piece.num_entries for pieces in plan.slices for piece in pieces) == 7


def test_a_plan_survives_json(tmp_path: Path) -> None:
    plan = plan_of(open_sets(tmp_path, SETS, 7), orders=(2, 3), eod=0, weights=[1, 2, 3], count_by="documents")
    assert CountPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_paths_do_not_depend_on_where_a_worker_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_sets(tmp_path, [[[1, 2]]], 7)
    monkeypatch.chdir(tmp_path)
    plan = plan_of(MegatronDocuments(["set0"], split=None, vocab_size=7), orders=(2,))
    assert plan.data_sets[0].prefix == str(tmp_path / "set0")


def test_weights_become_units_of_an_occurrence(tmp_path: Path) -> None:
    documents = open_sets(tmp_path, [[[1] * 100], [[1] * 300]], 7)
    plan = plan_of(documents, orders=(2,), weights=[3.0, 1.0])
    # Three quarters of 400 tokens are to come from 100, one quarter from 300.
    assert [data.units for data in plan.data_sets] == [3 * UNITS_OF_COUNT, round(UNITS_OF_COUNT / 3)]
    assert plan.units_of_count == UNITS_OF_COUNT and plan.split_runs
    with pytest.raises(ConfigError, match="--data-prefix: has a weight too small to count with .got 1e-09"):
        plan_of(documents, orders=(2,), weights=[1.0, 1e-9])
    plain = plan_of(documents, orders=(2,))
    assert [data.units for data in plain.data_sets] == [1, 1] and plain.units_of_count == 1 and not plain.split_runs


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_unusable_weights_are_refused(tmp_path: Path, weights: list[float]) -> None:
    documents = open_sets(tmp_path, [[[1]], [[2]]], 7)
    with pytest.raises(ConfigError, match="--data-prefix.*expected 2 numbers"):
        plan_of(documents, orders=(2,), weights=weights)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"min_count": 0}, "--min-count"),
        ({"count_by": "words"}, "--count-by"),
        ({"memory_bytes": MIN_MEMORY_BYTES - 1}, "--memory-gb"),
        ({"num_slices": 0}, "--count-slices"),
        ({"num_partitions": 5000}, "--count-partitions"),
        ({"orders": (3, 5)}, "--orders"),
    ],
)
def test_unusable_settings_are_refused(tmp_path: Path, options: dict[str, Any], flag: str) -> None:
    documents = open_sets(tmp_path, [[[1]]], 7)
    with pytest.raises(ConfigError, match=flag):
        plan_of(documents, **{"orders": (2,)} | options)


def test_a_vocabulary_beyond_20_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"got 1048577; expected at most 1048576"):
        plan_of(open_sets(tmp_path, [[[1]]], (1 << 20) + 1), orders=(2,))


def test_a_document_too_long_for_the_memory_is_refused_by_documents_only(tmp_path: Path) -> None:
    documents = open_sets(tmp_path, [[[1, 2]]], 7)
    documents.longest = 2_000_000
    with pytest.raises(ConfigError, match="--memory-gb.*got a document of 2,000,000 tokens"):
        plan_of(documents, orders=(2,), count_by="documents")
    assert plan_of(documents, orders=(2,)).longest_document == 0
    assert plan_of(documents, orders=(2,), count_by="documents", memory_bytes=1 << 30).longest_document == 2_000_000


def test_more_tokens_and_workers_mean_more_tasks(tmp_path: Path) -> None:
    documents = open_sets(tmp_path, [[[1, 2]] * 100], 7)
    assert (len(plan_of(documents, orders=(2,), workers=8).slices)) == 1
    documents.num_tokens = 45_000_000
    assert [plan_of(documents, orders=(2,), workers=n).num_partitions for n in (1, 2, 8)] == [1, 2, 8]
    assert [len(plan_of(documents, orders=(2,), workers=n).slices) for n in (1, 2, 8)] == [1, 2, 8]
    documents.num_tokens = 10**12
    plan = plan_of(documents, orders=(2,), workers=16)
    assert len(plan.slices) % 16 == 0 and 256 <= len(plan.slices) <= 1024
    assert 256 <= plan.num_partitions <= 1024
