"""Writing a bank: first the checks, then all files in a scratch directory, then one rename."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.bank.arrays import ArrayError, check_array, check_threads
from megatron_graft.bank.fields import Fields
from megatron_graft.bank.index_file import build_index_file
from megatron_graft.bank.keys import BankKeys, check_keys
from megatron_graft.bank.manifest import (
    KEYS_NAME,
    MANIFEST_NAME,
    MAX_ORDER,
    MAX_SHARDS,
    Control,
    DonorIdentity,
    FileIdentity,
    Identity,
    Manifest,
    Processing,
    TokenizerIdentity,
    rows_name,
)
from megatron_graft.bank.row_layout import ROW_DTYPES, WORD_BYTES, RowDtype
from megatron_graft.bank.tensorfile import write_tensors
from megatron_graft.errors import BankError, ConfigError
from megatron_graft.files import directory_in_one_step
from megatron_graft.log import Progress

_SHARD_BYTES = 1 << 32


def write_bank(
    path: str | Path,
    *,
    keys: BankKeys,
    layers: Mapping[int, np.ndarray],
    tokenizer: TokenizerIdentity,
    donor: DonorIdentity,
    processing: Processing,
    control: Control | None,
    provenance: Mapping[str, Any],
    row_dtype: str = "bfloat16",
    scales: Mapping[int, np.ndarray] | None = None,
    shard_rows: int | None = None,
    threads: int = 1,
) -> Manifest:
    """Write a bank directory; it appears complete or not at all.

    Args:
        path: the directory to create; must not exist.
        keys: N keys in :func:`~megatron_graft.bank.keys.canonical_order`. Columns that no key uses are
            dropped.
        layers: donor layer -> ``[N, D]`` rows, C-contiguous, as the row dtype is held in NumPy (bfloat16 as its bits
            in uint16, float8 as its bits in uint8); exactly ``donor.layers``.
        tokenizer: whose ids the keys are made of.
        donor: where the rows come from.
        processing: what was done to the rows.
        control: set for a control bank.
        provenance: anything JSON can hold that is worth knowing and changes no result.
        row_dtype: one of :data:`~megatron_graft.bank.row_layout.ROW_DTYPES`.
        scales: donor layer -> float32 ``[N]``; for int8 and float8 rows, and for those only.
        shard_rows: most rows of one file; None for as many as fit in 4 GiB.
        threads: to build the index with. The bytes do not depend on it.

    Returns:
        the manifest, as read back from what would be opened.

    Raises:
        BankError: ``path`` exists, or the keys or rows are at odds with one another or with the identity.
        ArrayError: an array has the wrong dtype, shape or layout.
        ConfigError: ``row_dtype``, ``shard_rows`` or ``threads`` is out of range, or so many cannot be started.
        StorageError: the file system refused the write. Nothing is left behind.
        NativeExtensionError: the extension is not built.
    """
    path = Path(path)
    if os.path.exists(path):  # False, unlike Path.exists(), where nobody may look: then writing says so
        raise BankError(path, "already exists", remedy="Remove it or choose another directory.")
    _check_part("tokenizer", tokenizer)
    _check_part("donor", donor)
    _check_part("processing", processing)
    _check_part("control", control)
    _check_settings(row_dtype, shard_rows, threads)
    keys, orders = _check_keys(path, keys, tokenizer)
    dtype = ROW_DTYPES[row_dtype]
    tensors = _checked_tensors(layers, scales or {}, donor, dtype, len(keys.key_orders))
    row_files = _row_files(tensors, shard_rows or _rows_that_fit(tensors))
    with directory_in_one_step(path) as scratch:
        progress = Progress(f"write {path.name}", _bytes_of(keys, tensors), "bytes")
        key_file = _write_file(scratch, KEYS_NAME, _key_tensors(keys), progress)
        index = build_index_file(
            scratch, keys, tokenizer.vocab_size,
            fingerprint=tokenizer.fingerprint, keys_sha256=key_file.sha256, threads=threads, where=f"keys of {path}",
        )  # fmt: skip
        files = (key_file, *(_write_file(scratch, name, contents, progress) for name, contents in row_files.items()))
        identity = Identity(
            tokenizer=tokenizer,
            orders=orders,
            num_rows=len(keys.key_orders),
            row_dim=sum(rows.shape[1] for rows in layers.values()),
            row_dtype=row_dtype,
            processing=processing,
            control=control,
            donor=donor,
            files=files,
        )
        manifest = Manifest(identity=identity, digest=identity.digest(), index=index, provenance=provenance)
        # The rest of what a reader would refuse is refused here, while nothing has been published yet.
        manifest = Manifest.from_json(manifest.to_json(), str(path / MANIFEST_NAME))
        text = json.dumps(manifest.to_json(), indent=2, ensure_ascii=False) + "\n"
        (scratch / MANIFEST_NAME).write_bytes(text.encode())
    return manifest


def _check_part(name: str, part: TokenizerIdentity | DonorIdentity | Processing | Control | None) -> None:
    """Refuse now, before rows are written, what a reader would refuse in the manifest."""
    if part is not None:
        part.from_fields(Fields(json.loads(json.dumps(asdict(part))), name))


def _check_settings(row_dtype: str, shard_rows: int | None, threads: int) -> None:
    if row_dtype not in ROW_DTYPES:
        raise ConfigError("row_dtype", "is unknown", got=row_dtype, expected=", ".join(ROW_DTYPES))
    if shard_rows is not None and shard_rows < 1:
        raise ConfigError("shard_rows", "is too small", got=shard_rows, expected="at least 1")
    check_threads(threads)


def _check_keys(path: Path, keys: BankKeys, tokenizer: TokenizerIdentity) -> tuple[BankKeys, tuple[int, ...]]:
    """Check the keys and drop columns that none uses; return them with the orders that occur.

    That they are distinct is found by the index, which is built before any row is written.
    """
    check_array("key_orders", keys.key_orders, dtypes=[np.uint8], shape=(None,))
    orders = tuple(np.unique(keys.key_orders).tolist())
    if not orders or orders[0] == 0:
        raise BankError(path, "would hold no key" if not orders else "would hold a key of no tokens")
    if orders[-1] > MAX_ORDER:
        raise BankError(path, "would hold a key of too many tokens", got=orders[-1], expected=f"at most {MAX_ORDER}")
    check_keys(keys, tokenizer, orders, f"keys of {path}")
    key_ids = np.ascontiguousarray(keys.key_ids[:, keys.key_ids.shape[1] - orders[-1] :])
    return BankKeys(key_ids=key_ids, key_orders=keys.key_orders, key_counts=keys.key_counts), orders


def _checked_tensors(
    layers: Mapping[int, np.ndarray],
    scales: Mapping[int, np.ndarray],
    donor: DonorIdentity,
    dtype: RowDtype,
    num_rows: int,
) -> dict[int, dict[str, tuple[str, np.ndarray]]]:
    """Donor layer, in column order -> tensor name -> (format dtype, array): what its files hold, not yet cut."""
    if set(layers) != set(donor.layers):
        raise ArrayError("layers", "are not the donor's layers", got=sorted(layers), expected=list(donor.layers))
    scaled = set(donor.layers) if dtype.scaled else set()
    if set(scales) != scaled:
        expected = sorted(scaled) if scaled else f"none with {dtype.name}"
        raise ArrayError("scales", "are not those of the layers", got=sorted(scales), expected=expected)
    tensors: dict[int, dict[str, tuple[str, np.ndarray]]] = {}
    for layer in donor.layers:
        rows = check_array(f"layers[{layer}]", layers[layer], dtypes=[dtype.numpy], shape=(num_rows, None))
        tensors[layer] = {"rows": (dtype.tensor, rows)}
        if dtype.scaled:
            scale = check_array(f"scales[{layer}]", scales[layer], dtypes=[np.float32], shape=(num_rows,))
            if not (np.isfinite(scale) & (scale >= 0)).all():
                raise ArrayError(f"scales[{layer}]", "are not all finite and at least 0")
            tensors[layer]["scales"] = ("F32", scale)
    return tensors


def _rows_that_fit(tensors: Mapping[int, Mapping[str, tuple[str, np.ndarray]]]) -> int:
    """Rows of the widest layer in one file of the default size."""
    widest = max(sum(array[:1].nbytes for _, array in layer.values()) for layer in tensors.values())
    return max(1, _SHARD_BYTES // max(1, widest))


def _row_files(
    tensors: Mapping[int, Mapping[str, tuple[str, np.ndarray]]], shard_rows: int
) -> dict[str, dict[str, tuple[str, np.ndarray]]]:
    """File name -> its tensors, layer by layer and shard by shard."""
    num_rows = len(next(iter(tensors.values()))["rows"][1])
    shards = -(-num_rows // shard_rows)
    if shards > MAX_SHARDS:
        raise ConfigError("shard_rows", "makes too many files", got=shards, expected=f"at most {MAX_SHARDS} a layer")
    files = {}
    for layer, contents in tensors.items():
        for shard in range(shards):
            span = slice(shard * shard_rows, (shard + 1) * shard_rows)
            cut = {name: (dtype, array[span]) for name, (dtype, array) in contents.items()}
            files[rows_name(layer, shard, shards)] = _in_aligned_order(cut)
    return files


def _in_aligned_order(tensors: dict[str, tuple[str, np.ndarray]]) -> dict[str, tuple[str, np.ndarray]]:
    """Rows first, on a page, unless scales behind them would not be aligned."""
    if tensors["rows"][1].nbytes % WORD_BYTES == 0:
        return tensors
    return dict(reversed(tensors.items()))


def _key_tensors(keys: BankKeys) -> dict[str, tuple[str, np.ndarray]]:
    return {
        "key_counts": ("I64", keys.key_counts),
        "key_ids": ("I32", keys.key_ids),
        "key_orders": ("U8", keys.key_orders),
    }


def _bytes_of(keys: BankKeys, tensors: Mapping[int, Mapping[str, tuple[str, np.ndarray]]]) -> int:
    everything = [_key_tensors(keys), *tensors.values()]
    return sum(array.nbytes for contents in everything for _, array in contents.values())


def _write_file(
    scratch: Path, name: str, contents: Mapping[str, tuple[str, np.ndarray]], progress: Progress
) -> FileIdentity:
    size, digest = write_tensors(scratch / name, contents, progress.advance)
    return FileIdentity(name=name, bytes=size, sha256=digest)
