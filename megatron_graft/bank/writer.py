"""Writing a bank: first the checks, then all files in a scratch directory, then one rename."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.bank.arrays import ArrayError, check_array
from megatron_graft.bank.fields import Fields
from megatron_graft.bank.keys import BankKeys, check_keys, check_keys_distinct
from megatron_graft.bank.manifest import (
    KEYS_NAME,
    MANIFEST_NAME,
    ROW_DTYPE,
    Control,
    DonorIdentity,
    FileIdentity,
    Identity,
    Manifest,
    Processing,
    TokenizerIdentity,
    rows_name,
)
from megatron_graft.bank.tensorfile import write_tensors
from megatron_graft.errors import BankError
from megatron_graft.files import directory_in_one_step
from megatron_graft.log import Progress


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
) -> Manifest:
    """Write a bank directory; it appears complete or not at all.

    Args:
        path: the directory to create; must not exist.
        keys: N keys in :func:`~megatron_graft.bank.keys.canonical_order`. Columns that no key uses are
            dropped.
        layers: donor layer -> uint16 ``[N, D]`` rows as bfloat16 bits, C-contiguous; exactly
            ``donor.layers``.
        tokenizer: whose ids the keys are made of.
        donor: where the rows come from.
        processing: what was done to the rows.
        control: set for a control bank.
        provenance: anything JSON can hold that is worth knowing and changes no result.

    Returns:
        the manifest, as read back from what would be opened.

    Raises:
        BankError: ``path`` exists, or the keys or rows are at odds with one another or with the identity.
        ArrayError: an array has the wrong dtype, shape or layout.
        StorageError: the file system refused the write. Nothing is left behind.
    """
    path = Path(path)
    if path.exists():
        raise BankError(path, "already exists", remedy="Remove it or choose another directory.")
    _check_part("tokenizer", tokenizer)
    _check_part("donor", donor)
    _check_part("processing", processing)
    _check_part("control", control)
    keys, orders = _check_keys(path, keys, tokenizer)
    num_rows = len(keys.key_orders)
    _check_rows(layers, donor, num_rows)
    with directory_in_one_step(path) as scratch:
        files = _write_files(scratch, path.name, keys, [(layer, layers[layer]) for layer in donor.layers])
        identity = Identity(
            tokenizer=tokenizer,
            orders=orders,
            num_rows=num_rows,
            row_dim=sum(rows.shape[1] for rows in layers.values()),
            row_dtype=ROW_DTYPE,
            processing=processing,
            control=control,
            donor=donor,
            files=files,
        )
        manifest = Manifest(identity=identity, digest=identity.digest(), provenance=provenance)
        # The rest of what a reader would refuse is refused here, while nothing has been published yet.
        manifest = Manifest.from_json(manifest.to_json(), str(path / MANIFEST_NAME))
        text = json.dumps(manifest.to_json(), indent=2, ensure_ascii=False) + "\n"
        (scratch / MANIFEST_NAME).write_bytes(text.encode())
    return manifest


def _check_part(name: str, part: TokenizerIdentity | DonorIdentity | Processing | Control | None) -> None:
    """Refuse now, before rows are written, what a reader would refuse in the manifest."""
    if part is not None:
        part.from_fields(Fields(json.loads(json.dumps(asdict(part))), name))


def _check_keys(path: Path, keys: BankKeys, tokenizer: TokenizerIdentity) -> tuple[BankKeys, tuple[int, ...]]:
    """Check the keys and drop columns that none uses; return them with the orders that occur."""
    check_array("key_orders", keys.key_orders, dtypes=[np.uint8], shape=(None,))
    orders = tuple(np.unique(keys.key_orders).tolist())
    if not orders or orders[0] == 0:
        raise BankError(path, "would hold no key" if not orders else "would hold a key of no tokens")
    check_keys(keys, tokenizer, orders, f"keys of {path}")
    check_keys_distinct(keys, f"keys of {path}")
    key_ids = np.ascontiguousarray(keys.key_ids[:, keys.key_ids.shape[1] - orders[-1] :])
    return BankKeys(key_ids=key_ids, key_orders=keys.key_orders, key_counts=keys.key_counts), orders


def _check_rows(layers: Mapping[int, np.ndarray], donor: DonorIdentity, num_rows: int) -> None:
    if set(layers) != set(donor.layers):
        raise ArrayError("layers", "are not the donor's layers", got=sorted(layers), expected=list(donor.layers))
    for layer, rows in layers.items():
        check_array(f"layers[{layer}]", rows, dtypes=[np.uint16], shape=(num_rows, None))


def _write_files(
    scratch: Path, name: str, keys: BankKeys, layers: list[tuple[int, np.ndarray]]
) -> tuple[FileIdentity, ...]:
    tensors: dict[str, dict[str, tuple[str, np.ndarray]]] = {
        KEYS_NAME: {
            "key_counts": ("I64", keys.key_counts),
            "key_ids": ("I32", keys.key_ids),
            "key_orders": ("U8", keys.key_orders),
        },
        **{rows_name(layer): {"rows": ("BF16", rows)} for layer, rows in layers},
    }
    total = sum(array.nbytes for file in tensors.values() for _, array in file.values())
    progress = Progress(f"write {name}", total, "bytes")
    files = []
    for file_name, contents in tensors.items():
        size, digest = write_tensors(scratch / file_name, contents, progress.advance)
        files.append(FileIdentity(name=file_name, bytes=size, sha256=digest))
    return tuple(files)
