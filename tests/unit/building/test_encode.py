from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_graft.building.donor import HuggingFaceDonor
from megatron_graft.building.encode import EncodedRows, encode_task, pack_texts
from megatron_graft.errors import ConfigError, DonorError
from tests.helpers.building import HIDDEN_SIZE, make_documents
from tools.bench.encoding import measure_encoding

LAYERS = [1, 2]
WORDS = " ".join(make_documents(20)).split()
TEXTS = [f" {first} {second}"[:24] for first, second in zip(WORDS[:90], WORDS[1:], strict=False)] + [" the", "w"]


def run_stages(directory: Path, donor: HuggingFaceDonor, num_tasks: int) -> tuple[EncodedRows, list[dict[str, Any]]]:
    """Pack and encode with so many tasks, last task first; rows, and the facts of every task."""
    packs = directory / "packs"
    tasks = [directory / str(task) for task in range(num_tasks)]
    for made in (packs, *tasks):
        made.mkdir(parents=True)
    facts = [pack_texts(TEXTS, donor, 16, packs)]
    for task in reversed(range(num_tasks)):
        facts.append(encode_task(packs, donor, LAYERS, task, num_tasks, tasks[task]))
    return EncodedRows(packs, tasks, LAYERS), facts


@pytest.fixture(scope="module")
def donor(donor_directory: Path) -> HuggingFaceDonor:
    return HuggingFaceDonor(donor_directory, pack_tokens=16)


@pytest.mark.parametrize("num_tasks", [1, 3, 80])
def test_rows_are_the_states_of_their_texts_whatever_the_number_of_tasks(
    tmp_path: Path, donor: HuggingFaceDonor, num_tasks: int
) -> None:
    rows, _ = run_stages(tmp_path, donor, num_tasks)
    expected = donor.encode(TEXTS, LAYERS)
    assert rows.num_rows == len(TEXTS)
    for layer in LAYERS:
        np.testing.assert_array_equal(rows.rows(layer, 0, len(TEXTS)), expected[layer])
        np.testing.assert_array_equal(rows.rows(layer, 17, 40), expected[layer][17:40])
        assert rows.rows(layer, 5, 5).shape == (0, HIDDEN_SIZE)
    lengths = [len(ids) - 1 for ids in donor.token_lists(TEXTS)]
    assert rows.lengths_of_row.tolist() == lengths


def test_facts_count_rows_tokens_and_lengths(tmp_path: Path, donor: HuggingFaceDonor) -> None:
    _, (packed, *tasks) = run_stages(tmp_path, donor, 4)
    lists = donor.token_lists(TEXTS)
    distinct = {tuple(ids) for ids in lists}
    assert (packed["rows"], packed["distinct"]) == (len(TEXTS), len(distinct)) == (92, len(distinct))
    assert sum(packed["rows_by_donor_length"].values()) == len(TEXTS)
    assert sum(int(length) * rows for length, rows in packed["rows_by_donor_length"].items()) == sum(
        len(ids) - 1 for ids in lists
    )
    assert packed["donor_tokens"] == sum(facts["donor_tokens"] for facts in tasks) < sum(map(len, lists))
    assert sum(facts["states"] for facts in tasks) == packed["distinct"]
    json.dumps([packed, tasks])


def test_tasks_of_another_plan_or_a_lost_one_are_refused(tmp_path: Path, donor: HuggingFaceDonor) -> None:
    run_stages(tmp_path, donor, 3)
    packs, tasks = tmp_path / "packs", [tmp_path / str(task) for task in range(3)]
    for wrong in (tasks[::-1], tasks[1:]):
        with pytest.raises(DonorError, match="states of other nodes"):
            EncodedRows(packs, wrong, LAYERS)
    with pytest.raises(DonorError, match="does not fit the packs.*got .* states of "):
        EncodedRows(packs, tasks[:2], LAYERS)
    with pytest.raises(DonorError, match="layer-3.npy: is missing or damaged"):
        EncodedRows(packs, tasks, [3])


def test_texts_that_cannot_be_packed_are_refused(tmp_path: Path, donor: HuggingFaceDonor) -> None:
    with pytest.raises(DonorError, match="cannot be packed"):
        pack_texts([], donor, 16, tmp_path)
    with pytest.raises(ConfigError, match="--pack-tokens"):
        pack_texts(["x"], donor, 0, tmp_path)


def test_the_bench_finds_the_same_states_both_ways(donor_directory: Path) -> None:
    found = measure_encoding(donor_directory, TEXTS, LAYERS, pack_tokens=16, sample_packs=5, rounds=1)
    assert found["tokens_per_row"]["packs"] < found["tokens_per_row"]["whole"]
    for layer in map(str, LAYERS):
        assert found["difference"][layer]["largest"] < 1e-5 and found["from_float64"][layer]["packs"]["largest"] < 1e-5
    assert 0 < found["sampled_rows"] <= found["rows"] == len(TEXTS)
    json.dumps(found)
