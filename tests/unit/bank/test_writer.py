from __future__ import annotations

import dataclasses
import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from megatron_graft.bank import writer
from megatron_graft.bank.arrays import ArrayError
from megatron_graft.bank.keys import BankKeys
from megatron_graft.bank.manifest import INDEX_NAME, KEYS_NAME, MANIFEST_NAME, Control, rows_name
from megatron_graft.bank.reader import open_bank
from megatron_graft.bank.row_layout import ROW_DTYPES
from megatron_graft.bank.tensorfile import read_header
from megatron_graft.bank.writer import write_bank
from megatron_graft.errors import BankError, BankFormatError, BankIncompleteError, ConfigError, StorageError
from tests.helpers.banks import (
    bank_arguments,
    donor_identity,
    keys_of,
    make_bank,
    random_counts,
    random_rows,
    random_scales,
    tokenizer_identity,
)

COUNTS = {(1, 2): 9, (7, 1, 2): 5, (4, 4): 1}
REPOSITORY = Path(__file__).resolve().parents[3]


def test_a_bank_is_these_files_and_no_others(tmp_path):
    bank = make_bank(tmp_path / "bank", COUNTS, layers=(12, 20), control=Control(kind="shuffled", seed=5))
    names = {MANIFEST_NAME, KEYS_NAME, INDEX_NAME, rows_name(12), rows_name(20)}
    assert set(os.listdir(tmp_path / "bank")) == names
    assert os.listdir(tmp_path) == ["bank"]
    assert stat.S_IMODE((tmp_path / "bank").stat().st_mode) == 0o755
    assert bank.manifest.identity.control == Control(kind="shuffled", seed=5)
    assert bank.manifest.provenance == {"made_by": "a test"}


def test_the_safetensors_library_reads_the_rows(tmp_path):
    make_bank(tmp_path / "bank", COUNTS)
    rows = safetensors.torch.load_file(tmp_path / "bank" / rows_name(12))["rows"]
    np.testing.assert_array_equal(rows.view(torch.int16).numpy().view(np.uint16), random_rows(3, 4, 12))


def test_the_same_input_gives_the_same_bytes_whatever_the_threads(tmp_path):
    for threads in (1, 2, 3):
        write_bank(tmp_path / str(threads), **bank_arguments(random_counts(500, seed=1)), threads=threads)
    for file in os.listdir(tmp_path / "1"):
        assert len({(tmp_path / str(threads) / file).read_bytes() for threads in (1, 2, 3)}) == 1


@pytest.mark.parametrize(("shard_rows", "shards"), [(1, 3), (2, 2), (3, 1), (100, 1), (None, 1)])
def test_shards_hold_the_rows_in_order(tmp_path, shard_rows, shards):
    bank = make_bank(tmp_path / "bank", COUNTS, layers=(12, 20), shard_rows=shard_rows, row_dtype="int8", width=3)
    assert bank.manifest.identity.shards == shards
    for layer in (12, 20):
        files = [
            safetensors.torch.load_file(tmp_path / "bank" / rows_name(layer, shard, shards)) for shard in range(shards)
        ]
        stored = {name: torch.cat([file[name] for file in files]).numpy() for name in ("rows", "scales")}
        np.testing.assert_array_equal(stored["rows"], random_rows(3, 3, layer, "int8"))
        np.testing.assert_array_equal(stored["scales"], random_scales(3, layer))


def test_a_default_shard_is_no_larger_than_it_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_SHARD_BYTES", 16)
    assert make_bank(tmp_path / "a", COUNTS, width=4).manifest.identity.shards == 2  # 8 bytes a row
    assert make_bank(tmp_path / "b", COUNTS, width=100).manifest.identity.shards == 3


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
@pytest.mark.parametrize("width", [3, 4])
def test_rows_start_on_a_page_unless_scales_could_not_follow_them(tmp_path, row_dtype, width):
    make_bank(tmp_path / "bank", COUNTS, width=width, row_dtype=row_dtype)
    header = read_header(tmp_path / "bank" / rows_name(12))
    assert header["rows"].offset % 4096 == (12 if ROW_DTYPES[row_dtype].scaled and width == 3 else 0)


