"""The documents that a bank is counted over: Megatron ``.bin/.idx`` data sets, the training share only.

Megatron splits a data set by whole entries of its index (which it shuffles as documents), so the share is a
range of entries. An n-gram never leaves an entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.errors import DataError
from megatron_graft.files import sha256_of_file

_NUM_SPLITS = 3  # training, validation, test
# The header of an .idx file; then, per entry, a 4-byte length and an 8-byte offset, then the documents' borders.
_HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("dtype_code", "u1"), ("entries", "<u8"), ("borders", "<u8")])
_MAGIC = b"MMIDIDX"  # NumPy strips the two zero bytes that end it
_DTYPE_CODES = range(1, 9)
_ENTRY_BYTES, _BORDER_BYTES = 12, 8


class MegatronDocuments:
    """Token arrays of one or more Megatron data sets, read lazily and as often as asked.

    Args:
        prefixes: paths without ``.bin``/``.idx``.
        split: Megatron's ``--split`` of the training run (``"969,30,1"``): only the training share is read.
            None reads everything.
        vocab_size: ids at or above it are refused; they come from another tokenizer.

    Iterating yields one integer array of token ids per entry, in file order.

    Raises:
        DataError: a file is missing, empty, truncated or not a Megatron index, the split leaves no training
            entry, or (while iterating) a token id is out of range.
    """

    def __init__(self, prefixes: Sequence[str | Path], *, split: str | None, vocab_size: int) -> None:
        if not prefixes:
            raise DataError("--data-prefix", "names no data set")
        self.prefixes = [str(prefix) for prefix in prefixes]
        self.split = split
        self._vocab_size = vocab_size
        share = 1.0 if split is None else training_share(split)
        self._sets = [_open(prefix) for prefix in self.prefixes]
        # The same rounding as Megatron's, so that not one validation entry is counted.
        self._stops = [int(round(share * float(len(data.sequence_lengths)))) for data in self._sets]
        lengths = zip(self._sets, self._stops, strict=True)
        self.num_tokens = sum(int(data.sequence_lengths[:stop].sum(dtype=np.int64)) for data, stop in lengths)
        self.num_documents = sum(self._stops)
        if self.num_tokens == 0:
            raise DataError(
                ", ".join(self.prefixes),
                "has no training tokens",
                got=f"{self.num_documents} training entries under --split {split}",
                remedy="Give a data set that is not empty, and a split with a training share.",
            )

    def __iter__(self) -> Iterator[np.ndarray]:
        for prefix, data, stop in zip(self.prefixes, self._sets, self._stops, strict=True):
            for entry in range(stop):
                tokens: np.ndarray = data.get(entry)
                if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size:
                    raise DataError(
                        prefix,
                        f"holds a token id outside the vocabulary, in entry {entry}",
                        got=int(tokens.max()) if int(tokens.min()) >= 0 else int(tokens.min()),
                        expected=f"0 to {self._vocab_size - 1}",
                        remedy="Give the tokenizer that made the data set.",
                    )
                yield tokens

    def fingerprint(self) -> list[dict[str, Any]]:
        """What tells these data sets from others, without reading the tokens: index digest and data size."""
        pairs = [(Path(f"{prefix}.idx"), Path(f"{prefix}.bin")) for prefix in self.prefixes]
        return [{"index_sha256": sha256_of_file(index), "bin_bytes": tokens.stat().st_size} for index, tokens in pairs]


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


def _open(prefix: str) -> Any:
    """Open one data set after checking that its two files are whole and fit each other; Megatron does not."""
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, tokens):
        if not path.is_file():
            raise DataError(
                path, "does not exist", remedy="Give the prefix of a Megatron data set, without .bin or .idx."
            )
    if _num_entries(index) == 0 or tokens.stat().st_size == 0:
        raise DataError(prefix, "is an empty data set", remedy="Preprocess a corpus that has text in it.")
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # imports torch

    data = IndexedDataset(prefix, mmap=True)
    token_bytes = int(data.sequence_lengths.sum(dtype=np.int64)) * np.dtype(data.index.dtype).itemsize
    if tokens.stat().st_size != token_bytes:
        raise DataError(
            tokens,
            "does not fit its index: truncated or another file",
            got=f"{tokens.stat().st_size:,} bytes",
            expected=f"{token_bytes:,} bytes",
            remedy="Copy or preprocess the data set again.",
        )
    return data


def _num_entries(index: Path) -> int:
    """Number of entries of an ``.idx`` file whose header fits its size."""
    size = index.stat().st_size
    with index.open("rb") as stream:
        header = np.frombuffer(stream.read(_HEADER.itemsize).ljust(_HEADER.itemsize, b"\0"), dtype=_HEADER)[0]
    entries, borders = int(header["entries"]), int(header["borders"])
    whole = _HEADER.itemsize + entries * _ENTRY_BYTES + borders * _BORDER_BYTES
    intact = header["magic"] == _MAGIC and header["version"] == 1 and header["dtype_code"] in _DTYPE_CODES
    if not intact or size < whole:
        raise DataError(
            index,
            "is truncated" if intact else "is not a Megatron index",
            got=f"{size:,} bytes",
            expected=f"{whole:,} bytes" if intact else "an .idx file, version 1",
            remedy="Copy or preprocess the data set again.",
        )
    return entries
