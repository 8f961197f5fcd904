"""One Megatron ``.bin/.idx`` data set, read without mapping it: index and ids in blocks, so memory is bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.errors import DataError

# The header of an .idx file; then, per entry, a 4-byte length and an 8-byte offset, then the documents' borders.
_HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("dtype_code", "u1"), ("entries", "<u8"), ("borders", "<u8")])
_MAGIC = b"MMIDIDX"  # NumPy strips the two zero bytes that end it
_DTYPE_CODES = range(1, 9)
_ID_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}  # what Megatron stores ids in
_LENGTH, _OFFSET, _BORDER_BYTES = np.dtype("<i4"), np.dtype("<i8"), 8
_ENTRIES_AT_ONCE = 1 << 16
_TOKENS_AT_ONCE = 1 << 20
_REMEDY = "Copy or preprocess the data set again."
_PREFIX_REMEDY = "Give the prefix of a Megatron data set, without .bin or .idx."


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set whose two files were checked against each other.

    Attributes:
        prefix: path without ``.bin``/``.idx``.
        id_dtype: of a token id in the ``.bin`` file: uint16 or int32, little-endian.
        entries: of the index; documents, in Megatron's use.
    """

    prefix: str
    id_dtype: np.dtype[Any]
    entries: int

    LENGTHS_OFFSET = _HEADER.itemsize
    """Bytes of the ``.idx`` file before the int32 length of the first entry."""

    @property
    def index_path(self) -> Path:
        """The ``.idx`` file."""
        return Path(f"{self.prefix}.idx")

    @property
    def ids_path(self) -> Path:
        """The ``.bin`` file: the ids of all entries, end to end."""
        return Path(f"{self.prefix}.bin")

    def lengths(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Lengths of entries ``start`` to ``stop`` in tokens: int32 arrays of at most 65,536.

        Raises:
            DataError: the index ends too early.
        """
        return _blocks(self.index_path, self.LENGTHS_OFFSET, _LENGTH, start, stop, _ENTRIES_AT_ONCE)

    def documents(self, stop: int) -> Iterator[np.ndarray]:
        """The token ids of every entry below ``stop``, in order: read-only arrays of ``id_dtype``.

        Raises:
            DataError: a file ends too early.
        """
        done = 0
        for lengths in self.lengths(0, stop):
            ends = np.cumsum(lengths, dtype=np.int64)
            entry = 0
            while entry < len(lengths):
                start = int(ends[entry - 1]) if entry else 0
                # As many entries as make a large read, and at least one.
                last = max(entry + 1, int(np.searchsorted(ends, start + _TOKENS_AT_ONCE, side="right")))
                ids = self._read_ids(done + start, done + int(ends[last - 1]))
                yield from np.split(ids, (ends[entry : last - 1] - start).tolist())
                entry = last
            done += int(ends[-1])

    def chosen_documents(
        self, stop: int, wanted: Callable[[np.ndarray], np.ndarray], before: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Number and token ids of those entries below ``stop`` that are wanted; the ids of others are not read.

        Args:
            stop: as in :meth:`documents`.
            wanted: numbers, int64, counted from ``before`` on -> whether each entry is wanted, bool.
            before: number of the first entry.

        Raises:
            DataError: a file ends too early.
        """
        entry, done = 0, 0
        for lengths in self.lengths(0, stop):
            ends = done + np.cumsum(lengths, dtype=np.int64)
            for place in np.flatnonzero(wanted(before + entry + np.arange(len(lengths)))).tolist():
                yield entry + place, self._read_ids(int(ends[place] - lengths[place]), int(ends[place]))
            entry, done = entry + len(lengths), int(ends[-1])

    def entry_at(self, token: int) -> int:
        """The entry that holds the token of this number in the ``.bin`` file.

        Raises:
            DataError: the index ends too early.
        """
        entry, done = 0, 0
        for lengths in self.lengths(0, self.entries):
            ends = done + np.cumsum(lengths, dtype=np.int64)
            if token < ends[-1]:
                return entry + int(np.searchsorted(ends, token, side="right"))
            entry, done = entry + len(lengths), int(ends[-1])
        raise DataError(self.prefix, "holds fewer tokens", got=done, expected=f"more than {token}", remedy=_REMEDY)

    def _read_ids(self, start: int, stop: int) -> np.ndarray:
        parts = list(_blocks(self.ids_path, 0, self.id_dtype, start, stop, max(1, stop - start)))
        ids: np.ndarray = parts[0] if parts else np.empty(0, dtype=self.id_dtype)
        return ids


def open_data_set(prefix: str) -> DataSet:
    """Open a data set after checking that its files are whole and fit each other; Megatron does not.

    Raises:
        DataError: a file is missing, empty, truncated or not a Megatron index; ids are neither uint16 nor int32;
            or entries do not lie end to end in the ``.bin`` file.
    """
    index, ids = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, ids):
        if not path.is_file():
            written = Path(f"{prefix}_text_document.idx")
            remedy = f"Did you mean {written.with_suffix('')}?" if written.is_file() else _PREFIX_REMEDY
            raise DataError(path, "does not exist", remedy=remedy)
    entries, dtype_code = _read_header(index)
    if entries == 0 or ids.stat().st_size == 0:
        raise DataError(prefix, "is an empty data set", remedy="Preprocess a corpus that has text in it.")
    if dtype_code not in _ID_DTYPES:
        raise DataError(
            index, "stores ids in a type that no corpus of tokens has", got=f"dtype code {dtype_code}",
            expected="4 (int32) or 8 (uint16)", remedy=_REMEDY,
        )  # fmt: skip
    data = DataSet(prefix=prefix, id_dtype=_ID_DTYPES[dtype_code], entries=entries)
    _check_entries(data)
    return data


