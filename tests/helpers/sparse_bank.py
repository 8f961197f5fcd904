"""Banks of any size that take no space: right headers, and holes for everything else."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_graft.bank.manifest import (
    INDEX_NAME,
    KEYS_NAME,
    MANIFEST_NAME,
    FileIdentity,
    Identity,
    IndexFile,
    Manifest,
    Processing,
    rows_name,
)
from megatron_graft.bank.tensorfile import PAGE_BYTES
from tests.helpers.banks import donor_identity, tokenizer_identity

_KEYS_SHA256 = hashlib.sha256(b"not computed").hexdigest()
_BUCKET_BYTES, _GUARD_BUCKETS, _ENTRIES_PER_BUCKET = 64, 31, 5


def write_sparse_bank(path: Path, num_rows: int, row_dim: int = 16) -> None:
    """A bank of bigrams whose headers are all right and whose contents are holes."""
    tokenizer = tokenizer_identity(vocab_size=1 << 15)
    path.mkdir()
    keys = {
        "key_counts": ("I64", 8, [num_rows]),
        "key_ids": ("I32", 4, [num_rows, 2]),
        "key_orders": ("U8", 1, [num_rows]),
    }
    sizes = {
        KEYS_NAME: _write_tensors(path / KEYS_NAME, keys),
        rows_name(12): _write_tensors(path / rows_name(12), {"rows": ("BF16", 2, [num_rows, row_dim])}),
    }
    index_bytes = _write_index(path / INDEX_NAME, num_rows, tokenizer.vocab_size, bytes.fromhex(tokenizer.fingerprint))
    identity = Identity(
        tokenizer=tokenizer,
        orders=(2,),
        num_rows=num_rows,
        row_dim=row_dim,
        row_dtype="bfloat16",
        processing=Processing(centred=True, normalised=True),
        control=None,
        donor=donor_identity((12,), row_dim),
        files=tuple(FileIdentity(name=name, bytes=size, sha256=_KEYS_SHA256) for name, size in sizes.items()),
    )
    index = IndexFile(name=INDEX_NAME, bytes=index_bytes, sha256=_KEYS_SHA256, phantoms=0)
    manifest = Manifest(identity=identity, digest=identity.digest(), index=index, provenance={})
    (path / MANIFEST_NAME).write_text(json.dumps(manifest.to_json()))


def resident_pages(array: np.ndarray) -> int:
    """How many pages of a mapped array are in memory."""
    begin = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    length = array.ctypes.data + array.nbytes - begin
    flags = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(length), flags):
        raise OSError(ctypes.get_errno(), "mincore")
    return int((np.frombuffer(flags, dtype=np.uint8) & 1).sum())


def _write_tensors(path: Path, tensors: Mapping[str, tuple[str, int, list[int]]]) -> int:
    entries, end = {}, 0
    for name, (dtype, element_bytes, shape) in tensors.items():
        begin, end = end, end + int(np.prod(shape)) * element_bytes
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode().ljust(PAGE_BYTES - 8)
    return _write(path, len(header).to_bytes(8, "little") + header, PAGE_BYTES + end)


def _write_index(path: Path, num_rows: int, vocab_size: int, tokenizer_sha256: bytes) -> int:
    """The header of docs/format.md for bigrams of a vocabulary of a power of two."""
    token_bits = (vocab_size - 1).bit_length()
    # The first tokens of bigrams would be phantoms: there is no section for them without unigrams.
    key_bits = max((num_rows - 1).bit_length(), token_bits) + token_bits
    buckets = num_rows // _ENTRIES_PER_BUCKET + 1
    level_bytes = (buckets + _GUARD_BUCKETS) * _BUCKET_BYTES
    header = bytearray(PAGE_BYTES)
    sizes = (num_rows, 0, vocab_size, PAGE_BYTES + level_bytes)
    struct.pack_into("<8s6I4Q", header, 0, b"GRAFTQBT", 1, 0x01020304, PAGE_BYTES, 1, 2, 2, *sizes)
    header[64:96], header[96:128] = tokenizer_sha256, bytes.fromhex(_KEYS_SHA256)
    struct.pack_into("<2I4Q", header, 128, 2, key_bits, PAGE_BYTES, level_bytes, num_rows, buckets)
    struct.pack_into("<I", header, PAGE_BYTES - 4, zlib.crc32(header[:-4]))
    return _write(path, bytes(header), PAGE_BYTES + level_bytes)


def _write(path: Path, header: bytes, size: int) -> int:
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(size)
    return size