def test_columns_that_no_key_uses_are_dropped(tmp_path):
    keys = keys_of({**COUNTS, (1, 2, 3, 4): 1})
    arguments = bank_arguments(COUNTS)
    kept = keys.key_orders < 4
    arguments["keys"] = BankKeys(
        key_ids=keys.key_ids[kept], key_orders=keys.key_orders[kept], key_counts=keys.key_counts[kept]
    )
    write_bank(tmp_path / "bank", **arguments)
    bank = open_bank(tmp_path / "bank", verify="full")
    assert (bank.orders, bank.key_ids.shape) == ((2, 3), (3, 3))
    assert bank.digest == make_bank(tmp_path / "same", COUNTS).digest


def test_an_existing_path_is_never_touched(tmp_path):
    (tmp_path / "bank").mkdir()
    with pytest.raises(BankError, match="already exists"):
        make_bank(tmp_path / "bank", COUNTS)
    assert os.listdir(tmp_path / "bank") == []


def _keys(**changes: np.ndarray) -> dict[str, object]:
    return {"keys": dataclasses.replace(keys_of(COUNTS), **changes)}


def _quantised(scales: object) -> dict[str, object]:
    return {"row_dtype": "int8", "layers": {12: random_rows(3, 4, row_dtype="int8")}, "scales": scales}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_keys(key_counts=np.array([1, 5, 9])), BankFormatError, "keys of .*bank: row 1 is out of place"),
        (_keys(key_orders=np.array([2, 0, 2], np.uint8)), BankError, "key of no tokens"),
        (_keys(key_orders=np.array([2, 4, 2], np.uint8)), BankFormatError, "too few columns"),
        (_keys(key_orders=np.zeros(0, np.uint8)), BankError, "would hold no key"),
        (_keys(key_orders=np.array([2, 3, 2])), ArrayError, "key_orders: has the wrong dtype"),
        (_keys(key_ids=keys_of(COUNTS).key_ids[[0, 1, 0]]), BankFormatError, "keys of .*bank: .*row"),
        ({"tokenizer": tokenizer_identity(vocab_size=5)}, BankFormatError, "outside the vocabulary"),
        ({"tokenizer": tokenizer_identity(eod=7)}, BankFormatError, "end-of-document"),
        ({"tokenizer": tokenizer_identity(eod=50)}, BankFormatError, "tokenizer.eod: is malformed"),
        ({"donor": donor_identity((13,))}, ArrayError, "not the donor's layers"),
        (
            {"donor": dataclasses.replace(donor_identity(), revision="main")},
            BankFormatError,
            "donor.revision",
        ),
        ({"control": Control(kind="shuffled", seed=-1)}, BankFormatError, "control.seed"),
        ({"layers": {12: random_rows(4, 4)}}, ArrayError, r"layers\[12\]: has the wrong shape"),
        ({"layers": {12: random_rows(3, 8)[:, ::2]}}, ArrayError, r"layers\[12\]: is not C-contiguous"),
        ({"layers": {12: np.zeros((3, 4), np.float16)}}, ArrayError, r"layers\[12\]: has the wrong dtype"),
        ({"layers": {12: random_rows(3, 0)}}, BankFormatError, "row_dim"),
        ({"row_dtype": "float64"}, ConfigError, "row_dtype: is unknown .got float64; expected bfloat16, "),
        ({"row_dtype": "float16"}, ArrayError, r"layers\[12\]: has the wrong dtype"),
        ({"shard_rows": 0}, ConfigError, "shard_rows: is too small"),
        ({"threads": 0}, ConfigError, "threads: is out of range"),
        ({"scales": {12: random_scales(3)}}, ArrayError, "scales: are not those of the layers.*none with bfloat16"),
        (_quantised(scales=None), ArrayError, r"scales: are not those of the layers .got \[\]; expected \[12\]"),
        (_quantised(scales={13: random_scales(3)}), ArrayError, "scales: are not those of the layers"),
        (_quantised(scales={12: random_scales(4)}), ArrayError, r"scales\[12\]: has the wrong shape"),
        (_quantised(scales={12: np.ones(3)}), ArrayError, r"scales\[12\]: has the wrong dtype"),
        (_quantised(scales={12: np.float32([1, np.nan, 1])}), ArrayError, r"scales\[12\]: are not all finite"),
        (_quantised(scales={12: np.float32([1, np.inf, 1])}), ArrayError, r"scales\[12\]: are not all finite"),
        (_quantised(scales={12: np.float32([1, -1, 1])}), ArrayError, r"scales\[12\]: are not all finite"),
        ({"tokenizer": tokenizer_identity(vocab_size=2**20 + 1)}, BankFormatError, "vocab_size: is malformed"),
        ({"keys": keys_of({tuple(range(1, 10)): 3, (1, 2): 2, (1, 3): 1})}, BankError, "key of too many tokens .got 9"),
    ],
)
def test_what_could_not_be_opened_is_not_written(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        write_bank(tmp_path / "bank", **{**bank_arguments(COUNTS), **change})
    assert os.listdir(tmp_path) == []


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_a_storage_error_and_nothing_is_left(tiny_disk):
    with pytest.raises(StorageError, match="bank: could not be written: No space left"):
        make_bank(tiny_disk / "bank", COUNTS, width=20_000)
    assert os.listdir(tiny_disk) == []
    make_bank(tiny_disk / "bank", COUNTS)


def test_more_shards_than_a_name_can_count_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "MAX_SHARDS", 2)
    with pytest.raises(ConfigError, match="shard_rows: makes too many files .got 3; expected at most 2"):
        make_bank(tmp_path / "bank", COUNTS, shard_rows=1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("refused", [KEYS_NAME, rows_name(12)])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_write_refused_half_way_leaves_nothing(tmp_path, monkeypatch, refused, code):
    """The same where no file system can be mounted: the refusal is simulated, the clean-up is real."""
    real = writer.write_tensors

    def refuse(path: Path, tensors: dict, advance: object) -> tuple[int, str]:
        if path.name == refused:
            path.write_bytes(b"half")
            raise OSError(code, os.strerror(code))
        return real(path, tensors, advance)

    monkeypatch.setattr(writer, "write_tensors", refuse)
    with pytest.raises(StorageError, match=f"bank: could not be written: {os.strerror(code)}"):
        make_bank(tmp_path / "bank", COUNTS)
    assert os.listdir(tmp_path) == []


# Writes the bank once for every step of a write, each time in a process that is killed at that step.
KILLED_AT_EVERY_STEP = """
import os, signal, sys
from pathlib import Path
from megatron_graft.bank import writer
from megatron_graft.log import Progress
from tests.helpers.banks import bank_arguments

path, steps = Path(sys.argv[1]), 0
fatal = 0

def killing(real):
    def step(*arguments, **keywords):
        global steps
        for moment in (lambda: None, lambda: real(*arguments, **keywords)):
            result = moment()
            steps += 1
            if steps == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
        return result
    return step

Progress.advance = killing(Progress.advance)  # called from inside of every file's writing and the index's building
writer.write_tensors, os.fsync = killing(writer.write_tensors), killing(os.fsync)
Path.write_bytes = killing(Path.write_bytes)
os.rename = killing(os.rename)

arguments = bank_arguments({(1, 2): 9, (7, 1, 2): 5, (4, 4): 1}, shard_rows=2)
while True:
    fatal += 1
    child = os.fork()
    if child == 0:
        writer.write_bank(path / str(fatal), **arguments)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
print(fatal - 1)
"""


def test_a_writer_killed_at_any_step_leaves_nothing_that_opens_but_the_whole_bank(tmp_path):
    whole = make_bank(tmp_path / "whole" / "bank", COUNTS, shard_rows=2)
    scratch = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_AT_EVERY_STEP, str(scratch)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=True, capture_output=True, text=True
    )
    steps = int(done.stdout)
    assert steps > 20
    published = incomplete = 0
    for step in range(1, steps + 1):
        path = scratch / str(step)
        if path.exists():  # killed after the rename
            published += 1
            assert open_bank(path, "full").digest == whole.digest
            continue
        for left in scratch.glob(f".{step}.*"):
            if not (left / MANIFEST_NAME).exists():
                incomplete += 1
                with pytest.raises(BankIncompleteError):
                    open_bank(left)
        assert make_bank(path, COUNTS, shard_rows=2).digest == whole.digest  # what is left is in nobody's way
    assert incomplete > 10 and 1 <= published <= 3 and (scratch / str(steps + 1)).exists()


def test_provenance_must_be_json_and_is_not_identity(tmp_path):
    with pytest.raises(TypeError):
        write_bank(tmp_path / "bad", **{**bank_arguments(COUNTS), "provenance": {"x": object()}})
    assert os.listdir(tmp_path) == []
    manifests = [
        write_bank(tmp_path / name, **{**bank_arguments(COUNTS), "provenance": {"host": name}}) for name in "ab"
    ]
    assert manifests[0].digest == manifests[1].digest
    assert json.loads((tmp_path / "b" / MANIFEST_NAME).read_text())["provenance"] == {"host": "b"}
