"""Checking an open bank's contents: a sample of its keys, or every byte of it. Its headers were checked before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_graft.bank.index_file import KeyFinder
from megatron_graft.bank.keys import BankKeys, check_key_range, check_keys, check_keys_distinct
from megatron_graft.bank.manifest import COPY_AGAIN, INDEX_NAME, KEYS_NAME, FileIdentity, Identity, Manifest
from megatron_graft.bank.rows import LayerRows
from megatron_graft.errors import BankFormatError
from megatron_graft.files import sha256_of_file
from megatron_graft.log import Progress

Depth = Literal["header", "sample", "full"]

# A sample is this many runs of neighbouring rows, the first and the last of the bank among them.
_SAMPLE_RUNS = 64
_SAMPLE_RUN_ROWS = 64
_LOOKUP_ROWS = 1 << 18


def verify_sample(directory: Path, manifest: Manifest, keys: BankKeys, *, use_index: bool, threads: int) -> None:
    """Check a sample of the keys, always the same one of the same bank, and that the index leads to their rows.

    Raises:
        BankFormatError: naming the first row at fault.
    """
    identity = manifest.identity
    finder = KeyFinder(directory / INDEX_NAME, identity.num_rows, threads) if use_index else None
    for span in _sample_spans(identity.num_rows, int(manifest.digest[:16], 16)):
        check_key_range(keys, span, identity.tokenizer, identity.orders, directory / KEYS_NAME)
        if finder is not None:
            finder.check(keys, span)


def verify_full(directory: Path, manifest: Manifest, keys: BankKeys, *, use_index: bool, threads: int) -> None:
    """Read every byte and compare it with the digests; check every key, and that the index leads to its row.

    Raises:
        BankFormatError: naming the first file or row at fault.
    """
    identity = manifest.identity
    _verify_digests(directory, manifest.files())
    check_keys(keys, identity.tokenizer, identity.orders, directory / KEYS_NAME)
    if not use_index:
        check_keys_distinct(keys, directory / KEYS_NAME)
        return
    # A key that stood in two rows would not be found at one of them.
    finder = KeyFinder(directory / INDEX_NAME, identity.num_rows, threads)
    progress = Progress(f"look up the keys of {directory}", identity.num_rows, "keys")
    for begin in range(0, identity.num_rows, _LOOKUP_ROWS):
        span = (begin, min(begin + _LOOKUP_ROWS, identity.num_rows))
        finder.check(keys, span)
        progress.advance(span[1] - begin)
    # Each key has an entry of its own, found above. That leaves room for the phantoms and for nothing else.
    finder.check_contents(identity.num_rows + manifest.index.phantoms, identity.num_rows)


def check_scales(directory: Path, identity: Identity, layers: Mapping[int, LayerRows]) -> None:
    """Read every scale of packed rows.

    Raises:
        BankFormatError: naming the first file with one that is negative or no number.
    """
    for layer, rows in layers.items():
        for name, scales in zip(identity.shard_names(layer), rows.scales, strict=bool(rows.scales)):
            for begin in range(0, len(scales), _LOOKUP_ROWS):
                part = scales[begin : begin + _LOOKUP_ROWS]
                wrong = np.flatnonzero(~(np.isfinite(part) & (part >= 0)))
                if wrong.size:
                    raise BankFormatError(
                        directory / name, f"has an impossible scale, at row {begin + wrong[0]} of the file",
                        got=part[wrong[0]], expected="a finite number, not negative",
                    )  # fmt: skip


def _sample_spans(num_rows: int, seed: int) -> Iterator[tuple[int, int]]:
    """Runs of rows to look at, as (first, end)."""
    last = max(0, num_rows - _SAMPLE_RUN_ROWS)
    drawn = np.random.default_rng(seed).integers(0, last, _SAMPLE_RUNS - 2, endpoint=True)
    for begin in sorted({0, last, *drawn.tolist()}):
        yield begin, min(begin + _SAMPLE_RUN_ROWS, num_rows)


def _verify_digests(directory: Path, files: Sequence[FileIdentity]) -> None:
    progress = Progress(f"verify {directory}", sum(file.bytes for file in files), "bytes")
    for file in files:
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
