"""Reading and writing ``.safetensors`` files, strictly and without torch.

The format is a little-endian 8-byte header length, a JSON header and one buffer of raw tensors. We write our
own files because NumPy has no bfloat16, and because the header is padded so that the buffer starts on a page;
we read them ourselves because a bank is mapped, never loaded. Every size in a file is checked against the
file before it is used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.bank.fields import object_without_repeats
from megatron_graft.errors import BankError, BankFormatError

PAGE_BYTES = 4096
MAX_HEADER_BYTES = 1 << 20
_LENGTH_BYTES = 8
_MAX_RANK = 8
_WRITE_BYTES = 1 << 26

# What NumPy does not have (bfloat16, float8) is held as its bits.
NUMPY_TYPES: Mapping[str, type[np.generic]] = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "F8_E4M3": np.uint8,
    "I8": np.int8,
    "U8": np.uint8,
    "I32": np.int32,
    "I64": np.int64,
}


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a file: ``dtype`` as the format names it, ``offset`` of its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read and check a file's header.

    Raises:
        BankFormatError: the file is missing, truncated, or its header does not describe it exactly.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(_LENGTH_BYTES)
            if len(prefix) < _LENGTH_BYTES:
                raise BankFormatError(path, "is truncated", got=f"{file_bytes} bytes", expected="a header")
            header_bytes = int.from_bytes(prefix, "little")
            limit = min(MAX_HEADER_BYTES, file_bytes - _LENGTH_BYTES)
            if header_bytes > limit:
                raise BankFormatError(
                    path, "has an impossible header length", got=header_bytes, expected=f"at most {limit}"
                )
            header = stream.read(header_bytes)
    except OSError as error:
        raise BankFormatError(path, "cannot be read", got=error.strerror) from error
    return _parse_header(path, header, data_start=_LENGTH_BYTES + header_bytes, file_bytes=file_bytes)


def map_tensor(path: Path, entry: TensorEntry) -> np.ndarray:
    """Map one tensor, which must have elements, read-only; nothing is read until it is used.

    bfloat16 comes as its bits in uint16, float8 in uint8.

    Raises:
        BankError: this process may open no further files; an open bank holds one for each of its tensors.
        BankFormatError: the file cannot be mapped.
    """
    try:
        mapped = np.memmap(path, mode="r", dtype=NUMPY_TYPES[entry.dtype], offset=entry.offset, shape=entry.shape)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.EMFILE:
            raise BankError(
                path, "cannot be mapped: this process has too many files open", got=error,
                remedy="Raise the limit before the run: ulimit -n 65536.",
            ) from error  # fmt: skip
        raise BankFormatError(path, "cannot be mapped", got=error) from error
    return np.asarray(mapped)


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[str, np.ndarray]],
    advance: Callable[[int], None] = lambda written: None,
) -> tuple[int, str]:
    """Write a file of ``name -> (format dtype, C-contiguous array)``.

    Args:
        path: the file to write.
        tensors: give the widest elements first, so that each tensor is aligned to its element.
        advance: called with the number of bytes of every block written.

    Returns:
        the file's size in bytes and its hex SHA-256, taken on the way out.
    """
    header = _header_bytes(tensors)
    digest = hashlib.sha256(header)
    written = len(header)
    with path.open("wb") as stream:
        stream.write(header)
        for _, array in tensors.values():
            buffer = memoryview(array.reshape(-1)).cast("B")
            for start in range(0, len(buffer), _WRITE_BYTES):
                block = buffer[start : start + _WRITE_BYTES]
                stream.write(block)
                digest.update(block)
                written += len(block)
                advance(len(block))
    return written, digest.hexdigest()


def _header_bytes(tensors: Mapping[str, tuple[str, np.ndarray]]) -> bytes:
    entries, end = {}, 0
    for name, (dtype, array) in tensors.items():
        begin, end = end, end + array.nbytes
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    padding = -(_LENGTH_BYTES + len(text)) % PAGE_BYTES
    return (len(text) + padding).to_bytes(_LENGTH_BYTES, "little") + text + b" " * padding


def _parse_header(path: Path, header: bytes, data_start: int, file_bytes: int) -> dict[str, TensorEntry]:
    try:
        fields = json.loads(header.decode("utf-8"), object_pairs_hook=object_without_repeats)
    except (ValueError, RecursionError) as error:
        raise BankFormatError(path, "has a header that is not JSON", got=error) from error
    if not isinstance(fields, dict) or not header.startswith(b"{"):
        raise BankFormatError(path, "has a header that is not a JSON object")
    _check_metadata(path, fields.pop("__metadata__", {}))
    spans = [(*_parse_entry(path, name, field), name) for name, field in fields.items()]
    entries, end = {}, 0
    for begin, stop, dtype, shape, name in sorted(spans):
        if begin != end:
            raise BankFormatError(f"{path}: tensor {name!r}", "leaves a hole or overlaps", got=begin, expected=end)
        end = stop
        offset = data_start + begin
        if offset % np.dtype(NUMPY_TYPES[dtype]).itemsize:
            raise BankFormatError(f"{path}: tensor {name!r}", "is not aligned to its elements", got=offset)
        entries[name] = TensorEntry(dtype=dtype, shape=shape, offset=offset)
    if data_start + end != file_bytes:
        raise BankFormatError(
            path, "is truncated or has trailing bytes", got=f"{file_bytes} bytes", expected=data_start + end
        )
    return entries


def _parse_entry(path: Path, name: str, field: Any) -> tuple[int, int, str, tuple[int, ...]]:
    subject = f"{path}: tensor {name!r}"
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        raise BankFormatError(subject, "is malformed", expected="dtype, shape and data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in NUMPY_TYPES:
        raise BankFormatError(subject, "has an unknown dtype", got=dtype, expected=", ".join(NUMPY_TYPES))
    if not _is_list_of_sizes(shape):
        raise BankFormatError(subject, "has a malformed shape", got=shape, expected="a list of sizes")
    if not _is_list_of_sizes(offsets) or len(offsets) != 2:
        raise BankFormatError(subject, "has malformed data_offsets", got=offsets, expected="[begin, end]")
    begin, end = offsets
    tensor_bytes = math.prod(shape) * np.dtype(NUMPY_TYPES[dtype]).itemsize
    if end - begin != tensor_bytes:
        raise BankFormatError(
            subject,
            "has offsets that disagree with its shape",
            got=f"{end - begin} bytes",
            expected=tensor_bytes,
        )
    return begin, end, dtype, tuple(shape)


def _check_metadata(path: Path, metadata: Any) -> None:
    strings = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not strings:
        raise BankFormatError(path, "has malformed __metadata__", expected="a map of strings")


def _is_list_of_sizes(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > _MAX_RANK:
        return False
    return all(type(size) is int and 0 <= size < 2**63 for size in value)