def write_data_set(prefix: str, documents: Iterable[np.ndarray]) -> int:
    """Write integer arrays of token ids as a data set of int32, for counting what lies in no file.

    Returns:
        the size of the smallest vocabulary that has all of the ids.

    Raises:
        DataError: a token id is negative or takes more than 31 bits.
    """
    lengths: list[int] = []
    vocab_size = 1
    with Path(f"{prefix}.bin").open("wb") as stream:
        for entry, tokens in enumerate(documents):
            lengths.append(len(tokens))
            if len(tokens):
                least, most = int(tokens.min()), int(tokens.max())
                if least < 0 or most >= np.iinfo(np.int32).max:
                    raise DataError(f"document {entry}", "holds a token id that none can be", got=(least, most))
                vocab_size = max(vocab_size, most + 1)
            stream.write(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
    ends = np.cumsum(lengths, dtype="<i8") * 4
    header = np.zeros(1, dtype=_HEADER)
    header[0] = (_MAGIC, 1, 4, len(lengths), len(lengths) + 1)
    with Path(f"{prefix}.idx").open("wb") as stream:
        stream.write(header.tobytes())
        stream.write(np.array(lengths, dtype=_LENGTH).tobytes())
        stream.write((ends - 4 * np.array(lengths, dtype=_OFFSET)).tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
    return vocab_size


def _read_header(index: Path) -> tuple[int, int]:
    """Number of entries and dtype code of an ``.idx`` file whose header fits its size."""
    size = index.stat().st_size
    with index.open("rb") as stream:
        header = np.frombuffer(stream.read(_HEADER.itemsize).ljust(_HEADER.itemsize, b"\0"), dtype=_HEADER)[0]
    entries, borders = int(header["entries"]), int(header["borders"])
    whole = _HEADER.itemsize + entries * (_LENGTH.itemsize + _OFFSET.itemsize) + borders * _BORDER_BYTES
    intact = header["magic"] == _MAGIC and header["version"] == 1 and header["dtype_code"] in _DTYPE_CODES
    if not intact or size < whole:
        raise DataError(
            index,
            "is truncated" if intact else "is not a Megatron index",
            got=f"{size:,} bytes",
            expected=f"{whole:,} bytes" if intact else "an .idx file, version 1",
            remedy=_REMEDY,
        )
    return entries, int(header["dtype_code"])


def _check_entries(data: DataSet) -> None:
    """Entries lie end to end from the start of the ``.bin`` file to its end."""
    offsets_start = data.LENGTHS_OFFSET + data.entries * _LENGTH.itemsize
    offsets = _blocks(data.index_path, offsets_start, _OFFSET, 0, data.entries, _ENTRIES_AT_ONCE)
    entry, end = 0, 0
    for lengths, found in zip(data.lengths(0, data.entries), offsets, strict=True):
        ends = end + np.cumsum(lengths.astype(np.int64) * data.id_dtype.itemsize)
        expected = np.concatenate(([end], ends[:-1]))
        wrong = np.flatnonzero((lengths < 0) | (found != expected))
        if len(wrong):
            place = int(wrong[0])
            raise DataError(
                data.index_path,
                f"has entries that do not lie end to end: entry {entry + place}",
                got=f"{lengths[place]} tokens at byte {found[place]:,}",
                expected=f"tokens at byte {expected[place]:,}",
                remedy="Merge or preprocess the data set again, so that entries follow each other.",
            )
        entry, end = entry + len(lengths), int(ends[-1])
    size = data.ids_path.stat().st_size
    if size != end:
        raise DataError(
            data.ids_path,
            "does not fit its index: truncated or another file",
            got=f"{size:,} bytes",
            expected=f"{end:,} bytes",
            remedy=_REMEDY,
        )


def _blocks(path: Path, offset: int, dtype: np.dtype[Any], start: int, stop: int, at_once: int) -> Iterator[np.ndarray]:
    """Elements ``start`` to ``stop`` of the array that begins at byte ``offset`` of a file, some at a time."""
    with path.open("rb") as stream:
        stream.seek(offset + start * dtype.itemsize)
        while start < stop:
            size = min(at_once, stop - start)
            data = stream.read(size * dtype.itemsize)
            if len(data) < size * dtype.itemsize:
                raise DataError(
                    path, "is truncated", got=f"{path.stat().st_size:,} bytes",
                    expected=f"{offset + stop * dtype.itemsize:,} bytes or more", remedy=_REMEDY,
                )  # fmt: skip
            yield np.frombuffer(data, dtype=dtype)
            start += size
