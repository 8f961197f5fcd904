"""Left context: who sends what to whom, and the gradient that goes back the same way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_graft.memory.halo import moves
from tests.helpers.memories import positions_of, ranks


@pytest.mark.parametrize("halo", [1, 3, 9, 20])
@pytest.mark.parametrize("contexts", [1, 2, 3])
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_moves_bring_every_run_the_positions_before_it(
    size: int, sequence_parallel: bool, contexts: int, halo: int
) -> None:
    length = 36
    place = ranks(size, sequence_parallel, (0, contexts))[0]
    members = place.others()
    held = [positions_of(member, length) for member in members]
    contexts_of = [np.full(halo * len(member.runs(length)), -1) for member in members]
    for move in moves(place, length, halo):
        there = contexts_of[move.target][move.place : move.place + move.count]
        assert (there == -1).all(), "moved twice"
        there[:] = held[move.source][move.first : move.first + move.count]
    for member, found in zip(members, contexts_of, strict=True):
        starts = [run.start for run in member.runs(length)]
        wanted = np.concatenate([np.arange(start - halo, start) for start in starts])
        assert np.array_equal(found, np.maximum(wanted, -1))


def test_every_rank_makes_the_same_plan() -> None:
    places = list(itertools.chain(*(ranks(2, True, (context, 2)) for context in range(2))))
    assert len({moves(place, 16, 3) for place in places}) == 1
