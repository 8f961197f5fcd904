from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
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
from megatron_graft.bank.manifest import KEYS_NAME, MANIFEST_NAME, Control, rows_name
from megatron_graft.bank.reader import open_bank
from megatron_graft.bank.writer import write_bank
from megatron_graft.errors import BankError, BankFormatError, BankIncompleteError, StorageError
from tests.helpers.banks import (
    bank_arguments,
    donor_identity,
    keys_of,
    make_bank,
    random_rows,
    tokenizer_identity,
)

COUNTS = {(1, 2): 9, (7, 1, 2): 5, (4, 4): 1}
REPOSITORY = Path(__file__).resolve().parents[3]


def test_a_bank_is_these_files_and_no_others(tmp_path):
    bank = make_bank(tmp_path / "bank", COUNTS, layers=(12, 20), control=Control(kind="shuffled", seed=5))
    names = {MANIFEST_NAME, KEYS_NAME, rows_name(12), rows_name(20)}
    assert set(os.listdir(tmp_path / "bank")) == names
    assert os.listdir(tmp_path) == ["bank"]
    assert stat.S_IMODE((tmp_path / "bank").stat().st_mode) == 0o755
    assert bank.manifest.identity.control == Control(kind="shuffled", seed=5)
    assert bank.manifest.provenance == {"made_by": "a test"}


def test_the_safetensors_library_reads_the_rows(tmp_path):
    make_bank(tmp_path / "bank", COUNTS)
    rows = safetensors.torch.load_file(tmp_path / "bank" / rows_name(12))["rows"]
    np.testing.assert_array_equal(rows.view(torch.int16).numpy().view(np.uint16), random_rows(3, 4, 12))


def test_the_same_input_gives_the_same_bytes(tmp_path):
    for name in "ab":
        make_bank(tmp_path / name, COUNTS)
    for file in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_keys(key_counts=np.array([1, 5, 9])), BankFormatError, "keys of .*bank: row 1 is out of place"),
        (_keys(key_orders=np.array([2, 0, 2], np.uint8)), BankError, "key of no tokens"),
        (_keys(key_orders=np.array([2, 4, 2], np.uint8)), BankFormatError, "too few columns"),
        (_keys(key_orders=np.zeros(0, np.uint8)), BankError, "would hold no key"),
        (_keys(key_orders=np.array([2, 3, 2])), ArrayError, "key_orders: has the wrong dtype"),
        (_keys(key_ids=keys_of(COUNTS).key_ids[[0, 1, 0]]), BankFormatError, "another row has too"),
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


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_graft.bank import writer
from tests.helpers.banks import bank_arguments

real, left = writer.write_tensors, int(sys.argv[2])

def write_then_die(path, tensors, advance):
    global left
    result = real(path, tensors, advance)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

writer.write_tensors = write_then_die
writer.write_bank(Path(sys.argv[1]), **bank_arguments({(1, 2): 9, (7, 1, 2): 5, (4, 4): 1}))
"""


@pytest.mark.parametrize("files_written", [1, 2])
def test_a_killed_writer_leaves_nothing_that_opens(tmp_path, files_written):
    path = tmp_path / "bank"
    command = [sys.executable, "-c", KILLED, str(path), str(files_written)]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert killed.returncode == -signal.SIGKILL
    assert not path.exists()
    (scratch,) = tmp_path.iterdir()
    assert scratch.name.startswith(".bank.")
    with pytest.raises(BankIncompleteError):
        open_bank(scratch)
    make_bank(path, COUNTS)  # and what is left is in nobody's way


def test_provenance_must_be_json_and_is_not_identity(tmp_path):
    with pytest.raises(TypeError):
        write_bank(tmp_path / "bad", **{**bank_arguments(COUNTS), "provenance": {"x": object()}})
    assert os.listdir(tmp_path) == []
    manifests = [
        write_bank(tmp_path / name, **{**bank_arguments(COUNTS), "provenance": {"host": name}}) for name in "ab"
    ]
    assert manifests[0].digest == manifests[1].digest
    assert json.loads((tmp_path / "b" / MANIFEST_NAME).read_text())["provenance"] == {"host": "b"}
