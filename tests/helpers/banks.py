"""Small banks for tests: keys given as plain tuples, rows drawn from a seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.bank.fields import Fields
from megatron_graft.bank.keys import UNUSED, BankKeys, canonical_order
from megatron_graft.bank.manifest import (
    KEYS_NAME,
    MANIFEST_NAME,
    Control,
    DonorIdentity,
    Identity,
    Processing,
    TokenizerIdentity,
)
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.bank.row_layout import ROW_DTYPES
from megatron_graft.bank.tensorfile import write_tensors
from megatron_graft.bank.writer import write_bank
from megatron_graft.data.tokenizer import load_tokenizer
from megatron_graft.files import sha256_of_file

Key = tuple[int, ...]
EOD = 0


def keys_of(counts: Mapping[Key, int]) -> BankKeys:
    """Keys (oldest token first) with their counts, in a bank's order."""
    width = max(map(len, counts))
    ids = np.full((len(counts), width), UNUSED, dtype=np.int32)
    for row, key in enumerate(counts):
        ids[row, width - len(key) :] = key
    orders = np.array([len(key) for key in counts], dtype=np.uint8)
    keys = BankKeys(key_ids=ids, key_orders=orders, key_counts=np.array(list(counts.values()), dtype=np.int64))
    order = canonical_order(keys)
    return BankKeys(key_ids=ids[order], key_orders=orders[order], key_counts=keys.key_counts[order])


def random_counts(num_keys: int, seed: int, *, vocab_size: int = 50, max_order: int = 4) -> dict[Key, int]:
    """Distinct keys of ids from 1 on, many of them suffixes of others, with counts that repeat."""
    generator = np.random.default_rng(seed)
    counts: dict[Key, int] = {}
    while len(counts) < num_keys:
        text = generator.integers(1, vocab_size, max_order).tolist()
        for length in range(int(generator.integers(1, max_order + 1)), max_order + 1):
            counts[tuple(text[-length:])] = int(generator.integers(1, 20))
    return dict(list(counts.items())[:num_keys])


def tokenizer_identity(vocab_size: int = 50, eod: int = EOD) -> TokenizerIdentity:
    return TokenizerIdentity(fingerprint="f0" * 32, vocab_size=vocab_size, eod=eod)


def donor_identity(layers: Sequence[int] = (12,), hidden_size: int = 4) -> DonorIdentity:
    return DonorIdentity(name="donor", revision="d0" * 32, layers=tuple(layers), hidden_size=hidden_size)


def random_rows(num_rows: int, width: int, seed: int = 0, row_dtype: str = "bfloat16") -> np.ndarray:
    """``[N, D]`` as the row dtype is held in NumPy: any bits at all."""
    kind = ROW_DTYPES[row_dtype].numpy
    size = num_rows * width * np.dtype(kind).itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(size), dtype=kind).reshape(num_rows, width).copy()


def random_scales(num_rows: int, seed: int = 0) -> np.ndarray:
    """float32 ``[N]`` between 0 and 1."""
    return np.random.default_rng(1000 + seed).random(num_rows, dtype=np.float32)


def bank_arguments(
    counts: Mapping[Key, int],
    *,
    vocab_size: int = 50,
    eod: int = EOD,
    layers: Sequence[int] = (12,),
    width: int = 4,
    control: Control | None = None,
    seed: int = 0,
    row_dtype: str = "bfloat16",
    shard_rows: int | None = None,
) -> dict[str, object]:
    """The keyword arguments of ``write_bank`` for a small bank."""
    scaled = ROW_DTYPES[row_dtype].scaled
    return {
        "keys": keys_of(counts),
        "layers": {layer: random_rows(len(counts), width, seed + layer, row_dtype) for layer in layers},
        "scales": {layer: random_scales(len(counts), seed + layer) for layer in layers} if scaled else None,
        "tokenizer": tokenizer_identity(vocab_size, eod),
        "donor": donor_identity(layers, width),
        "processing": Processing(centred=True, normalised=True),
        "control": control,
        "provenance": {"made_by": "a test"},
        "row_dtype": row_dtype,
        "shard_rows": shard_rows,
    }


def make_bank(path: Path, counts: Mapping[Key, int], **settings: object) -> Bank:
    """Write a small bank and open it; ``settings`` as :func:`bank_arguments`."""
    write_bank(path, **bank_arguments(counts, **settings))  # type: ignore[arg-type]
    return open_bank(path)


def fitting_bank(path: Path, tokenizer_file: Path, counts: Mapping[Key, int], **settings: object) -> Path:
    """Write a small bank of a real tokenizer, as a run that has this tokenizer accepts; ``settings`` as above."""
    tokenizer = load_tokenizer(tokenizer_file)
    arguments = bank_arguments(counts, **settings)  # type: ignore[arg-type]
    arguments["tokenizer"] = TokenizerIdentity(
        fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod
    )
    write_bank(path, **arguments)  # type: ignore[arg-type]
    return path


def table_bytes(arguments: Mapping[str, object]) -> np.ndarray:
    """uint8 ``[N, row_bytes]``: all rows of a bank written with ``arguments``, as a gather must give them."""
    layers: dict[int, np.ndarray] = arguments["layers"]  # type: ignore[assignment]
    scales: dict[int, np.ndarray] = arguments["scales"] or {}  # type: ignore[assignment]
    elements = np.concatenate([rows.view(np.uint8) for rows in layers.values()], axis=1)
    padding = np.zeros((len(elements), -elements.shape[1] % 4), dtype=np.uint8)
    return np.concatenate([elements, padding, *(scale[:, None].view(np.uint8) for scale in scales.values())], axis=1)


def refit_manifest(path: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Change a manifest and make sizes and digests fit the files again, as a faulty builder would.

    Files that are gone keep what the manifest says of them.
    """
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    change(manifest)
    for file in (*manifest["identity"]["files"], manifest["index"]):
        if (path / file["name"]).is_file():
            file["bytes"] = (path / file["name"]).stat().st_size
            file["sha256"] = sha256_of_file(path / file["name"])
    manifest["digest"] = Identity.from_fields(Fields(manifest["identity"], "identity")).digest()
    (path / MANIFEST_NAME).write_text(json.dumps(manifest))


def overwrite_keys(path: Path, keys: BankKeys) -> None:
    """Replace a bank's file of keys; manifest and index stay as they are."""
    write_tensors(
        path / KEYS_NAME,
        {
            "key_counts": ("I64", keys.key_counts),
            "key_ids": ("I32", keys.key_ids),
            "key_orders": ("U8", keys.key_orders),
        },
    )
