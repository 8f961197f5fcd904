"""A data set as an evaluation reads it: documents in order, EOD tokens included, in windows of one length.

Shapes: T tokens; B sequences, S positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_graft.data.tokenizer import TextTokenizer
from megatron_graft.errors import DataError
from megatron_graft.training.loss_summaries import Documents


@dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """A data set as one row of tokens; all but the first are predicted.

    Attributes:
        tokens: int64 ``[T]``, documents in order, EOD tokens included.
        documents: which of the predicted tokens belong to which document.
    """

    tokens: np.ndarray
    documents: Documents

    @classmethod
    def read(cls, prefix: str, tokenizer: TextTokenizer, split: str | None = None) -> EvaluationText:
        """Read a ``.bin/.idx`` pair; with Megatron's ``--split`` of a run, only its validation share.

        Raises:
            DataError: it is missing, or there is nothing in it.
        """
        if not IndexedDataset.exists(prefix):
            raise DataError(f"data set {prefix}", "does not exist", expected=f"{prefix}.bin and {prefix}.idx")
        data = IndexedDataset(prefix)
        entries = range(len(data)) if split is None else validation_entries(split, len(data))
        parts = [np.asarray(data[index], dtype=np.int64) for index in entries]
        tokens = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        if tokens.size < 2:
            whole = "" if split is None else f" in its validation share, --split {split}"
            raise DataError(f"data set {prefix}", f"holds nothing to predict{whole}", got=f"{tokens.size} tokens")
        return cls(
            tokens=tokens,
            documents=Documents.of(_document_lengths(data, entries), tokenizer.num_bytes_of_ids[tokens[1:]]),
        )

    @property
    def num_predicted(self) -> int:
        """Number of predicted tokens, T - 1."""
        return self.tokens.size - 1

    def batches(self, length: int, eod: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(inputs, labels, mask), int64 and bool ``[B, S]``: windows of ``length`` tokens, ``size`` at a time.

        The last window is filled up with EOD. The mask is true where a label is a token of the text; true labels, row
        by row, are the predicted tokens in order.
        """
        for windows in itertools.batched(self._windows(length, eod), size):
            inputs, labels, masks = zip(*windows, strict=True)
            yield np.stack(inputs), np.stack(labels), np.stack(masks)

    def _windows(self, length: int, eod: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for start in range(0, self.num_predicted, length):
            piece = self.tokens[start : start + length + 1]
            real = piece.size - 1
            padded = np.concatenate([piece, np.full(length - real, eod)])
            yield padded[:-1], padded[1:], np.arange(length) < real


def validation_entries(split: str, num_entries: int) -> range:
    """The entries of a data set that Megatron keeps for validation under ``--split``, rounded as it does."""
    share = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))[Split.valid.value]
    begin, end = (int(round(edge * float(num_entries))) for edge in share or (0.0, 0.0))
    return range(begin, end)


def _document_lengths(data: IndexedDataset, entries: range) -> np.ndarray:
    """int64: tokens of every document that has one of the entries, or of its part among them; an entry may be empty."""
    borders = np.unique(np.clip(data.document_indices, entries.start, entries.stop)) - entries.start
    ends = np.concatenate([[0], np.cumsum(data.sequence_lengths[entries.start : entries.stop], dtype=np.int64)])
    lengths: np.ndarray = np.diff(ends[borders])
    return lengths
