"""Opening a bank: its headers are checked against the manifest, then keys and rows are mapped and never loaded.

An open costs the same whatever the size of the bank. What its bytes hold is checked on request: see :func:`open_bank`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import numpy as np

from megatron_graft.bank.arrays import ArrayError, check_array, check_choice, check_no_overlap, check_threads
from megatron_graft.bank.index_file import check_index_header
from megatron_graft.bank.keys import BankKeys
from megatron_graft.bank.manifest import (
    COPY_AGAIN,
    KEYS_NAME,
    FileIdentity,
    Identity,
    Manifest,
    read_manifest,
)
from megatron_graft.bank.row_layout import ROW_DTYPES, Columns, RowLayout
from megatron_graft.bank.rows import GatherImplementation, LayerRows, RowGatherer, open_rows
from megatron_graft.bank.tensorfile import TensorEntry, map_tensor, read_header
from megatron_graft.bank.verify import Depth, check_scales, verify_full, verify_sample
from megatron_graft.errors import BankError, BankFormatError, ConfigError, IdentityError


class Bank:
    """An open bank; immutable. Get one from :func:`open_bank`.

    It does not look anything up: see ``megatron_graft.lookup``. It does not hold keys or rows in memory: they are
    mapped, and a file that is cut short while a bank is open ends the process. Pickling one sends its path,
    not its contents.

    Attributes:
        path: the directory.
        index_path: the index file in it.
        manifest: all that ``bank.json`` says, of the whole bank.
        digest: hex SHA-256; equal digests mean equal answers. The identity's digest, or one of it and ``num_rows``
            if the bank was opened with fewer rows than it has.
        num_rows: N, as many as were asked for.
        row_dim: width of a row in elements, all donor layers side by side.
        row_layout: what a gathered row has where; ``row_bytes`` are its bytes, ``layer_widths`` the elements from each
            donor layer.
        orders: lengths of n-grams that occur in the whole bank, ascending; ``min_order`` and ``max_order`` are its
            ends.
        vocab_size: of the tokenizer; every id in a key is below it.
        eod: the tokenizer's end-of-document id; no key contains it.
        tokenizer_fingerprint: hex SHA-256.
        rows_by_layer: donor layer -> its mapped shards, of all rows the bank has, in column order; read-only.
        keys: the three arrays below, together. Unless the bank was verified in full they may hold anything.
        key_ids: int32 ``[N, max_order]``, right-aligned, -1 to the left of a shorter key; read-only.
        key_orders: uint8 ``[N]``; read-only.
        key_counts: int64 ``[N]``, occurrences in the corpus; read-only.
        gather_implementation: who copies rows.
        threads: of one gather.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        keys: BankKeys,
        rows_by_layer: Mapping[int, LayerRows],
        *,
        num_rows: int,
        gather: GatherImplementation,
        threads: int,
    ) -> None:
        identity = manifest.identity
        self.path, self.index_path = path, path / manifest.index.name
        self.manifest = manifest
        self.digest = manifest.digest_of_rows(num_rows)
        self.num_rows = num_rows
        self.row_dim = identity.row_dim
        self.orders = identity.orders
        self.min_order, self.max_order = identity.orders[0], identity.orders[-1]
        self.vocab_size = identity.tokenizer.vocab_size
        self.eod = identity.tokenizer.eod
        self.tokenizer_fingerprint = identity.tokenizer.fingerprint
        self.keys = BankKeys(
            key_ids=keys.key_ids[:num_rows],
            key_orders=keys.key_orders[:num_rows],
            key_counts=keys.key_counts[:num_rows],
        )
        self.key_ids, self.key_orders = self.keys.key_ids, self.keys.key_orders
        self.key_counts = self.keys.key_counts
        self.rows_by_layer = rows_by_layer
        self.layer_widths = tuple(rows.width for rows in rows_by_layer.values())
        self.row_layout = RowLayout(dtype=ROW_DTYPES[identity.row_dtype], widths=self.layer_widths)
        self.row_bytes = self.row_layout.row_bytes()
        self.gather_implementation = gather
        self.threads = threads
        self._gatherer = RowGatherer(list(rows_by_layer.values()), self.row_layout, gather, threads)

    def bytes_of_row(self, columns: Columns | None = None) -> int:
        """Bytes that :meth:`gather` writes for a row; ``row_bytes`` for None."""
        return self.row_layout.row_bytes(columns)

    def gather(self, rows: np.ndarray, out: np.ndarray, columns: Columns | None = None) -> None:
        """Copy rows by number, as they are stored.

        A row in ``out`` is the elements of all donor layers side by side, zeros up to a multiple of 4 bytes and, for
        int8 and float8 rows, one float32 scale for every donor layer.

        Args:
            rows: int64 ``[M]`` row numbers; a negative one gives zero bytes.
            out: uint8 ``[M, bytes_of_row(columns)]`` C-contiguous. Untouched if an error is raised.
            columns: (first, end): only these of a row's ``row_dim`` elements; all scales come along.

        Raises:
            ArrayError: a wrong dtype, shape or layout, columns that a row does not have, or a row number that the bank
                does not have.
            ConfigError: the bank's threads cannot be started.
            NativeExtensionError: the extension is not built and the bank was not opened with
                ``gather="reference"``.
        """
        check_array("rows", rows, dtypes=[np.int64], shape=(None,))
        check_array("out", out, dtypes=[np.uint8], shape=(len(rows), self.bytes_of_row(columns)), writable=True)
        check_no_overlap("out", out, "rows", rows)
        if len(rows) and (highest := int(rows.max())) >= self.num_rows:
            expected = f"below {self.num_rows}"
            raise ArrayError("rows", "names a row that the bank does not have", got=highest, expected=expected)
        self._gatherer.gather(rows, out, columns)

    def float_rows(self, rows: np.ndarray, columns: Columns | None = None) -> np.ndarray:
        """The values of rows: for tools and tests; a consumer takes the bytes and does this on its device.

        Args:
            rows: int64 ``[M]``; a negative one gives zeros.
            columns: as in :meth:`gather`.

        Returns:
            float32 ``[M, row_dim]``, or as many columns as were asked for. A scaled value is rounded once.
        """
        check_array("rows", rows, dtypes=[np.int64], shape=(None,))
        packed = np.empty((len(rows), self.bytes_of_row(columns)), dtype=np.uint8)
        self.gather(rows, packed, columns)
        return self.row_layout.values(packed, columns)

    def rows_of_keys(self) -> dict[tuple[int, ...], int]:
        """Every key (oldest token first) with its row, as plain Python values: for small banks and tests."""
        pairs = zip(self.key_ids.tolist(), self.key_orders.tolist(), strict=True)
        return {tuple(ids[len(ids) - order :]): row for row, (ids, order) in enumerate(pairs)}

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.path, self.digest, self.num_rows, self.gather_implementation, self.threads)


