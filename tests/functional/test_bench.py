"""The lookup bench at a small, fixed size: that it runs, and that all it compares gives the same answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_graft.bank.keys import UNUSED, BankKeys, canonical_order
from megatron_graft.building.count import count_ngrams
from megatron_graft.ngram.oracle import brute_force_lookup

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools/bench/lookup.py"
PARTS = ["lookup", "vocabularies", "python", "python_gather", "gather", "open"]  # all that needs no network
MAX_ORDER, EOD, VOCAB_SIZE = 5, 0, 97


def run(*command: object) -> str:
    # -O1: compiling takes most of the time, and answers do not depend on it.
    environment = os.environ | {"CXXFLAGS": "-O1"}
    finished = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, f"{command}\n{finished.stdout[-3000:]}\n{finished.stderr[-3000:]}"
    return finished.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build directory of one small run of all parts."""
    directory = tmp_path_factory.mktemp("bench")
    run(sys.executable, TOOL, "--entries", "small", "--build-dir", directory, "--only", *PARTS)
    return directory


@pytest.fixture(scope="module")
def results(build: Path) -> dict[str, Any]:
    return json.loads((build / "lookup.json").read_text())


@pytest.fixture(scope="module")
def made_keys(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of a small vocabulary, with the text they were counted over."""
    directory = tmp_path_factory.mktemp("keys")
    made = run(
        build / "programs" / "make_keys", "--output", directory, "--tokens", 20_000, "--held-out-tokens", 8_000,
        "--vocab-size", VOCAB_SIZE, "--max-order", MAX_ORDER, "--min-count", 3, "--threads", 2,
        "--training-text", directory / "training.i32",
    )  # fmt: skip
    assert json.loads(made)["entries"] == (directory / "orders.u8").stat().st_size
    return directory


def counted_keys(text: np.ndarray, min_count: int) -> BankKeys:
    counts = count_ngrams([text], orders=range(2, MAX_ORDER + 1), eod=EOD, min_count=min_count)
    rows = []
    for level in counts:
        padded = np.full((len(level.counts), MAX_ORDER), UNUSED, dtype=np.int32)
        padded[:, MAX_ORDER - level.order :] = level.ids
        rows.append((padded, np.full(len(padded), level.order, dtype=np.uint8), level.counts))
    ids, orders, numbers = (np.concatenate(column) for column in zip(*rows, strict=True))
    keys = BankKeys(key_ids=ids, key_orders=orders, key_counts=numbers)
    order = canonical_order(keys)
    return BankKeys(key_ids=ids[order], key_orders=orders[order], key_counts=numbers[order])


def test_every_part_compared_answers_and_none_differed(results: dict[str, Any]) -> None:
    for part in ("lookup", "python", "gather"):
        assert results[part]["mismatches"] == 0, part
    assert [item["mismatches"] for item in results["vocabularies"]] == [0, 0, 0]
    assert [results["python_gather"][f"threads_{threads}"]["mismatches"] for threads in (1, 2)] == [0, 0]


def test_every_design_was_measured(results: dict[str, Any]) -> None:
    lookup = results["lookup"]
    assert {"auto", "portable", "ungrouped"} <= lookup["bodies"].keys()
    assert set(results["machine"]["instructions"]) & {"avx2"} <= lookup["bodies"].keys()
    assert "plain table of this bench" in lookup["tables"]
    assert lookup["pages"].keys() == {"huge", "small", "file"}
    rates = [*lookup["bodies"].values(), *lookup["tables"].values(), *lookup["pages"].values()]
    assert all(rate[f"{workload}_mpos_per_s"] > 0 for rate in rates for workload in ("text", "adversarial"))
    assert results["open"]["entries"] == lookup["build"]["entries"] > 90_000


def test_counts_and_canonical_order_are_those_of_a_bank(made_keys: Path) -> None:
    expected = counted_keys(np.fromfile(made_keys / "training.i32", dtype=np.int32), min_count=3)
    ids = np.fromfile(made_keys / "ids.i32", dtype=np.int32).reshape(-1, MAX_ORDER)
    assert len(ids) > 1000
    np.testing.assert_array_equal(ids, expected.key_ids)
    np.testing.assert_array_equal(np.fromfile(made_keys / "orders.u8", dtype=np.uint8), expected.key_orders)
    np.testing.assert_array_equal(np.fromfile(made_keys / "counts.u32", dtype=np.uint32), expected.key_counts)


def test_answers_are_those_of_the_definition(build: Path, made_keys: Path, tmp_path: Path) -> None:
    printed = run(
        build / "programs" / "bench_lookup", "--data", made_keys, "--index", tmp_path / "index.qbt", "--eod", EOD,
        "--max-order", MAX_ORDER, "--vocab-size", VOCAB_SIZE, "--positions", 8_000, "--measure", "size",
        "--answers", tmp_path,
    )  # fmt: skip
    ids = np.fromfile(made_keys / "ids.i32", dtype=np.int32).reshape(-1, MAX_ORDER)
    rows_of_keys = {tuple(key[key >= 0].tolist()): row for row, key in enumerate(ids)}
    for workload, described in json.loads(printed)["workloads"].items():
        tokens = np.fromfile(tmp_path / f"{workload}.tokens.i32", dtype=np.int32)
        rows, orders = brute_force_lookup(rows_of_keys, tokens[None], EOD, 2, MAX_ORDER)
        assert len(tokens) == 8_000 and 0.1 < (orders == 0).mean() < 0.9
        np.testing.assert_array_equal(np.fromfile(tmp_path / f"{workload}.rows.i64", dtype=np.int64), rows[0])
        np.testing.assert_array_equal(np.fromfile(tmp_path / f"{workload}.orders.u8", dtype=np.uint8), orders[0])
        probes = probes_by_definition(rows_of_keys, tokens)
        assert described["probes_per_position"] == pytest.approx(probes / len(tokens), rel=1e-4)


def probes_by_definition(rows_of_keys: dict[tuple[int, ...], int], tokens: np.ndarray) -> int:
    """One probe for every suffix asked for: up to the first unknown one, or one that no known key goes on from."""
    extended = {key[1:] for key in rows_of_keys}
    probes, words = 0, tokens.tolist()
    for end in range(len(words)):
        for order in range(2, MAX_ORDER + 1):
            suffix = tuple(words[max(0, end - order + 1) : end + 1])
            if len(suffix) < order or EOD in suffix:
                break
            probes += 1
            if suffix not in rows_of_keys or suffix not in extended:
                break
    return probes


def test_the_page_is_made_from_the_figures(build: Path, results: dict[str, Any]) -> None:
    page = run(sys.executable, TOOL, "--markdown", build / "lookup.json")
    (target,) = results["targets"]
    assert f"| {target['name']} | <= 0 | 0 | met |" in page
    assert results["machine"]["cpu"] in page


def test_flags_that_belong_together_are_refused_apart() -> None:
    command = [sys.executable, str(TOOL), "--data-prefix", "x"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 2
    assert "go together" in finished.stderr
