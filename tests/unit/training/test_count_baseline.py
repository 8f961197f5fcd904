import numpy as np
import pytest

from megatron_graft.training.count_baseline import BigramModel

VOCAB = 4
CONTEXTS = np.array([[0, 0, 0, 1], [0, 1, 1, 2]])
WORDS = np.array([[1, 1, 2, 3], [1, 3, 3, 0]])


@pytest.fixture
def model() -> BigramModel:
    return BigramModel.fitted(zip(CONTEXTS, WORDS, strict=True), VOCAB)


def test_probabilities_of_every_context_sum_to_one(model: BigramModel) -> None:
    for context in range(VOCAB):
        words = np.arange(VOCAB)
        assert np.exp(-model.losses(np.full(VOCAB, context), words)).sum() == pytest.approx(1.0)


def test_equals_the_interpolation_by_hand(model: BigramModel) -> None:
    unigram = (3 + 4 / VOCAB) / (8 + 4)  # word 1: three of eight, four distinct words
    expected = (3 + 2 * unigram) / (4 + 2)  # context 0: four tokens, two distinct words
    assert np.exp(-model.losses(np.array([0]), np.array([1]))[0]) == pytest.approx(expected)


def test_a_context_never_seen_falls_back_to_the_unigram(model: BigramModel) -> None:
    unigram = (3 + 4 / VOCAB) / (8 + 4)
    assert np.exp(-model.losses(np.array([3]), np.array([3]))[0]) == pytest.approx(unigram)
