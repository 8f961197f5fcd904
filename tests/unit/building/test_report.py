from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.building.coverage import (
    bank_sizes,
    coverage_by_rows,
    measure_coverage,
    sample_documents,
    write_coverage,
)
from megatron_graft.building.log_summary import read_build_log, summarise_stages
from megatron_graft.building.norms import PERCENTS, LayerNorms, norm_quantiles, row_norms, stored_norms
from megatron_graft.building.report import coverages_of, kept_report, report_bank, write_report
from megatron_graft.errors import ConfigError, DataError
from megatron_graft.lookup.index import open_index
from megatron_graft.ngram.oracle import brute_force_lookup
from tests.helpers.banks import EOD, make_bank, random_counts

LOG = [
    {"event": "task", "stage": "count-2-map", "task": 0, "seconds": 1.0, "cpu_seconds": 0.5, "facts": {"tokens": 5}},
    {"event": "task", "stage": "count-2-map", "task": 1, "seconds": 2.0, "cpu_seconds": 1.5, "facts": {"tokens": 7}},
    {"event": "stage", "stage": "count-2-map", "tasks": 2, "seconds": 2.5},
    {"event": "task", "stage": "pack", "task": 0, "seconds": 9.0, "cpu_seconds": 9.0, "facts": {"donor_tokens": 1}},
    {"event": "task", "stage": "pack", "task": 0, "seconds": 3.0, "cpu_seconds": 2.0,
     "facts": {"donor_tokens": 250, "kinds": {"2": 1}, "whole": True}},
    {"event": "stage", "stage": "count-2-map", "tasks": 2, "seconds": 0.5},
]  # fmt: skip


