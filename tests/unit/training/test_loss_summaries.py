"""What is said of the losses of a text, against straightforward loops over its tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_graft.bank.reader import open_bank
from megatron_graft.lookup.index import open_index
from megatron_graft.ngram.oracle import brute_force_lookup
from megatron_graft.training.loss_summaries import (
    COUNT_GROUPS,
    Classifier,
    Documents,
    Matches,
    count_group_name,
    summary,
)
from tests.helpers.banks import EOD, make_bank, random_counts

LENGTHS = np.array([0, 4, 1, 0, 7, 30, 1], dtype=np.int32)  # empty documents, and ones of an EOD alone
N = int(LENGTHS.sum()) - 1


@pytest.fixture
def losses_N() -> np.ndarray:
    return np.random.default_rng(0).exponential(3.0, N).astype(np.float32)


@pytest.fixture
def bytes_N() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 9, N).astype(np.int32)


@pytest.fixture
def matches() -> Matches:
    generator = np.random.default_rng(2)
    orders = generator.integers(1, 5, N) * (generator.random(N) < 0.7)
    counts = np.where(orders > 0, 4 ** generator.integers(0, 10, N), 0)
    return Matches(orders_N=orders.astype(np.uint8), counts_N=counts)


def documents_by_loop(values: list[float]) -> list[float]:
    """Sums over documents of what stands at every predicted token."""
    sums, token = [], 0
    for length in LENGTHS:
        inside = 0.0
        for _ in range(length):
            inside += values[token - 1] if token else 0.0  # the first token is not predicted
            token += 1
        sums.append(inside)
    return sums


def means_by_loop(losses: list[float], classes: list[Any]) -> dict[Any, dict[str, Any]]:
    of_class: dict[Any, list[float]] = {}
    for loss, name in zip(losses, classes, strict=True):
        of_class.setdefault(name, []).append(loss)
    return {
        name: {"tokens": len(part), "loss": pytest.approx(sum(part) / len(part))} for name, part in of_class.items()
    }


def test_every_predicted_token_belongs_to_the_document_it_is_in(losses_N: np.ndarray, bytes_N: np.ndarray) -> None:
    result = summary(losses_N, Documents.of(LENGTHS, bytes_N), None)["documents"]
    assert result["tokens"] == documents_by_loop([1.0] * N) == [0, 3, 1, 0, 7, 30, 1]
    assert result["bytes"] == documents_by_loop(bytes_N.tolist())
    assert result["loss"] == pytest.approx(documents_by_loop(losses_N.tolist()))
    assert all(type(number) is int for number in (*result["tokens"], *result["bytes"]))


def test_a_first_document_of_one_token_has_nothing_to_predict() -> None:
    documents = Documents.of(np.array([1, 2]), np.array([5, 0]))
    assert (documents.tokens_M.tolist(), documents.bytes_M.tolist()) == ([0, 2], [0, 5])
    assert documents.sums(np.array([1.5, 2.0])).tolist() == [0.0, 3.5]


def test_the_text_is_the_sum_of_its_documents(losses_N: np.ndarray, bytes_N: np.ndarray, matches: Matches) -> None:
    result = summary(losses_N, Documents.of(LENGTHS, bytes_N), matches)
    documents = result["documents"]
    assert result["tokens"] == sum(documents["tokens"]) == N
    assert result["bytes"] == sum(documents["bytes"]) == int(bytes_N.sum())
    assert result["loss"] * N == pytest.approx(sum(documents["loss"]))
    assert result["loss"] == pytest.approx(sum(losses_N.tolist()) / N)
    assert result["bits_per_byte"] == pytest.approx(sum(losses_N.tolist()) / math.log(2) / int(bytes_N.sum()))


def test_losses_are_split_by_order_and_by_order_and_count(
    losses_N: np.ndarray, bytes_N: np.ndarray, matches: Matches
) -> None:
    result = summary(losses_N, Documents.of(LENGTHS, bytes_N), matches)
    orders, counts, losses = matches.orders_N.tolist(), matches.counts_N.tolist(), losses_N.tolist()
    assert result["by_order"] == means_by_loop(losses, [str(order) if order else "miss" for order in orders])
    both = zip(orders, counts, strict=True)
    classes = [(str(order), group_by_loop(count)) if order else "miss" for order, count in both]
    expected: dict[str, Any] = {}
    for name, mean in means_by_loop(losses, classes).items():
        if name == "miss":
            expected[name] = mean
        else:
            expected.setdefault(name[0], {})[name[1]] = mean
    assert result["by_order_and_count"] == expected
    for order, groups in result["by_order_and_count"].items():
        if order != "miss":
            assert sum(part["tokens"] for part in groups.values()) == result["by_order"][order]["tokens"]
            starts = [int(name.rstrip("+").split("-")[0]) for name in groups]
            assert starts == sorted(starts), "the groups of an order stand in order"


def group_by_loop(count: int) -> str:
    if count < 4:
        return "1" if count == 1 else "2-3"
    first = 4
    while first * 4 <= count and first < 65536:
        first *= 4
    return "65536+" if first == 65536 else f"{first}-{first * 4 - 1}"


def test_without_matches_all_are_misses_and_no_counts_are_told(losses_N: np.ndarray, bytes_N: np.ndarray) -> None:
    result = summary(losses_N, Documents.of(LENGTHS, bytes_N), None)
    assert result["by_order"] == {"miss": {"tokens": N, "loss": pytest.approx(result["loss"])}}
    assert "by_order_and_count" not in result


@pytest.mark.parametrize("count", [1, 2, 3, 4, 15, 16, 63, 64, 16383, 16384, 65535, 65536, 10**12])
def test_counts_fall_into_groups_by_powers_of_four(count: int) -> None:
    matches = Matches(orders_N=np.array([2], np.uint8), counts_N=np.array([count]))
    result = summary(np.ones(1, np.float32), Documents.of(np.array([2]), np.array([1])), matches)
    assert result["by_order_and_count"] == {"2": {group_by_loop(count): {"tokens": 1, "loss": 1.0}}}


def test_groups_have_names() -> None:
    names = [count_group_name(group) for group in range(len(COUNT_GROUPS))]
    assert names[:5] == ["1", "2-3", "4-15", "16-63", "64-255"]
    assert names[-2:] == ["16384-65535", "65536+"]


def test_many_small_losses_beside_a_large_one_are_not_lost() -> None:
    losses = np.full(200_001, 1e-3, dtype=np.float32)
    losses[0] = 1e5
    result = summary(losses, Documents.of(np.array([losses.size + 1]), np.ones(losses.size, np.int32)), None)
    assert result["documents"]["loss"][0] == pytest.approx(100_200.0, rel=1e-7)
    assert result["loss"] == pytest.approx(100_200.0 / losses.size, rel=1e-7)


@pytest.mark.parametrize("rows", [None, 40])
def test_matches_are_those_of_the_oracle_in_each_window_by_itself(tmp_path: Path, rows: int | None) -> None:
    make_bank(tmp_path / "bank", random_counts(120, seed=3, vocab_size=8))
    bank = open_bank(tmp_path / "bank", rows=rows)
    generator = np.random.default_rng(4)
    batches = [(generator.integers(0, 8, (2, 9)), generator.random((2, 9)) < 0.8) for _ in range(3)]
    classifier = Classifier(index=open_index(bank), key_counts=bank.key_counts)
    found = classifier.matches(batches, EOD)
    keys, orders, counts = bank.rows_of_keys(), [], []
    for inputs_BS, mask_BS in batches:
        for tokens, mask in zip(inputs_BS, mask_BS, strict=True):
            rows_found, lengths = brute_force_lookup(keys, tokens[None], EOD, bank.min_order, bank.max_order)
            orders += lengths[0][mask].tolist()
            counts += [int(bank.key_counts[row]) if row >= 0 else 0 for row in rows_found[0][mask].tolist()]
    assert found.orders_N.tolist() == orders and found.counts_N.tolist() == counts
    assert 0 < np.count_nonzero(found.orders_N) < found.orders_N.size
