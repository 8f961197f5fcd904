from __future__ import annotations

import random

import pytest

from megatron_graft.building.plan import plan_batches


def random_token_lists(num_lists: int, seed: int) -> list[list[int]]:
    choose = random.Random(seed)
    return [choose.choices(range(3), k=choose.randint(1, 6)) for _ in range(num_lists)]


@pytest.mark.parametrize("batch_tokens", [1, 7, 64])
@pytest.mark.parametrize("num_lists", [1, 2, 200])
def test_every_row_is_taken_once_where_its_own_tokens_end(num_lists: int, batch_tokens: int) -> None:
    token_lists = random_token_lists(num_lists, seed=num_lists)
    rows = []
    for batch in plan_batches(token_lists, batch_tokens):
        for row, sequence, position in zip(batch.rows, batch.sequences, batch.positions, strict=True):
            assert batch.tokens_BS[sequence, : position + 1].tolist() == token_lists[row]
            rows.append(int(row))
    assert sorted(rows) == list(range(num_lists))


def test_a_beginning_of_another_sequence_has_no_run_of_its_own() -> None:
    batches = plan_batches([[1, 2], [1, 2, 3], [1], [1, 2, 3, 4], [1, 3], [1, 2]], 100)
    runs = [run for batch in batches for run in batch.tokens_BS.tolist()]
    assert runs == [[1, 3], [1, 2, 3, 4]]


def test_no_batch_is_over_the_budget_unless_one_sequence_is() -> None:
    batches = plan_batches(random_token_lists(30, seed=4), 5)
    assert all(batch.tokens_BS.size <= 5 or len(batch.tokens_BS) == 1 for batch in batches)
    assert {len(batch.tokens_BS) for batch in plan_batches([[1], [2], [3], [4, 4], [5, 5]], 2)} == {1, 2}


def test_the_plan_does_not_depend_on_the_order_of_equal_work() -> None:
    token_lists = random_token_lists(50, seed=9)
    runs = [batch.tokens_BS.tolist() for batch in plan_batches(token_lists, 20)]
    assert runs == [batch.tokens_BS.tolist() for batch in plan_batches(token_lists[::-1], 20)]
