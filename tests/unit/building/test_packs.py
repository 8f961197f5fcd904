from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from megatron_graft.building.packs import (
    Packs,
    flat_token_lists,
    load_packs,
    packs_of_task,
    plan_packs,
    save_packs,
)
from megatron_graft.errors import ConfigError, DonorError

BOS = 0


def random_token_lists(num_lists: int, seed: int) -> list[list[int]]:
    choose = random.Random(seed)
    return [[BOS, *choose.choices(range(1, 4), k=choose.randint(1, 6))] for _ in range(num_lists)]


def packed(token_lists: list[list[int]], pack_tokens: int) -> Packs:
    return plan_packs(*flat_token_lists(token_lists), pack_tokens)


def ancestors(parents: np.ndarray, node: int) -> list[int]:
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(int(parents[path[-1]]))
    return path[::-1]


@pytest.mark.parametrize("pack_tokens", [1, 7, 64])
@pytest.mark.parametrize("num_lists", [1, 2, 200])
def test_every_row_takes_the_node_whose_path_is_its_own_tokens(num_lists: int, pack_tokens: int) -> None:
    token_lists = random_token_lists(num_lists, seed=num_lists)
    packs = packed(token_lists, pack_tokens)
    for row, tokens in enumerate(token_lists):
        place = int(packs.node_of_row[row])
        number = int(np.searchsorted(packs.pack_starts, place, side="right")) - 1
        pack, node = packs[number], place - int(packs.pack_starts[number])
        path = ancestors(pack.parents, node)
        assert pack.tokens[path].tolist() == tokens == packs.token_path(place)
        assert pack.depths[path].tolist() == list(range(len(tokens)))
    assert packs.lengths_of_row.tolist() == [len(tokens) - 1 for tokens in token_lists]
    assert packs.taken.tolist() == sorted(set(packs.node_of_row.tolist()))


@pytest.mark.parametrize("pack_tokens", [1, 5, 12, 1000])
def test_a_beginning_is_run_once_but_for_the_path_that_a_pack_repeats(pack_tokens: int) -> None:
    token_lists = random_token_lists(100, seed=3)
    packs = packed(token_lists, pack_tokens)
    beginnings = {tuple(tokens[:size]) for tokens in token_lists for size in range(1, len(tokens) + 1)}
    firsts: list[tuple[int, ...]] = []
    for number in range(len(packs)):
        start, stop = packs.pack_starts[number : number + 2]
        paths = [tuple(packs.token_path(place)) for place in range(start, stop)]
        repeated = [path for path in paths if path in set(firsts)]
        # What is repeated is exactly the path to the first node that is new.
        new = paths[len(repeated)]
        assert repeated == [new[:size] for size in range(1, len(new))]
        assert len(paths) <= pack_tokens or len(paths) == len(new)
        firsts += paths[len(repeated) :]
    assert len(firsts) == len(set(firsts)) and set(firsts) == beginnings
    assert firsts == sorted(firsts), "nodes are numbered depth first"


def test_a_node_sees_its_ancestors_and_itself_alone() -> None:
    packs = packed(random_token_lists(60, seed=5), 40)
    for number in range(len(packs)):
        pack = packs[number]
        for node, sees in enumerate(pack.ancestors_MM()):
            assert np.flatnonzero(sees).tolist() == ancestors(pack.parents, node)


def test_packs_do_not_depend_on_the_order_or_the_repetition_of_texts() -> None:
    token_lists = random_token_lists(50, seed=9)
    one, other = packed(token_lists, 20), packed(token_lists[::-1] * 2, 20)
    for name in ("tokens", "parents", "depths", "pack_starts", "taken"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_array_equal(other.node_of_row, np.tile(one.node_of_row[::-1], 2))


@pytest.mark.parametrize("num_tasks", [1, 3, 7, 100])
def test_tasks_share_the_packs_without_gap_or_overlap(num_tasks: int) -> None:
    packs = packed(random_token_lists(80, seed=1), 10)
    shares = [packs_of_task(len(packs), task, num_tasks) for task in range(num_tasks)]
    assert [pack for first, last in shares for pack in range(first, last)] == list(range(len(packs)))
    taken = np.concatenate([packs.taken_in(first, last) for first, last in shares])
    np.testing.assert_array_equal(taken, packs.taken)


def test_texts_of_different_first_tokens_can_share_a_pack() -> None:
    packs = packed([[5], [4, 1], [5, 1]], 10)
    assert packs.parents.tolist() == [-1, 0, -1, 2] and packs.tokens.tolist() == [4, 1, 5, 1]


def test_saved_packs_come_back_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    packs = packed(random_token_lists(30, seed=2), 16)
    save_packs(packs, tmp_path)
    again = load_packs(tmp_path)
    for name, array in vars(packs).items():
        np.testing.assert_array_equal(getattr(again, name), array)
        assert getattr(again, name).dtype == array.dtype
    file = tmp_path / "parents.npy"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DonorError, match=r"parents\.npy: is missing or damaged"):
        load_packs(tmp_path)
    file.unlink()
    with pytest.raises(DonorError, match=r"parents\.npy: is missing or damaged"):
        load_packs(tmp_path)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ConfigError, match="--pack-tokens: is not positive .got 0"):
        packed([[0, 1]], 0)
    with pytest.raises(DonorError, match="got a text without a token"):
        packed([[0, 1], []], 8)
    with pytest.raises(DonorError, match="got none"):
        packed([], 8)
