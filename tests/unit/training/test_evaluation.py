"""What an evaluation reads, and what it refuses; the measuring itself is in the functional test of the pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_graft.data.preprocess import dataset_prefix, preprocess
from megatron_graft.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_graft.errors import ConfigError, DataError
from megatron_graft.training.evaluate_run import evaluate_run
from megatron_graft.training.evaluation_text import EvaluationText
from tests.helpers.tokenizers import SENTENCES, TRICKY, small_sentencepiece

TEXTS = (*SENTENCES, *TRICKY)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(small_sentencepiece(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def prefix(tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One document a text."""
    directory = tmp_path_factory.mktemp("data")
    lines = directory / "text.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    preprocess([lines], directory / "text", tokenizer)
    return str(dataset_prefix(directory / "text"))


def data_set_of(prefix: Path, documents: list[list[list[int]]]) -> str:
    """Documents of several entries each, as Megatron's own preprocessing makes them of sentences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for entries in documents:
        builder.add_document([token for entry in entries for token in entry], [len(entry) for entry in entries])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_a_text_is_its_documents_end_to_end(prefix: str, tokenizer: TextTokenizer) -> None:
    text = EvaluationText.read(prefix, tokenizer)
    documents = [[*tokenizer.encode(text), tokenizer.eod] for text in TEXTS]
    assert text.tokens.tolist() == [token for document in documents for token in document]
    lengths = [len(document) for document in documents]
    assert text.documents.tokens_M.tolist() == [lengths[0] - 1, *lengths[1:]]
    assert text.num_predicted == sum(lengths) - 1
    # Normalisation is off and every byte has a token, so tokens spell the text. The first is not predicted.
    spelled = [len(text.encode()) for text in TEXTS]
    first = int(tokenizer.num_bytes_of_ids[documents[0][0]])
    assert text.documents.bytes_M.tolist() == [spelled[0] - first, *spelled[1:]]


def test_a_document_may_have_several_entries_and_an_empty_one(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    eod = tokenizer.eod
    data = data_set_of(tmp_path / "many", [[[5, 6], [7, eod]], [[]], [[8, eod]], [[9], [], [9, 9, eod]]])
    text = EvaluationText.read(data, tokenizer)
    assert text.tokens.tolist() == [5, 6, 7, eod, 8, eod, 9, 9, 9, eod]
    assert text.documents.tokens_M.tolist() == [3, 0, 2, 4]


@pytest.mark.parametrize(
    ("split", "tokens", "lengths"),
    [
        ("50,50,0", [8, 2, 9, 9, 9, 2], [1, 4]),
        ("25,50,25", [7, 2, 8, 2], [1, 2]),  # begins within a document
        ("0,1,0", [5, 6, 7, 2, 8, 2, 9, 9, 9, 2], [3, 2, 4]),
    ],
)
def test_of_a_run_with_a_split_the_validation_share_is_read(
    tmp_path: Path, tokenizer: TextTokenizer, split: str, tokens: list[int], lengths: list[int]
) -> None:
    data = data_set_of(tmp_path / "many", [[[5, 6], [7, 2]], [[8, 2]], [[9, 9, 9, 2]]])
    text = EvaluationText.read(data, tokenizer, split)
    assert text.tokens.tolist() == tokens
    assert text.documents.tokens_M.tolist() == lengths


def test_missing_and_empty_data_is_refused(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match=rf"^data set {tmp_path}/none: does not exist \(expected {tmp_path}/none.bin"):
        EvaluationText.read(str(tmp_path / "none"), tokenizer)
    data = data_set_of(tmp_path / "one", [[[5]], [[6]]])
    with pytest.raises(DataError, match=r"nothing to predict in its validation share, --split 50,50,0 \(got 1 tokens"):
        EvaluationText.read(data, tokenizer, "50,50,0")


@pytest.mark.parametrize(("length", "size"), [(3, 2), (4, 100), (100, 1), (1, 3)])
def test_every_token_but_the_first_is_a_label_once_and_in_order(
    prefix: str, tokenizer: TextTokenizer, length: int, size: int
) -> None:
    text = EvaluationText.read(prefix, tokenizer)
    labels, inputs = [], []
    for inputs_BS, labels_BS, mask_BS in text.batches(length, tokenizer.eod, size):
        assert inputs_BS.shape == labels_BS.shape == mask_BS.shape
        assert len(inputs_BS) <= size and inputs_BS.shape[1] == length
        assert np.array_equal(inputs_BS[:, 1:], labels_BS[:, :-1]), "a label is the next input of its window"
        assert set(labels_BS[~mask_BS].tolist()) <= {tokenizer.eod}
        labels += labels_BS[mask_BS].tolist()
        inputs += inputs_BS[mask_BS].tolist()
    assert labels == text.tokens[1:].tolist()
    assert inputs == text.tokens[:-1].tolist()


def test_a_text_to_measure_with_memory_off_must_be_one_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^--memory-off: names no text of --data \(got foreing; expected heldout or foreign\)\. Leave",
    ):
        data = {"heldout": "a", "foreign": "b"}
        evaluate_run(tmp_path, data, [], memory_off=["heldout", "foreing"])
