"""The documents that a bank is counted over: Megatron ``.bin/.idx`` data sets, the training share only.

Megatron splits a data set by whole entries of its index (which it shuffles as documents), so the share is a
range of entries. An n-gram never leaves an entry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.building.data_set import DataSet, open_data_set
from megatron_graft.errors import DataError
from megatron_graft.files import sha256_of_file

_NUM_SPLITS = 3  # training, validation, test


class MegatronDocuments:
    """Token arrays of one or more Megatron data sets, read lazily and as often as asked.

    Args:
        prefixes: paths without ``.bin``/``.idx``.
        split: Megatron's ``--split`` of the training run (``"969,30,1"``): only the training share is read.
            None reads everything.
        vocab_size: ids at or above it are refused; they come from another tokenizer.

    Iterating yields one integer array of token ids per entry, in file order.

    Attributes:
        data_sets: one for every prefix.
        stops: for every data set, how many of its entries, from the first on, are the training share.
        tokens_by_set: tokens of these entries.
        longest: tokens of the longest of all of these entries.
        num_tokens: of all data sets.
        num_documents: of all data sets.

    Raises:
        DataError: a file is missing, empty, truncated or not a Megatron index, the split leaves no training
            entry, or (while iterating) a token id is out of range.
    """

    def __init__(self, prefixes: Sequence[str | Path], *, split: str | None, vocab_size: int) -> None:
        if not prefixes:
            raise DataError("--data-prefix", "names no data set")
        self.prefixes = [str(prefix) for prefix in prefixes]
        self.split = split
        self.vocab_size = vocab_size
        share = 1.0 if split is None else training_share(split)
        self.data_sets: list[DataSet] = [open_data_set(prefix) for prefix in self.prefixes]
        # The same rounding as Megatron's, so that not one validation entry is counted.
        self.stops = [int(round(share * float(data.entries))) for data in self.data_sets]
        sizes = [_sum_and_most(data, stop) for data, stop in zip(self.data_sets, self.stops, strict=True)]
        self.tokens_by_set = [tokens for tokens, _ in sizes]
        self.longest = max(longest for _, longest in sizes)
        self.num_tokens = sum(self.tokens_by_set)
        self.num_documents = sum(self.stops)
        if self.num_tokens == 0:
            raise DataError(
                ", ".join(self.prefixes),
                "has no training tokens",
                got=f"{self.num_documents} training entries under --split {split}",
                remedy="Give a data set that is not empty, and a split with a training share.",
            )

    def __iter__(self) -> Iterator[np.ndarray]:
        for data, stop in zip(self.data_sets, self.stops, strict=True):
            for entry, tokens in enumerate(data.documents(stop)):
                yield self._checked(data, entry, tokens)

    def chosen(self, wanted: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
        """Some of the documents, as iterating yields them; the ids of the others are not read.

        Args:
            wanted: numbers of documents, over all data sets, int64 -> whether each is wanted, bool.
        """
        before = 0
        for data, stop in zip(self.data_sets, self.stops, strict=True):
            for entry, tokens in data.chosen_documents(stop, wanted, before):
                yield self._checked(data, entry, tokens)
            before += stop

    def _checked(self, data: DataSet, entry: int, tokens: np.ndarray) -> np.ndarray:
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            value = int(tokens.max()) if int(tokens.min()) >= 0 else int(tokens.min())
            raise token_out_of_range(data.prefix, entry, value, self.vocab_size)
        return tokens

    def fingerprint(self) -> list[dict[str, Any]]:
        """What tells these data sets from others, without reading the tokens: index digest and data size."""
        return [
            {"index_sha256": sha256_of_file(data.index_path), "bin_bytes": data.ids_path.stat().st_size}
            for data in self.data_sets
        ]

    def file_states(self) -> dict[str, dict[str, int]]:
        """Path of every file -> ``size`` in bytes and ``mtime_ns``, its time of change: whether one was replaced."""
        paths = [path for data in self.data_sets for path in (data.ids_path, data.index_path)]
        states = {str(path): path.stat() for path in paths}
        return {path: {"size": state.st_size, "mtime_ns": state.st_mtime_ns} for path, state in states.items()}


def token_out_of_range(prefix: str, entry: int, value: int, vocab_size: int) -> DataError:
    """The error for a token id that is not one of the vocabulary's."""
    return DataError(
        prefix,
        f"holds a token id outside the vocabulary, in entry {entry}",
        got=value,
        expected=f"0 to {vocab_size - 1}",
        remedy="Give the tokenizer that made the data set.",
    )


def training_share(split: str) -> float:
    """Training share of a Megatron ``--split`` string: ``"969,30,1"`` -> 0.969, ``"1"`` -> 1.

    Raises:
        DataError: it is not one to three non-negative weights, or the training weight is 0.
    """
    expected = "up to three weights, the first above 0, such as 969,30,1"
    if not re.fullmatch(r"\s*[.0-9]+\s*([,/]\s*[.0-9]+\s*)*", split):
        raise DataError("--split", "is malformed", got=repr(split), expected=expected)
    try:
        weights = [float(weight) for weight in re.findall(r"[.0-9]+", split)]
    except ValueError as error:
        raise DataError("--split", "is malformed", got=repr(split), expected=expected) from error
    if len(weights) > _NUM_SPLITS or weights[0] <= 0:
        raise DataError("--split", "has no usable training share", got=repr(split), expected=expected)
    padded = np.array(weights + [0.0] * (_NUM_SPLITS - len(weights)), dtype=np.float64)
    return float(padded[0] / np.sum(padded))


def _sum_and_most(data: DataSet, stop: int) -> tuple[int, int]:
    total, longest = 0, 0
    for lengths in data.lengths(0, stop):
        total += int(lengths.sum(dtype=np.int64))
        longest = max(longest, int(lengths.max()))
    return total, longest
