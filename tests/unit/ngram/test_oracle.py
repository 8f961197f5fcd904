from __future__ import annotations

import numpy as np

from megatron_graft.ngram.oracle import brute_force_lookup

EOD = 9
ROWS = {(1, 2): 0, (3, 1, 2): 1, (2, 2): 2, (5, 3, 1, 2): 3, (EOD, 1): 4}


def lookup(tokens: list[int], eod: int | None = EOD, min_order: int = 2, max_order: int = 4):
    rows, orders = brute_force_lookup(ROWS, np.array([tokens]), eod, min_order, max_order)
    return rows[0].tolist(), orders[0].tolist()


def test_the_longest_known_suffix_wins():
    assert lookup([5, 3, 1, 2, 2]) == ([-1, -1, -1, 3, 2], [0, 0, 0, 4, 2])


def test_an_unknown_longer_suffix_falls_back_to_a_shorter_one():
    assert lookup([4, 3, 1, 2]) == ([-1, -1, -1, 1], [0, 0, 0, 3])
    assert lookup([4, 4, 1, 2]) == ([-1, -1, -1, 0], [0, 0, 0, 2])


def test_nothing_matches_across_a_document_start():
    assert lookup([3, EOD, 1, 2]) == ([-1, -1, -1, 0], [0, 0, 0, 2])
    assert lookup([1, EOD, 2]) == ([-1, -1, -1], [0, 0, 0])


def test_a_key_that_holds_eod_never_matches():
    assert lookup([EOD, 1]) == ([-1, -1], [0, 0])
    assert lookup([EOD, 1], eod=None) == ([-1, 4], [0, 2])


def test_orders_outside_the_range_are_not_tried():
    assert lookup([5, 3, 1, 2], max_order=3)[0] == [-1, -1, -1, 1]
    assert lookup([4, 4, 1, 2], min_order=3)[0] == [-1, -1, -1, -1]


def test_output_types():
    rows, orders = brute_force_lookup(ROWS, np.zeros((2, 3), dtype=np.int32), EOD, 2, 4)
    assert (rows.dtype, orders.dtype) == (np.int64, np.uint8)
    assert rows.shape == orders.shape == (2, 3)
