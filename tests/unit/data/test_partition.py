"""How the ranks of a layer share its work: everything is done, and done once."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from megatron_graft.data.partition import Partition, share
from tests.helpers.memories import positions_of, ranks

SIZES = range(1, 9)


@pytest.mark.parametrize("parts", SIZES)
@pytest.mark.parametrize("total", [0, 1, 2, 3, 7, 8, 15, 64, 646_403])
def test_shares_follow_each_other_and_cover_everything(total: int, parts: int) -> None:
    shares = [share(total, parts, part) for part in range(parts)]
    assert [first for first, _ in shares] == [0, *(end for _, end in shares[:-1])]
    assert shares[-1][1] == total


@pytest.mark.parametrize(("total", "parts"), [(7, 3), (8, 3), (9, 3), (2, 5), (0, 2)])
def test_no_share_is_longer_than_another_by_more_than_one_and_the_longer_come_first(total: int, parts: int) -> None:
    lengths = [end - first for first, end in (share(total, parts, part) for part in range(parts))]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


@pytest.mark.parametrize("contexts", [1, 2, 3, 4])
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_everything_at_every_position_is_worked_on_by_one_rank(
    size: int, sequence_parallel: bool, contexts: int
) -> None:
    columns, heads = np.zeros((48, 15), dtype=int), np.zeros((48, 13), dtype=int)
    for context in range(contexts):
        for place in ranks(size, sequence_parallel, (context, contexts)):
            for run in place.runs(48):
                columns[run, slice(*place.columns(15))] += 1
                heads[run, slice(*place.heads(13))] += 1
    assert (columns == 1).all() and (heads == 1).all()


@pytest.mark.parametrize("contexts", [1, 2, 3, 4])
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_rank_has_its_slice_of_a_chunk_from_the_front_and_one_from_the_back(
    size: int, sequence_parallel: bool, contexts: int
) -> None:
    whole = np.arange(2 * 48).reshape(2, 48)
    for context, rank in itertools.product(range(contexts), range(size)):
        place = ranks(size, sequence_parallel, (context, contexts))[rank]
        expected = positions_of(place, 48)
        assert np.array_equal(place.part(whole), whole[:, expected])
        assert place.num_positions(48) == len(expected)
        assert [place.position(48, here) for here in range(len(expected))] == expected.tolist()
        with pytest.raises(IndexError):
            place.position(48, len(expected))
        for other in range(size):
            assert np.array_equal(place.part(whole, other), whole[:, positions_of(place, 48, other)])


def test_a_part_of_one_run_is_no_copy() -> None:
    whole = np.zeros((2, 8))
    assert np.shares_memory(Partition(rank=1, size=2, sequence_parallel=True).part(whole), whole)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_others_are_the_ranks_that_split_the_sequence_in_the_order_of_their_group(sequence_parallel: bool) -> None:
    place = Partition(rank=1, size=2, sequence_parallel=sequence_parallel, context_rank=2, context_size=3)
    found = [(other.context_rank, other.rank) for other in place.others()]
    assert found == [(context, rank) for context in range(3) for rank in ([0, 1] if sequence_parallel else [1])]


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_ranks_work_in_their_order(size: int, sequence_parallel: bool) -> None:
    """Joined in the order of the ranks, slices are the whole: checkpoints and Megatron's gathers rely on it."""
    places = ranks(size, sequence_parallel)
    for starts in (
        [place.runs(48)[0].start for place in places],
        [place.columns(15)[0] for place in places],
        [place.heads(13)[0] for place in places],
        [place.table_rows(31)[0] for place in places],
    ):
        assert starts == sorted(starts)


@pytest.mark.parametrize("size", SIZES)
def test_with_sequence_parallelism_positions_are_split_and_columns_are_whole(size: int) -> None:
    for rank, place in enumerate(ranks(size, True)):
        assert (place.sequence_parts, place.splits_columns) == (size, False)
        assert place.runs(24 * size) == [slice(24 * rank, 24 * rank + 24)]
        assert (place.columns(15), place.heads(6)) == ((0, 15), (0, 6))


@pytest.mark.parametrize("size", SIZES)
def test_without_sequence_parallelism_positions_are_whole_and_columns_are_split(size: int) -> None:
    for place in ranks(size, False):
        assert (place.sequence_parts, place.splits_columns) == (1, size > 1)
        assert place.runs(24) == [slice(0, 24)]
        first, end = place.columns(15)
        assert 15 // size <= end - first <= -(-15 // size)


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_a_rank_knows_what_every_other_rank_works_on(size: int, sequence_parallel: bool) -> None:
    places = ranks(size, sequence_parallel)
    for place in places:
        for other in places:
            assert place.runs(48, other.rank) == other.runs(48)
            assert place.heads(13, other.rank) == other.heads(13)


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_table_rows_are_split_without_padding_whatever_splits_the_sequence(size: int, sequence_parallel: bool) -> None:
    places = ranks(size, sequence_parallel)
    bounds = places[0].table_bounds(31)
    assert bounds.dtype == np.int64
    assert (bounds[0], bounds[-1], len(bounds)) == (0, 31, size + 1)
    for place in places:
        assert np.array_equal(place.table_bounds(31), bounds)
        assert place.table_rows(31) == (bounds[place.rank], bounds[place.rank + 1])


@pytest.mark.parametrize("work", [Partition.runs, Partition.columns, Partition.heads, Partition.table_rows])
def test_one_rank_does_everything(work: Callable[[Partition, int], list[slice] | tuple[int, int]]) -> None:
    for sequence_parallel in (True, False):
        everything = work(Partition(sequence_parallel=sequence_parallel), 10)
        assert everything in ([slice(0, 10)], (0, 10))