def open_bank(
    path: str | Path,
    verify: Depth = "header",
    *,
    rows: int | None = None,
    gather: GatherImplementation = "native",
    threads: int = 1,
) -> Bank:
    """Open a bank directory.

    Args:
        path: the directory.
        verify: ``"header"`` checks the manifest and its digest, the size and header of every file, and that the index
            was made from these keys; it reads no key and no row. ``"sample"`` also checks some thousand keys, always
            the same ones, and looks them up in the index. ``"full"`` reads every byte and compares it with the
            digests, checks every key and finds every key at its row.
        rows: open the bank of its so many most frequent keys: what it answers is what that bank would answer.
        gather: who copies rows: the compiled extension, or NumPy. With ``"reference"`` nothing needs the extension;
            the index is then checked for its size and, by ``"full"``, its digest only.
        threads: of one gather, and of the lookups of ``verify``.

    Raises:
        BankError: there is no such directory.
        BankIncompleteError: it has no manifest.
        BankVersionError: it was written in another format version.
        BankFormatError: a file is missing, truncated, altered or malformed.
        ConfigError: ``rows`` or ``threads`` is out of range, or ``verify`` or ``gather`` is unknown.
        NativeExtensionError: the extension is not built and ``gather`` is not ``"reference"``.
    """
    path = Path(path)
    check_choice("verify", verify, get_args(Depth))
    check_choice("gather", gather, get_args(GatherImplementation))
    if not os.path.isdir(path):  # False, unlike Path.is_dir(), also where nobody may look
        raise BankError(path, "is not a directory", expected="a bank directory", remedy="Check the path.")
    manifest = read_manifest(path)
    identity = manifest.identity
    if rows is not None and not 1 <= rows <= identity.num_rows:
        raise ConfigError(f"rows of {path}", "are not in this bank", got=rows, expected=f"1 to {identity.num_rows}")
    check_threads(threads)
    headers = {file.name: _checked_header(path, file) for file in identity.files}
    check_size(path, manifest.index)
    use_index = gather == "native"
    if use_index:
        check_index_header(path / manifest.index.name, identity, manifest.index)
    keys = _open_keys(path / KEYS_NAME, headers[KEYS_NAME], identity)
    rows_by_layer = open_rows(path, headers, identity)
    if verify == "sample":
        verify_sample(path, manifest, keys, use_index=use_index, threads=threads)
    if verify == "full":
        verify_full(path, manifest, keys, use_index=use_index, threads=threads)
        check_scales(path, identity, rows_by_layer)
    num_rows = identity.num_rows if rows is None else rows
    return Bank(path, manifest, keys, rows_by_layer, num_rows=num_rows, gather=gather, threads=threads)


def check_size(directory: Path, file: FileIdentity) -> None:
    """Refuse a file that is missing or not as long as the manifest says.

    Raises:
        BankFormatError: naming it.
    """
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


def _reopen(path: Path, digest: str, num_rows: int, gather: GatherImplementation, threads: int) -> Bank:
    bank = open_bank(path, gather=gather, threads=threads)
    if num_rows < bank.num_rows:
        bank = open_bank(path, rows=num_rows, gather=gather, threads=threads)
    if bank.digest != digest:
        raise IdentityError(path, "the bank was replaced while in use", got=bank.digest, expected=digest)
    return bank


def _checked_header(directory: Path, file: FileIdentity) -> dict[str, TensorEntry]:
    check_size(directory, file)
    return read_header(directory / file.name)


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
    return BankKeys(**{name: map_tensor(path, header[name]) for name in wanted})
