"""The file ``index.qbt``: made from the keys when a bank is written, checked against them when one is opened.

What is inside is the business of the compiled extension; looking things up is that of ``megatron_graft.lookup``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.bank.extension import load_extension
from megatron_graft.bank.keys import BankKeys
from megatron_graft.bank.manifest import COPY_AGAIN, INDEX_NAME, KEYS_NAME, Identity, IndexFile
from megatron_graft.errors import BankFormatError
from megatron_graft.files import sha256_of_file
from megatron_graft.log import Progress

_MEMORY_BYTES = 1 << 30
_OTHER_KEYS = "Name each key once; where they are too many, keep fewer: a higher --min-count, a smaller --num-rows."


def build_index_file(
    directory: Path, keys: BankKeys, vocab_size: int, *, fingerprint: str, keys_sha256: str, threads: int, where: object
) -> IndexFile:
    """Write the index of ``keys`` into a bank's directory and describe it.

    Args:
        directory: where the index goes.
        keys: checked; they need not have been checked to be distinct.
        vocab_size: of their tokenizer.
        fingerprint: the tokenizer's, hex SHA-256.
        keys_sha256: of the bank's file of keys, hex.
        threads: for the build; the bytes do not depend on it.
        where: what to name in an error about the keys.

    Raises:
        BankFormatError: the same key is there twice, or there are too many.
        ConfigError: so many threads cannot be started.
        NativeExtensionError: the extension is not built.
    """
    progress = Progress(f"index {where}", len(keys.key_orders), "entries")

    def report(done: int, total: int) -> None:
        progress.total = total
        progress.advance(done - progress.done)

    path = directory / INDEX_NAME
    try:
        built = load_extension().build_index(
            os.fsencode(path),
            np.ascontiguousarray(keys.key_ids),
            np.ascontiguousarray(keys.key_orders),
            vocab_size,
            bytes.fromhex(fingerprint),
            bytes.fromhex(keys_sha256),
            threads,
            _MEMORY_BYTES,
            report,
        )
    except ValueError as error:
        raise BankFormatError(where, str(error), remedy=_OTHER_KEYS) from error
    size, digest = path.stat().st_size, sha256_of_file(path)
    return IndexFile(name=INDEX_NAME, bytes=size, sha256=digest, phantoms=built["phantoms"])


def read_index_header(path: Path) -> dict[str, Any]:
    """What the header of an index says, all of it checked against itself and the size of the file.

    Raises:
        BankFormatError: the file is truncated, altered or malformed.
        NativeExtensionError: the extension is not built.
    """
    with _reading(path):
        header: dict[str, Any] = load_extension().read_index_header(os.fsencode(path))
    return header


def check_index_header(path: Path, identity: Identity, index: IndexFile) -> None:
    """Refuse an index that does not belong to a bank's keys.

    Raises:
        BankFormatError: naming the first property that differs. ``NativeExtensionError`` if the extension is not
            built.
    """
    header = read_index_header(path)
    keys = next(file for file in identity.files if file.name == KEYS_NAME)
    wanted = {
        "keys_sha256": bytes.fromhex(keys.sha256),
        "tokenizer_sha256": bytes.fromhex(identity.tokenizer.fingerprint),
        "vocab_size": identity.tokenizer.vocab_size,
        "min_order": identity.orders[0],
        "max_order": identity.orders[-1],
        "rows": identity.num_rows,
        "phantoms": index.phantoms,
    }
    for name, value in wanted.items():
        if header[name] != value:
            got, expected = (item.hex() if isinstance(item, bytes) else item for item in (header[name], value))
            raise BankFormatError(
                path,
                f"is the index of another bank: its {name} differs",
                got=got,
                expected=expected,
                remedy=COPY_AGAIN,
            )


class KeyFinder:
    """Looks up a bank's own keys in its index.

    Args:
        path: the index.
        num_rows: N.
        threads: for one lookup.

    Raises:
        BankFormatError: the file is malformed. ``NativeExtensionError`` if the extension is not built.
        ConfigError: so many threads cannot be started.
    """

    def __init__(self, path: Path, num_rows: int, threads: int) -> None:
        self._path = path
        with _reading(path):
            self._index = load_extension().SuffixIndex(os.fsencode(path), num_rows, "file", "auto", threads)

    def check(self, keys: BankKeys, span: tuple[int, int]) -> None:
        """Check that the keys of rows ``span[0]`` to ``span[1]`` are found, each at its own row.

        The padding to the left of a shorter key is in no n-gram, so every key is a sequence whose last position has
        that key as its longest match.

        Raises:
            BankFormatError: naming the first row that is not.
        """
        sequences = np.ascontiguousarray(keys.key_ids[slice(*span)])
        rows, orders = np.empty(sequences.shape, np.int64), np.empty(sequences.shape, np.uint8)
        self._index.lookup(sequences, None, None, rows, orders)
        wrong = (rows[:, -1] != np.arange(*span)) | (orders[:, -1] != keys.key_orders[slice(*span)])
        if wrong.any():
            place = int(np.flatnonzero(wrong)[0])
            raise BankFormatError(
                self._path,
                f"does not lead to row {span[0] + place} from its key: index or keys were altered",
                got=int(rows[place, -1]),
                remedy=COPY_AGAIN,
            )

    def check_contents(self, entries: int, rows: int) -> None:
        """Check that the index holds so many entries, of which so many are rows. Reads the whole file.

        Raises:
            BankFormatError: they do not.
        """
        by_section, found_rows = self._index.count_contents()
        for what, found, expected in (("entries", sum(by_section), entries), ("rows", found_rows, rows)):
            if found != expected:
                raise BankFormatError(
                    self._path, f"has a wrong number of {what}", got=found, expected=expected, remedy=COPY_AGAIN
                )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What the extension says of a file that it cannot read, as this package's error."""
    try:
        yield
    except OSError as error:
        raise BankFormatError(path, "cannot be read", got=error.strerror) from error
    except (ValueError, RuntimeError) as error:
        raise BankFormatError(path, f"is no sound index: {error}", remedy=COPY_AGAIN) from error
