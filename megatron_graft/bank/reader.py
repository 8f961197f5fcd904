"""Opening a bank: everything is checked against the manifest first, then rows are mapped and never loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_graft.bank.arrays import ArrayError, check_array, check_no_overlap
from megatron_graft.bank.extension import load_extension
from megatron_graft.bank.keys import UNUSED, BankKeys, check_keys, check_keys_distinct
from megatron_graft.bank.manifest import (
    COPY_AGAIN,
    KEYS_NAME,
    FileIdentity,
    Identity,
    Manifest,
    read_manifest,
    rows_name,
)
from megatron_graft.bank.tensorfile import TensorEntry, map_tensor, read_header
from megatron_graft.errors import BankError, BankFormatError, IdentityError
from megatron_graft.files import sha256_of_file
from megatron_graft.log import Progress

Depth = Literal["header", "full"]
GatherImplementation = Literal["native", "reference"]


class Bank:
    """An open bank; immutable. Get one from :func:`open_bank`.

    It does not look anything up: see ``megatron_graft.lookup``. It does not hold rows in memory: they are
    mapped, and a file that is cut short while a bank is open ends the process. Pickling one sends its path,
    not its rows.

    Attributes:
        path: the directory.
        manifest: all that ``bank.json`` says.
        digest: hex SHA-256 of the identity; equal digests mean equal answers.
        num_rows: N.
        row_dim: width of a row in elements, all donor layers side by side.
        orders: lengths of n-grams that occur, ascending; ``min_order`` and ``max_order`` are its ends.
        vocab_size: of the tokenizer; every id in a key is below it.
        eod: the tokenizer's end-of-document id; no key contains it.
        tokenizer_fingerprint: hex SHA-256.
        rows_by_layer: donor layer -> mapped uint16 ``[N, D]`` (bfloat16 bits), in column order; read-only.
        keys: the three arrays below, together.
        key_ids: int32 ``[N, max_order]``, right-aligned, -1 to the left of a shorter key; read-only.
        key_orders: uint8 ``[N]``; read-only.
        key_counts: int64 ``[N]``, occurrences in the corpus; read-only.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        keys: BankKeys,
        rows_by_layer: Mapping[int, np.ndarray],
        gather: GatherImplementation,
    ) -> None:
        identity = manifest.identity
        self.path = path
        self.manifest = manifest
        self.digest = manifest.digest
        self.num_rows = identity.num_rows
        self.row_dim = identity.row_dim
        self.orders = identity.orders
        self.min_order, self.max_order = identity.orders[0], identity.orders[-1]
        self.vocab_size = identity.tokenizer.vocab_size
        self.eod = identity.tokenizer.eod
        self.tokenizer_fingerprint = identity.tokenizer.fingerprint
        self.keys = keys
        self.key_ids = keys.key_ids
        self.key_orders = keys.key_orders
        self.key_counts = keys.key_counts
        self.rows_by_layer = rows_by_layer
        self._blocks = list(rows_by_layer.values())
        self._gather = gather

    def gather(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy rows by number, all donor layers side by side.

        Args:
            rows: int64 ``[M]`` row numbers; a negative one gives zeros.
            out: uint16 ``[M, row_dim]`` C-contiguous, filled with bfloat16 bits. Untouched if an error is
                raised.

        Raises:
            ArrayError: a wrong dtype, shape or layout, or a row number that the bank does not have.
            NativeExtensionError: the extension is not built and the bank was not opened with
                ``gather="reference"``.
        """
        check_array("rows", rows, dtypes=[np.int64], shape=(None,))
        check_array("out", out, dtypes=[np.uint16], shape=(len(rows), self.row_dim), writable=True)
        check_no_overlap("out", out, "rows", rows)
        if len(rows) and (highest := int(rows.max())) >= self.num_rows:
            expected = f"below {self.num_rows}"
            raise ArrayError("rows", "names a row that the bank does not have", got=highest, expected=expected)
        if self._gather == "native":
            load_extension().gather_rows(self._blocks, rows, out)
        else:
            _gather_reference(self._blocks, rows, out)

    def rows_of_keys(self) -> dict[tuple[int, ...], int]:
        """Every key (oldest token first) with its row, as plain Python values: for small banks and tests."""
        pairs = zip(self.key_ids.tolist(), self.key_orders.tolist(), strict=True)
        return {tuple(ids[len(ids) - order :]): row for row, (ids, order) in enumerate(pairs)}

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.path, self.digest, self._gather)


def open_bank(path: str | Path, verify: Depth = "header", *, gather: GatherImplementation = "native") -> Bank:
    """Open a bank directory.

    Args:
        path: the directory.
        verify: ``"header"`` checks the manifest and its digest, size and header of every file, and the keys;
            ``"full"`` also reads every byte and compares it with the digests, and checks that keys are
            distinct.
        gather: who copies rows: the compiled extension, or NumPy.

    Raises:
        BankError: there is no such directory.
        BankIncompleteError: it has no manifest.
        BankVersionError: it was written by a newer format version.
        BankFormatError: a file is missing, truncated, altered or malformed.
    """
    path = Path(path)
    if not path.is_dir():
        raise BankError(path, "is not a directory", expected="a bank directory", remedy="Check the path.")
    manifest = read_manifest(path)
    identity = manifest.identity
    headers = {file.name: _checked_header(path, file) for file in identity.files}
    keys = _open_keys(path / KEYS_NAME, headers[KEYS_NAME], identity)
    rows_by_layer = _open_rows(path, headers, identity)
    if verify == "full":
        _verify_digests(path, identity)
        check_keys_distinct(keys, path / KEYS_NAME)
    return Bank(path, manifest, keys, rows_by_layer, gather)


def _reopen(path: Path, digest: str, gather: GatherImplementation) -> Bank:
    bank = open_bank(path, gather=gather)
    if bank.digest != digest:
        raise IdentityError(path, "the bank was replaced while in use", got=bank.digest, expected=digest)
    return bank


def _checked_header(directory: Path, file: FileIdentity) -> dict[str, TensorEntry]:
    path = directory / file.name
    if not path.is_file():
        raise BankFormatError(path, "is missing", remedy=COPY_AGAIN)
    size = path.stat().st_size
    if size != file.bytes:
        raise BankFormatError(
            path,
            "is truncated or was altered",
            got=f"{size} bytes",
            expected=f"{file.bytes} bytes",
            remedy=COPY_AGAIN,
        )
    return read_header(path)


def _open_keys(path: Path, header: dict[str, TensorEntry], identity: Identity) -> BankKeys:
    num_rows = identity.num_rows
    wanted = {
        "key_counts": ("I64", (num_rows,)),
        "key_ids": ("I32", (num_rows, identity.orders[-1])),
        "key_orders": ("U8", (num_rows,)),
    }
    found = {name: (entry.dtype, entry.shape) for name, entry in header.items()}
    if found != wanted:
        raise BankFormatError(path, "does not hold the keys that the manifest describes", got=found, expected=wanted)
    keys = BankKeys(**{name: map_tensor(path, header[name]) for name in wanted})
    check_keys(keys, identity.tokenizer, identity.orders, path)
    return keys


def _open_rows(
    directory: Path, headers: dict[str, dict[str, TensorEntry]], identity: Identity
) -> dict[int, np.ndarray]:
    rows_by_layer = {}
    for layer in identity.donor.layers:
        path = directory / rows_name(layer)
        entry = headers[path.name].get("rows")
        expected = f"one BF16 matrix 'rows' of {identity.num_rows} rows"
        if len(headers[path.name]) != 1 or entry is None or entry.dtype != "BF16" or len(entry.shape) != 2:
            raise BankFormatError(path, "does not hold rows", got=headers[path.name], expected=expected)
        if entry.shape[0] != identity.num_rows or entry.shape[1] == 0:
            raise BankFormatError(path, "has rows of the wrong shape", got=list(entry.shape), expected=expected)
        rows_by_layer[layer] = map_tensor(path, entry)
    width = sum(rows.shape[1] for rows in rows_by_layer.values())
    if width != identity.row_dim:
        raise BankFormatError(directory, "has rows of the wrong width", got=width, expected=identity.row_dim)
    return rows_by_layer


def _verify_digests(directory: Path, identity: Identity) -> None:
    progress = Progress(f"verify {directory}", sum(file.bytes for file in identity.files), "bytes")
    for file in identity.files:
        found = sha256_of_file(directory / file.name)
        if found != file.sha256:
            raise BankFormatError(
                directory / file.name,
                "was altered: its bytes do not have the digest in the manifest",
                got=found,
                expected=file.sha256,
                remedy=COPY_AGAIN,
            )
        progress.advance(file.bytes)


def _gather_reference(blocks: list[np.ndarray], rows: np.ndarray, out: np.ndarray) -> None:
    hit = rows > UNUSED
    column = 0
    for block in blocks:
        width = block.shape[1]
        out[:, column : column + width] = 0
        out[hit, column : column + width] = block[rows[hit]]
        column += width
