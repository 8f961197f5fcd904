from __future__ import annotations

import hashlib
import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from megatron_graft.bank.tensorfile import PAGE_BYTES, map_tensor, read_header, write_tensors
from megatron_graft.errors import BankError, BankFormatError
from tests.helpers.forked import check_in_fork

COUNTS = np.arange(3, dtype=np.int64) * 2**40
IDS = np.arange(12, dtype=np.int32).reshape(3, 4) - 1
ORDERS = np.array([2, 3, 4], dtype=np.uint8)
ROWS = np.arange(30, dtype=np.uint16).reshape(3, 10) * 1000
HALVES = np.array([0.5, -2.0], dtype=np.float16)
SCALES = np.array([1e-9, 3.5], dtype=np.float32)
QUANTISED = np.array([[-127, 0, 127]], dtype=np.int8)
FLOAT8 = np.arange(255, dtype=np.uint8)
TENSORS = {
    "counts": ("I64", COUNTS), "ids": ("I32", IDS), "scales": ("F32", SCALES), "rows": ("BF16", ROWS),
    "halves": ("F16", HALVES), "orders": ("U8", ORDERS), "quantised": ("I8", QUANTISED), "float8": ("F8_E4M3", FLOAT8),
}  # fmt: skip
GOOD = {
    "a": {"dtype": "U8", "shape": [2, 3], "data_offsets": [0, 6]},
    "b": {"dtype": "U8", "shape": [4], "data_offsets": [6, 10]},
}


def write_raw(path: Path, header: Any, data: bytes = bytes(10), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **fields}}


def test_what_was_written_is_read_back(tmp_path):
    path = tmp_path / "file.safetensors"
    size, digest = write_tensors(path, TENSORS)
    assert (size, digest) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    header = read_header(path)
    assert list(header) == list(TENSORS)
    for name, (dtype, array) in TENSORS.items():
        assert header[name].dtype == dtype
        np.testing.assert_array_equal(map_tensor(path, header[name]), array)


def test_tensors_start_on_a_page_and_cannot_be_written(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS)
    entry = read_header(path)["counts"]
    assert entry.offset % PAGE_BYTES == 0
    with pytest.raises(ValueError, match="read-only"):
        map_tensor(path, entry)[0] = 1


def test_the_safetensors_library_reads_our_files(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS)
    loaded = safetensors.torch.load_file(path)
    assert loaded["rows"].dtype == torch.bfloat16
    np.testing.assert_array_equal(loaded["rows"].view(torch.int16).numpy().view(np.uint16), ROWS)
    assert loaded["float8"].dtype == torch.float8_e4m3fn
    np.testing.assert_array_equal(loaded["float8"].view(torch.uint8).numpy(), FLOAT8)
    plain = {"counts": COUNTS, "ids": IDS, "orders": ORDERS, "halves": HALVES, "scales": SCALES, "quantised": QUANTISED}
    for name, array in plain.items():
        np.testing.assert_array_equal(loaded[name].numpy(), array)


def test_we_read_files_of_the_safetensors_library(tmp_path):
    path = tmp_path / "file.safetensors"
    rows = torch.randn(3, 8).bfloat16()
    safetensors.torch.save_file({"rows": rows, "ids": torch.from_numpy(IDS)}, path, metadata={"made_by": "a test"})
    header = read_header(path)
    np.testing.assert_array_equal(map_tensor(path, header["ids"]), IDS)
    np.testing.assert_array_equal(map_tensor(path, header["rows"]), rows.view(torch.int16).numpy().view(np.uint16))


def test_every_block_written_is_announced(tmp_path):
    blocks: list[int] = []
    write_tensors(tmp_path / "file", TENSORS, blocks.append)
    assert sum(blocks) == sum(array.nbytes for _, array in TENSORS.values())


