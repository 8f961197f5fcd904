from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_graft.building.count import CountedNgrams, count_ngrams, count_stages
from megatron_graft.building.count_plan import CountPlan
from megatron_graft.building.data_set import write_data_set as write_array
from megatron_graft.building.documents import MegatronDocuments
from megatron_graft.building.tasks import task_directory
from megatron_graft.errors import BankIncompleteError, ConfigError, DataError
from tests.helpers.building import write_data_set
from tests.helpers.count_oracle import open_sets, oracle, pairs_of, plan_of, run_stages


def check_everything(plan: CountPlan, work: Path, expected: Any, *, backwards: bool = False) -> None:
    """Run the stages and compare all orders, at two thresholds, and the histogram."""
    facts = run_stages(plan, work, backwards=backwards)
    assert json.loads(json.dumps(facts)) == facts
    counted = CountedNgrams(plan, work)
    for order in plan.orders:
        wanted = expected(order)
        assert pairs_of(counted, order) == wanted
        assert pairs_of(counted, order, 3) == [pair for pair in wanted if pair[1] >= 3]
        assert counted.candidates(order) == len(wanted)
        counts, how_many = counted.count_histogram(order)
        assert (counts.dtype, how_many.dtype) == (np.int64, np.int64)
        assert np.repeat(counts, how_many).tolist() == sorted(count for _, count in wanted)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A corpus and everything that may decide, or must not decide, what is counted."""
    vocab_size = draw(st.integers(2, 6))
    document = st.lists(st.integers(0, vocab_size - 1), max_size=30)
    sets = draw(st.lists(st.lists(document, min_size=1, max_size=8), min_size=1, max_size=3))
    last = draw(st.integers(2, 8))
    return {
        "sets": [[*documents, [0]] for documents in sets],  # no set is empty
        "vocab_size": vocab_size,
        "eod": draw(st.sampled_from([None, 0])),
        "orders": tuple(range(draw(st.integers(2, last)), last + 1)),
        "min_count": draw(st.integers(1, 3)),
        "weighted": draw(st.booleans()),
        "count_by": draw(st.sampled_from(["occurrences", "documents"])),
        "num_slices": draw(st.sampled_from([1, 2, 5])),
        "num_partitions": draw(st.sampled_from([1, 2, 3])),
        "shares_of_partition": draw(st.sampled_from([1, 2, 7, 60])),
        "most_pool_blocks": draw(st.sampled_from([None, 1, 2, 5])),
        "most_table_entries": draw(st.sampled_from([None, 1, 2, 9])),
        "block_tokens": draw(st.sampled_from([1, 2, 3, 8, 100])),
        "backwards": draw(st.booleans()),
    }


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_counts_equal_brute_force(tmp_path_factory: pytest.TempPathFactory, case: dict[str, Any]) -> None:
    directory = tmp_path_factory.mktemp("count")
    sets, weights = case["sets"], None
    if case["weighted"]:
        weights = [1.0 + 2.5 * number for number in range(len(sets))]
    named = ("eod", "orders", "min_count", "count_by", "num_slices", "num_partitions")
    documents = open_sets(directory, sets, case["vocab_size"])
    plan = plan_of(documents, weights=weights, **{name: case[name] for name in named})
    cut = ("shares_of_partition", "most_pool_blocks", "most_table_entries", "block_tokens")
    plan = dataclasses.replace(plan, **{name: case[name] for name in cut})

    def expected(order: int) -> Any:
        return oracle(
            sets, order, eod=case["eod"], min_count=case["min_count"], weights=weights,
            by_documents=case["count_by"] == "documents",
        )  # fmt: skip

    check_everything(plan, directory / "work", expected, backwards=case["backwards"])


def skewed_sets(tokens: int, seed: int = 1) -> list[list[list[int]]]:
    """Two data sets with a few very frequent ids and many rare ones, in documents of all lengths."""
    generator = np.random.default_rng(seed)
    sets = []
    for _ in range(2):
        ids = (generator.zipf(1.3, size=tokens) % 60_000).astype(int)
        borders = np.sort(generator.integers(0, tokens, size=tokens // 300))
        sets.append([part.tolist() for part in np.split(ids, borders)])
    return sets


def output_digest(plan: CountPlan, work: Path) -> str:
    """Of the keys and counts of all orders, partitions end to end."""
    digest = hashlib.sha256()
    for stage in (stage for stage in count_stages(plan, work) if stage.name.endswith("reduce")):
        for name in ("keys.u64", "counts.u64"):
            for task in range(stage.num_tasks):
                digest.update((task_directory(work, stage.name, task) / name).read_bytes())
            digest.update(b"|")
    return digest.hexdigest()


@pytest.mark.parametrize("weights", [None, [0.3, 0.7]])
def test_however_the_work_is_cut_the_same_bytes_come_out(tmp_path: Path, weights: list[float] | None) -> None:
    sets = skewed_sets(30_000)
    documents = open_sets(tmp_path, sets, 60_000)
    digests = set()
    cuts: list[dict[str, Any]] = [
        {},
        {"num_slices": 40, "num_partitions": 3, "most_pool_blocks": 40, "most_table_entries": 700},
        {"num_slices": 2, "num_partitions": 37, "most_pool_blocks": 900, "block_tokens": 1000},
        {"num_slices": 1, "num_partitions": 1, "shares_of_partition": 1, "most_pool_blocks": 3},
    ]
    for number, cut in enumerate(cuts):
        numbers = {name: cut.pop(name, None) for name in ("num_slices", "num_partitions")}
        plan = plan_of(documents, weights=weights, orders=(2, 3, 4), eod=1, min_count=2, **numbers)
        plan = dataclasses.replace(plan, **cut)
        work = tmp_path / f"work{number}"
        if number == 0:
            check_everything(plan, work, lambda n: oracle(sets, n, eod=1, min_count=2, weights=weights))
        else:
            run_stages(plan, work)
        digests.add(output_digest(plan, work))
    assert len(digests) == 1


def test_counts_too_large_for_a_record_are_whole(tmp_path: Path) -> None:
    # With 2^20 tokens a key of order 2 leaves 24 bits of a record for its count.
    size = (1 << 24) + 10
    write_array(str(tmp_path / "set"), [np.full(size, 5)])
    documents = MegatronDocuments([tmp_path / "set"], split=None, vocab_size=1 << 20)
    plan = plan_of(documents, orders=(2,))
    run_stages(plan, tmp_path / "work")
    assert pairs_of(CountedNgrams(plan, tmp_path / "work"), 2) == [((5, 5), size - 1)]


def test_the_largest_ids_are_counted_exactly() -> None:
    top = (1 << 20) - 1
    levels = count_ngrams([np.array([top, 0, top, 0, top])], orders=[2, 3], eod=None)
    assert [(level.ids.tolist(), level.counts.tolist()) for level in levels] == [
        ([[0, top], [top, 0]], [2, 2]),
        ([[0, top, 0], [top, 0, top]], [1, 2]),
    ]


def test_no_ngram_crosses_a_document_or_holds_an_eod() -> None:
    documents = [np.array([1, 2, 9]), np.array([3, 4]), np.array([5, 9, 6, 7])]
    (level,) = count_ngrams(documents, orders=[2], eod=9)
    assert level.ids.tolist() == [[1, 2], [3, 4], [6, 7]]


def test_documents_shorter_than_every_order_give_no_ngrams() -> None:
    levels = count_ngrams([np.array([1]), np.array([], dtype=np.int32)], orders=[2, 3], eod=None)
    assert [level.ids.shape for level in levels] == [(0, 2), (0, 3)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("num_slices", [1, 3])
def test_an_id_outside_the_vocabulary_is_named_with_its_entry(tmp_path: Path, dtype: Any, num_slices: int) -> None:
    sets = [[[1, 2], [3]], [[1, 2, 3], [], [4, 1], [2, 7, 1]]]
    documents = open_sets(tmp_path, sets, 7, [dtype])
    plan = plan_of(documents, orders=(2,), num_slices=num_slices)
    with pytest.raises(DataError, match=r"set1: .*in entry 3 .got 7; expected 0 to 6"):
        run_stages(plan, tmp_path / "work")


def test_a_negative_id_is_refused(tmp_path: Path) -> None:
    plan = plan_of(open_sets(tmp_path, [[[1, 2], [3, -1]]], 7, [np.int32]), orders=(2,))
    with pytest.raises(DataError, match=r"in entry 1 .got -1; expected 0 to 6"):
        run_stages(plan, tmp_path / "work")


def test_a_stage_that_is_run_too_early_says_which_comes_first(tmp_path: Path) -> None:
    plan = plan_of(open_sets(tmp_path, [[[1, 2, 3]]], 7), orders=(2, 3))
    stages = {stage.name: stage for stage in count_stages(plan, tmp_path / "work")}
    assert list(stages) == ["count-2-map", "count-2-reduce", "count-3-map", "count-3-reduce"]
    for name, first in (("count-2-reduce", "count-2-map"), ("count-3-map", "count-2-reduce")):
        with pytest.raises(BankIncompleteError, match=f"Run stage {first} first"):
            stages[name].run(0, tmp_path)
    with pytest.raises(BankIncompleteError, match="Run stage count-2-reduce first"):
        CountedNgrams(plan, tmp_path / "work")


def test_a_data_set_that_was_cut_short_under_way_is_an_error(tmp_path: Path) -> None:
    plan = plan_of(open_sets(tmp_path, [[[1, 2, 3], [1, 2, 3]]], 7), orders=(2, 3))
    (tmp_path / "set0.bin").write_bytes(b"\1\0\2\0")
    with pytest.raises(DataError, match=r"set0\.bin ends at byte 4"):
        run_stages(plan, tmp_path / "work")


def test_documents_that_changed_their_lengths_under_way_are_an_error(tmp_path: Path) -> None:
    plan = plan_of(open_sets(tmp_path, [[[1, 2, 3], [1, 2, 3]]], 7), orders=(2,))
    write_data_set(tmp_path / "set0", [[1, 2], [3, 1], [2, 3]])
    with pytest.raises(DataError, match="do not add up|too few documents"):
        run_stages(plan, tmp_path / "work")


def test_keys_that_are_not_what_was_written_are_an_error(tmp_path: Path) -> None:
    plan = plan_of(open_sets(tmp_path, skewed_sets(3000), 60_000), orders=(2, 3))
    work = tmp_path / "work"
    with pytest.raises(BankIncompleteError):
        CountedNgrams(plan, work)
    for stage in count_stages(plan, work)[:2]:
        target = task_directory(work, stage.name, 0)
        target.mkdir(parents=True)
        stage.run(0, target)
    keys = np.fromfile(target / "keys.u64", dtype=np.uint64)
    keys[::-1].tofile(target / "keys.u64")
    with pytest.raises(DataError, match="not ascending"):
        count_stages(plan, work)[2].run(0, tmp_path)


def test_facts_tell_what_was_done(tmp_path: Path) -> None:
    sets = skewed_sets(5000)
    plan = plan_of(open_sets(tmp_path, sets, 60_000), orders=(2, 3), min_count=2)
    mapped, reduced = run_stages(plan, tmp_path / "work")[:2]
    assert mapped["tokens"] == 10_000
    assert mapped["candidates"] == sum(count for _, count in oracle(sets, 2, eod=None, min_count=1))
    assert reduced["records"] == mapped["records"] >= reduced["distinct"] == len(oracle(sets, 2, eod=None, min_count=1))
    assert reduced["kept"] == len(oracle(sets, 2, eod=None, min_count=2))
    assert {"passes", "node_seconds", "merge_seconds", "bytes_written"} <= mapped.keys()


@pytest.mark.parametrize("orders", [(), (1, 2), (2, 4), (3, 2), (2, 2), (2, 3, 4, 5, 6, 7, 8, 9)])
def test_unusable_orders_are_refused(orders: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="--orders"):
        count_ngrams([np.array([1, 2])], orders=orders, eod=None)


def test_a_count_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="--min-count.*got 0"):
        count_ngrams([np.array([1, 2])], orders=[2], eod=None, min_count=0)
