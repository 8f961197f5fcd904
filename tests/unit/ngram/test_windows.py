from __future__ import annotations

import numpy as np
import pytest

from megatron_graft.ngram.windows import positions_in_document

EOD = 9


def test_position_counts_from_the_last_document_start():
    tokens = np.array([[1, 2, EOD, 3, 4], [EOD, EOD, 1, EOD, 2]], dtype=np.int32)
    assert positions_in_document(tokens, EOD).tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 1, 0]]


def test_without_eod_a_sequence_is_one_document():
    tokens = np.array([[EOD, 1, EOD]], dtype=np.int64)
    assert positions_in_document(tokens, None).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_batches_give_empty_answers(shape):
    tokens = np.empty(shape, dtype=np.int64)
    assert positions_in_document(tokens, EOD).shape == shape


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("seed", range(5))
def test_positions_agree_with_a_walk_token_by_token(dtype, seed):
    tokens = np.random.default_rng(seed).integers(0, 3, (4, 40)).astype(dtype)
    positions = positions_in_document(tokens, 0)
    for sequence, row in enumerate(tokens.tolist()):
        position = -1
        for column, token in enumerate(row):
            position += 1
            assert positions[sequence, column] == position
            if token == 0:
                position = -1


def test_input_is_left_alone():
    tokens = np.array([[1, EOD, 2]], dtype=np.int64)
    positions_in_document(tokens, None)[:] = 7
    assert tokens.tolist() == [[1, EOD, 2]]