def test_the_hand_made_header_is_good(tmp_path):
    assert set(read_header(write_raw(tmp_path / "file", GOOD))) == {"a", "b"}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":{"dtype":"U8","shape":[10],"data_offsets":[0,' + b"9" * 5000 + b"]}}", "not JSON"),
        (b'{"a":1,"a":1}', "given twice"),
        (b"[]", "not a JSON object"),
        (b' {"a":{"dtype":"U8","shape":[10],"data_offsets":[0,10]}}', "not a JSON object"),
        ({**GOOD, "__metadata__": {"a": 1}}, "malformed __metadata__"),
        ({**GOOD, "__metadata__": []}, "malformed __metadata__"),
        ({"a": []}, "'a': is malformed"),
        ({"a": {"dtype": "U8", "shape": [10]}}, "'a': is malformed"),
        (changed("a", extra=1), "'a': is malformed"),
        (changed("a", dtype="F8_E5M2"), "unknown dtype .got F8_E5M2"),
        (changed("a", dtype=["U8"]), "unknown dtype"),
        (changed("a", shape=6), "malformed shape"),
        (changed("a", shape=[-2, -3]), "malformed shape"),
        (changed("a", shape=[2.0, 3]), "malformed shape"),
        (changed("a", shape=[True, 6]), "malformed shape"),
        (changed("a", shape=[2**63, 0]), "malformed shape"),
        (changed("a", shape=[1] * 9), "malformed shape"),
        (changed("a", shape=[2**40, 2**40]), "disagree with its shape"),
        (changed("a", shape=[2, 4]), "disagree with its shape"),
        (changed("a", data_offsets=[0]), "malformed data_offsets"),
        (changed("a", data_offsets=[-6, 0]), "malformed data_offsets"),
        (changed("a", data_offsets=[6, 0]), "disagree with its shape"),
        (changed("a", dtype="I64"), "disagree with its shape"),
        (changed("b", shape=[3], data_offsets=[7, 10]), "leaves a hole or overlaps"),
        (changed("b", shape=[5], data_offsets=[5, 10]), "leaves a hole or overlaps"),
        (changed("b", shape=[3], data_offsets=[6, 9]), "trailing bytes"),
        (changed("b", shape=[5], data_offsets=[6, 11]), "truncated"),
        ({}, "trailing bytes"),
    ],
)
def test_a_malformed_header_is_refused(tmp_path, header, message):
    path = write_raw(tmp_path / "file", header)
    with pytest.raises(BankFormatError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_a_tensor_that_is_not_aligned_is_refused(tmp_path):
    entry = b'{"a":{"dtype":"I64","shape":[2],"data_offsets":[0,16]}}'
    aligned = entry + b" " * (-len(entry) % 8)
    assert read_header(write_raw(tmp_path / "good", aligned, bytes(16)))["a"].offset % 8 == 0
    with pytest.raises(BankFormatError, match="not aligned"):
        read_header(write_raw(tmp_path / "bad", aligned + b" ", bytes(16)))


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**31, 10_000])
def test_a_header_length_beyond_the_file_is_refused(tmp_path, length):
    with pytest.raises(BankFormatError, match="impossible header length"):
        read_header(write_raw(tmp_path / "file", GOOD, length=length))


@pytest.mark.parametrize("kept", [0, 3, 8, 20, 4095, 4096, 4100, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "file"
    write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BankFormatError):
        read_header(path)


def test_a_tensor_that_cannot_be_mapped_is_refused(tmp_path):
    write_tensors(tmp_path / "file", TENSORS)
    entry = read_header(tmp_path / "file")["counts"]
    (tmp_path / "file").write_bytes(b"")  # since its header was read
    with pytest.raises(BankFormatError, match="file: cannot be mapped"):
        map_tensor(tmp_path / "file", entry)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BankFormatError, match="cannot be read"):
        read_header(tmp_path / "nothing")


def test_too_many_open_files_are_told_from_a_damaged_one(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {"a": ("F32", np.ones(4, dtype=np.float32))})
    entry = read_header(tmp_path / "file")["a"]

    def exhaust() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 3, 4096))
        kept = []
        with pytest.raises(BankError, match=r"file: cannot be mapped: this process has too many files open.*ulimit -n"):
            while True:
                kept.append(map_tensor(tmp_path / "file", entry))

    check_in_fork(exhaust)
