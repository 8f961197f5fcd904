from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_graft.bank.bf16 import bf16_from_float32, float32_from_bf16
from megatron_graft.bank.manifest import Processing
from megatron_graft.building.donor import HuggingFaceDonor
from megatron_graft.building.encode import EncodedRows, encode_task, pack_texts
from megatron_graft.building.rows import rows_from_states
from megatron_graft.errors import ConfigError, DonorError
from tests.helpers.building import HIDDEN_SIZE, make_documents
from tools.bench.encoding import measure_encoding

PROCESSED = Processing(centred=True, normalised=True)


def states(num_rows: int = 500, seed: int = 0) -> np.ndarray:
    """States with a large common direction, as a donor's have."""
    generator = np.random.default_rng(seed)
    common = 5 * generator.standard_normal(16)
    return (common + generator.standard_normal((num_rows, 16))).astype(np.float32)


def test_rows_have_rms_one_and_no_common_direction() -> None:
    rows = float32_from_bf16(rows_from_states(states(), PROCESSED))
    assert np.sqrt((rows**2).mean(axis=1)) == pytest.approx(np.ones(500), abs=5e-3)
    assert np.abs(rows.mean(axis=0)).max() < 0.1


def test_raw_rows_are_the_states_rounded() -> None:
    rows = rows_from_states(states(), Processing(centred=False, normalised=False))
    np.testing.assert_array_equal(rows, bf16_from_float32(states()))


def test_centring_alone_takes_the_mean_away() -> None:
    rows = float32_from_bf16(rows_from_states(states(), Processing(centred=True, normalised=False)))
    np.testing.assert_allclose(rows, states() - states().mean(axis=0), atol=0.02)


def test_a_few_huge_states_do_not_show_in_the_other_rows() -> None:
    plain = states()
    spiked = states()
    spiked[:10, 3] = 1e5
    others = slice(10, None)
    before = float32_from_bf16(rows_from_states(plain, PROCESSED))[others]
    after = float32_from_bf16(rows_from_states(spiked, PROCESSED))[others]
    cosine = (before * after).sum(axis=1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    assert cosine.min() > 0.9


def test_equal_states_give_zero_rows_and_not_nan() -> None:
    rows = float32_from_bf16(rows_from_states(np.ones((4, 16), dtype=np.float32), PROCESSED))
    assert np.abs(rows).max() < 1e-2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_refused(value: float) -> None:
    broken = states()
    broken[17, 2] = value
    with pytest.raises(DonorError, match="text number 17"):
        rows_from_states(broken, PROCESSED)


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