class Documents:
    """Random documents, some of them empty."""

    def __init__(self, number: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.documents = [generator.integers(0, 12, size=generator.integers(0, 60)) for _ in range(number)]
        self.num_documents, self.num_tokens = number, sum(map(len, self.documents))

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.documents)

    def chosen(self, wanted: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
        picked = wanted(np.arange(self.num_documents))
        return (document for document, taken in zip(self.documents, picked, strict=True) if taken)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return make_bank(tmp_path / "bank", random_counts(200, 3, vocab_size=12, max_order=3), vocab_size=12, width=8)


def test_a_sample_is_whole_documents_evenly_spread_and_always_the_same() -> None:
    documents = Documents(1000)
    sample = list(sample_documents(documents, documents.num_tokens // 4))
    places = [number for number, document in enumerate(documents) if any(document is taken for taken in sample)]
    assert len(places) == len(sample) == pytest.approx(250, abs=1)
    assert np.diff(places).max() <= 5
    assert [id(document) for document in sample] == [
        id(d) for d in sample_documents(documents, documents.num_tokens // 4)
    ]
    other = list(sample_documents(documents, documents.num_tokens // 4, phase=0.5))
    assert not {id(document) for document in sample} & {id(document) for document in other}


@pytest.mark.parametrize("most", [1 << 40, None])
def test_a_small_data_set_is_taken_whole(most: int | None) -> None:
    documents = Documents(30)
    assert len(list(sample_documents(documents, most or documents.num_tokens))) == 30


@pytest.mark.parametrize(
    ("rows", "sizes"), [(1, (1,)), (5, (1, 2, 5)), (4096, tuple(4096 >> k for k in range(10)[::-1]))]
)
def test_sizes_are_halvings_of_the_whole(rows: int, sizes: tuple[int, ...]) -> None:
    assert bank_sizes(rows) == sizes


def test_coverage_of_a_smaller_bank_is_that_of_its_most_frequent_keys(bank: Bank) -> None:
    documents = list(Documents(40))
    keys = list(bank.rows_of_keys().items())
    for rows, coverage in coverage_by_rows(bank.path, documents, (1, 20, 200)).items():
        known = {key: row for key, row in keys if row < rows}
        hits = np.zeros(4, dtype=np.int64)
        for document in documents:
            if len(document):
                _, orders = brute_force_lookup(known, document[None], EOD, bank.min_order, bank.max_order)
                hits += np.bincount(orders.reshape(-1), minlength=4)
        assert coverage.hits_by_order == {order: hits[order] for order in (1, 2, 3)}
    with pytest.raises(ConfigError):
        coverage_by_rows(bank.path, documents, (201,))


def test_norm_quantiles_are_those_of_each_group() -> None:
    generator = np.random.default_rng(0)
    norms, groups = generator.random(500, dtype=np.float32), generator.integers(2, 5, 500)
    found = norm_quantiles(norms, groups)
    assert list(found) == ["all", "2", "3", "4"]
    for name, part in [("all", norms), *((str(group), norms[groups == group]) for group in (2, 3, 4))]:
        assert found[name]["rows"] == len(part) and found[name]["not_finite"] == 0
        expected = np.quantile(part.astype(np.float64), np.array(PERCENTS) / 100)
        assert [found[name][str(percent)] for percent in PERCENTS] == pytest.approx(expected.tolist())


def test_rows_that_are_not_finite_are_counted_apart() -> None:
    found = norm_quantiles(np.array([1, np.nan, 3, np.inf], dtype=np.float32), np.array([2, 2, 3, 4]))
    assert found["all"]["not_finite"] == 2 and found["all"]["100"] == 3
    assert found["4"] == {"rows": 1, "not_finite": 1} | dict.fromkeys(map(str, PERCENTS))


def test_norms_of_stored_rows_are_by_layer_and_scaled(tmp_path: Path) -> None:
    counts = random_counts(100, 1)
    bank = make_bank(tmp_path / "bank", counts, layers=(3, 7), width=6, row_dtype="int8")
    found = stored_norms(bank)
    values = bank.float_rows(np.arange(100))
    assert list(found) == [3, 7]
    for layer, columns in ((3, slice(0, 6)), (7, slice(6, 12))):
        expected = np.linalg.norm(values[:, columns], axis=1)
        np.testing.assert_allclose(row_norms(values[:, columns]), expected, rtol=1e-6)
        assert found[layer].by_order == norm_quantiles(row_norms(values[:, columns]), bank.key_orders)
    assert stored_norms(bank, most_rows=10)[3].by_order["all"]["rows"] == 10


def test_a_log_is_summed_up_and_the_last_of_a_repeated_task_counts() -> None:
    stages = summarise_stages(LOG)
    assert list(stages) == ["count-2-map", "pack"]
    counted, packed = stages["count-2-map"], stages["pack"]
    assert (counted.tasks, counted.task_seconds, counted.cpu_seconds, counted.wall_seconds) == (2, 3.0, 2.0, 3.0)
    assert counted.facts == {"tokens": 12}
    assert (packed.tasks, packed.task_seconds, packed.wall_seconds, packed.facts) == (
        1,
        3.0,
        None,
        {"donor_tokens": 250},
    )


def test_a_log_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "bank.build.jsonl"
    with pytest.raises(DataError, match="is no log of a build"):
        read_build_log(path)
    path.write_text("".join(json.dumps(record) + "\n" for record in LOG) + '{"event": "ta')
    assert read_build_log(path) == LOG


def test_a_report_holds_what_is_asked_of_a_bank(bank: Bank) -> None:
    documents = Documents(80)
    raw = LayerNorms(by_order=norm_quantiles(np.arange(200, dtype=np.float32), bank.key_orders), by_donor_length=None)
    report = report_bank(
        bank.path, {"train": documents}, log_records=LOG, raw_norms={12: raw}, most_positions=500,
        text_of=lambda ids: None if ids == [1] else f"text of {ids}",
    )  # fmt: skip
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    whole = report["coverage"]["train"]
    sample = list(sample_documents(documents, 500))
    expected = measure_coverage(open_index(bank), sample, orders=bank.orders, eod=bank.eod)
    assert whole["positions"] == sum(map(len, sample)) == expected.positions
    assert (whole["rows"], whole["documents"], whole["of_documents"]) == (200, len(sample), 80)
    assert coverages_of(report)["train"] == expected
    assert [point["rows"] for point in report["coverage_by_rows"]["train"]] == list(bank_sizes(200))
    assert report["norms"]["raw"]["12"]["by_order"]["all"]["100"] == 199
    assert report["donor_tokens"] == {"tokens": 250, "per_row": 1.25}
    assert report["stages"]["pack"]["task_seconds"] == 3
    assert sum(report["bytes"].values()) == sum(file.stat().st_size for file in bank.path.iterdir())


def test_keys_are_shown_with_text_order_and_count(bank: Bank) -> None:
    keys = report_bank(bank.path, {}, text_of=str, seed=4)["keys"]
    assert [key["row"] for key in keys["most_frequent"]] == list(range(20))
    rows = [key["row"] for key in keys["random"]]
    assert len(set(rows)) == 20 and max(rows) > 20
    assert rows == [key["row"] for key in report_bank(bank.path, {}, seed=4)["keys"]["random"]]
    assert rows != [key["row"] for key in report_bank(bank.path, {}, seed=5)["keys"]["random"]]
    for key in (*keys["most_frequent"], *keys["random"]):
        row = key["row"]
        ids = tuple(bank.key_ids[row][bank.key_ids[row] >= 0].tolist())
        assert key == {
            "row": row, "text": str(list(ids)), "ids": list(ids), "order": len(ids), "count": bank.key_counts[row]
        }  # fmt: skip


def test_a_later_report_keeps_what_only_the_build_knew(bank: Bank) -> None:
    raw = LayerNorms(by_order=norm_quantiles(np.ones(200, dtype=np.float32), bank.key_orders))
    first = report_bank(bank.path, {"train": Documents(20)}, log_records=LOG, raw_norms={12: raw})
    path = write_report(bank.path, first)
    assert path == bank.path.with_name("bank.report.json")
    assert kept_report(bank.path, "of another bank") is None
    second = report_bank(bank.path, {"foreign": Documents(5, seed=1)}, earlier=kept_report(bank.path, bank.digest))
    assert set(second["coverage"]) == {"train", "foreign"}
    assert {name: second[name] for name in ("stages", "donor_tokens")} == {
        name: first[name] for name in ("stages", "donor_tokens")
    }
    assert second["norms"]["raw"] == first["norms"]["raw"]
    path.write_text("[")
    assert kept_report(bank.path, bank.digest) is None


def test_coverage_is_written_for_the_readers_of_coverage_files(bank: Bank, tmp_path: Path) -> None:
    report: dict[str, Any] = report_bank(bank.path, {"train": Documents(20)})
    write_coverage(open_bank(bank.path), coverages_of(report))
    stored = json.loads((tmp_path / "bank.coverage.json").read_text())
    assert stored["bank"] == bank.digest
    assert stored["data_sets"]["train"]["hit_rate"] == pytest.approx(report["coverage"]["train"]["hit_rate"])
