from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_graft.bank.arrays import ArrayError
from megatron_graft.bank.extension import MODULE_NAME
from megatron_graft.bank.fields import Fields
from megatron_graft.bank.manifest import KEYS_NAME, MANIFEST_NAME, Identity, Manifest, rows_name
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.bank.tensorfile import write_tensors
from megatron_graft.errors import (
    BankError,
    BankFormatError,
    BankIncompleteError,
    BankVersionError,
    IdentityError,
    NativeExtensionError,
)
from megatron_graft.files import sha256_of_file
from tests.helpers.banks import keys_of, make_bank, random_rows

COUNTS = {(1, 2): 9, (2, 3): 8, (7, 1, 2): 5, (3, 3, 3, 3): 2, (4, 4): 1}
LAYERS = (20, 12)  # column order is the donor's order of layers, not the numerical one


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("banks") / "bank"
    make_bank(path, COUNTS, layers=LAYERS)
    return path


@pytest.fixture
def bank_path(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bank"))


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the identity and make its digest fit, as a faulty builder would."""
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    change(manifest["identity"])
    for file in manifest["identity"]["files"]:
        file["bytes"] = (path / file["name"]).stat().st_size
        file["sha256"] = sha256_of_file(path / file["name"])
    identity = Identity.from_fields(Fields(manifest["identity"], "identity"))
    manifest["digest"] = identity.digest()
    (path / MANIFEST_NAME).write_text(json.dumps(manifest))


def write_keys(path: Path, counts: dict[tuple[int, ...], int], **replaced: tuple[str, np.ndarray]) -> None:
    keys = keys_of(counts)
    tensors = {
        "key_counts": ("I64", keys.key_counts),
        "key_ids": ("I32", keys.key_ids),
        "key_orders": ("U8", keys.key_orders),
    }
    write_tensors(path / KEYS_NAME, {**tensors, **replaced})
    rewrite_manifest(path, lambda identity: None)


@pytest.mark.parametrize("verify", ["header", "full"])
def test_an_open_bank_says_what_was_written(bank_path, verify):
    bank = open_bank(str(bank_path), verify)
    assert (bank.num_rows, bank.row_dim, bank.orders) == (5, 8, (2, 3, 4))
    assert (bank.min_order, bank.max_order, bank.vocab_size, bank.eod) == (2, 4, 50, 0)
    assert bank.tokenizer_fingerprint == "f0" * 32
    assert bank.digest == bank.manifest.identity.digest()
    assert bank.rows_of_keys() == {key: row for row, key in enumerate(COUNTS)}
    assert bank.key_counts.tolist() == list(COUNTS.values())


def test_nothing_of_a_bank_can_be_written(bank_path):
    bank = open_bank(bank_path)
    for array in (bank.key_ids, bank.key_orders, bank.key_counts, *bank.rows_by_layer.values()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("gather", ["native", "reference"])
def test_gather_equals_take_with_zeros_for_negative_rows(bank_path, gather):
    bank = open_bank(bank_path, gather=gather)
    table = np.concatenate([random_rows(5, 4, layer) for layer in LAYERS], axis=1)
    rows = np.random.default_rng(0).integers(-2, 5, 40)
    out = np.full((40, 8), 0xFFFF, dtype=np.uint16)
    bank.gather(rows, out)
    np.testing.assert_array_equal(out, np.where(rows[:, None] < 0, 0, table.take(np.maximum(rows, 0), axis=0)))


@pytest.mark.parametrize("gather", ["native", "reference"])
def test_gather_of_nothing_is_nothing(bank_path, gather):
    open_bank(bank_path, gather=gather).gather(np.empty(0, dtype=np.int64), np.empty((0, 8), dtype=np.uint16))


@pytest.mark.parametrize("gather", ["native", "reference"])
@pytest.mark.parametrize(
    ("rows", "out", "message"),
    [
        (np.array([0, 5]), np.full((2, 8), 7, np.uint16), "rows: names a row .* .got 5; expected below 5"),
        (np.array([0, 2**62]), np.full((2, 8), 7, np.uint16), "rows: names a row"),
        (np.array([0], dtype=np.int32), np.full((1, 8), 7, np.uint16), "rows: has the wrong dtype"),
        (np.array([[0]]), np.full((1, 8), 7, np.uint16), "rows: has the wrong shape"),
        (np.arange(4)[::2], np.full((2, 8), 7, np.uint16), "rows: is not C-contiguous"),
        (np.array([0]), np.full((1, 8), 7, np.int16), "out: has the wrong dtype"),
        (np.array([0]), np.full((1, 7), 7, np.uint16), "out: has the wrong shape"),
        (np.array([0]), np.full((2, 8), 7, np.uint16), "out: has the wrong shape"),
        (np.array([0]), np.full((1, 16), 7, np.uint16)[:, ::2], "out: is not C-contiguous"),
    ],
)
def test_gather_refuses_what_does_not_fit_and_writes_nothing(bank_path, gather, rows, out, message):
    with pytest.raises(ArrayError, match=f"^{message}"):
        open_bank(bank_path, gather=gather).gather(rows, out)
    assert (out == 7).all()


def test_gather_refuses_a_read_only_or_overlapping_output(bank_path):
    bank = open_bank(bank_path)
    buffer = np.zeros(2, dtype=np.int64)
    out = buffer.view(np.uint16).reshape(1, 8)
    with pytest.raises(ArrayError, match="^out: shares memory with rows"):
        bank.gather(buffer[:1], out)
    out.flags.writeable = False
    with pytest.raises(ArrayError, match="^out: is read-only"):
        bank.gather(np.zeros(1, dtype=np.int64), out)


def test_without_the_extension_only_the_reference_gathers(bank_path, monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE_NAME, None)
    rows, out = np.zeros(1, dtype=np.int64), np.empty((1, 8), dtype=np.uint16)
    with pytest.raises(NativeExtensionError, match="make native"):
        open_bank(bank_path).gather(rows, out)
    open_bank(bank_path, gather="reference").gather(rows, out)


def test_a_pickled_bank_is_a_path(bank_path):
    bank = open_bank(bank_path, gather="reference")
    pickled = pickle.dumps(bank)
    assert len(pickled) < 1000
    copy: Bank = pickle.loads(pickled)
    assert (copy.path, copy.digest) == (bank.path, bank.digest)
    np.testing.assert_array_equal(copy.rows_by_layer[12], bank.rows_by_layer[12])


def test_a_bank_replaced_since_it_was_pickled_is_refused(bank_path):
    pickled = pickle.dumps(open_bank(bank_path))
    shutil.rmtree(bank_path)
    make_bank(bank_path, COUNTS, layers=LAYERS, seed=1)
    with pytest.raises(IdentityError, match="was replaced"):
        pickle.loads(pickled)


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_a_path_that_is_no_directory_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(BankError, match=f"{name}: is not a directory"):
        open_bank(tmp_path / name)


def test_a_bank_without_a_manifest_is_incomplete(bank_path):
    (bank_path / MANIFEST_NAME).unlink()
    with pytest.raises(BankIncompleteError, match="did not finish"):
        open_bank(bank_path)


def test_a_bank_of_a_newer_version_is_refused(bank_path):
    manifest = json.loads((bank_path / MANIFEST_NAME).read_text())
    (bank_path / MANIFEST_NAME).write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(BankVersionError, match=f"{MANIFEST_NAME}: was written by a newer format version"):
        open_bank(bank_path)


@pytest.mark.parametrize("name", [KEYS_NAME, *map(rows_name, LAYERS)])
def test_a_missing_truncated_or_grown_file_is_refused_at_once(bank_path, name):
    data = (bank_path / name).read_bytes()
    for wrong in (data[:-1], data[:100], b"", data + b"x"):
        (bank_path / name).write_bytes(wrong)
        with pytest.raises(BankFormatError, match=f"{name}: is truncated or was altered"):
            open_bank(bank_path)
    (bank_path / name).unlink()
    with pytest.raises(BankFormatError, match=f"{name}: is missing"):
        open_bank(bank_path)


@pytest.mark.parametrize("name", [*map(rows_name, LAYERS)])
@pytest.mark.parametrize("offset", [4096, -1])
def test_full_verification_finds_one_altered_bit(bank_path, name, offset):
    data = bytearray((bank_path / name).read_bytes())
    data[offset] ^= 1
    (bank_path / name).write_bytes(data)
    open_bank(bank_path)
    with pytest.raises(BankFormatError, match=f"{name}: was altered"):
        open_bank(bank_path, verify="full")


def test_full_verification_finds_altered_counts(bank_path):
    data = bytearray((bank_path / KEYS_NAME).read_bytes())
    data[4096] += 1  # the first key's count: still in order
    (bank_path / KEYS_NAME).write_bytes(data)
    open_bank(bank_path)
    with pytest.raises(BankFormatError, match=f"{KEYS_NAME}: was altered"):
        open_bank(bank_path, verify="full")


@pytest.mark.parametrize("verify", ["header", "full"])
def test_an_altered_manifest_is_found_at_once(bank_path, verify):
    text = (bank_path / MANIFEST_NAME).read_text()
    (bank_path / MANIFEST_NAME).write_text(text.replace('"eod": 0', '"eod": 9'))
    with pytest.raises(BankFormatError, match="was altered: its digest"):
        open_bank(bank_path, verify)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_rows", 4, "does not hold the keys"),
        ("orders", [2, 3], "does not hold the keys"),
        ("orders", [1, 4], "row 0 has an unlisted order"),
        ("orders", [1, 2, 3, 4], "no key of a listed order"),
        ("row_dim", 9, "rows of the wrong width"),
        ("tokenizer", {"fingerprint": "f0" * 32, "vocab_size": 7, "eod": 0}, "outside the vocabulary"),
        ("tokenizer", {"fingerprint": "f0" * 32, "vocab_size": 50, "eod": 7}, "end-of-document"),
    ],
)
def test_files_at_odds_with_the_identity_are_refused(bank_path, field, value, message):
    rewrite_manifest(bank_path, lambda identity: identity.update({field: value}))
    with pytest.raises(BankFormatError, match=message):
        open_bank(bank_path)


def test_keys_of_another_type_or_name_are_refused(bank_path):
    write_keys(bank_path, COUNTS, key_orders=("I64", np.full(5, 2)))
    with pytest.raises(BankFormatError, match="does not hold the keys"):
        open_bank(bank_path)
    write_keys(bank_path, COUNTS, key_surprises=("U8", np.zeros(5, dtype=np.uint8)))
    with pytest.raises(BankFormatError, match="does not hold the keys"):
        open_bank(bank_path)


def test_a_repeated_key_is_found_by_full_verification(bank_path):
    keys = keys_of(COUNTS)
    keys.key_ids[4] = keys.key_ids[0]
    write_keys(bank_path, COUNTS, key_ids=("I32", keys.key_ids))
    open_bank(bank_path)
    with pytest.raises(BankFormatError, match="another row has too"):
        open_bank(bank_path, verify="full")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "does not hold rows"),
        ({"row": ("BF16", random_rows(5, 4))}, "does not hold rows"),
        ({"rows": ("BF16", random_rows(5, 4)), "x": ("BF16", random_rows(5, 4))}, "does not hold rows"),
        ({"rows": ("I32", np.zeros((5, 4), dtype=np.int32))}, "does not hold rows"),
        ({"rows": ("BF16", random_rows(5, 4).reshape(-1))}, "does not hold rows"),
        ({"rows": ("BF16", random_rows(4, 5))}, "rows of the wrong shape"),
        ({"rows": ("BF16", random_rows(5, 0))}, "rows of the wrong shape"),
        ({"rows": ("BF16", random_rows(5, 3))}, "rows of the wrong width"),
    ],
)
def test_rows_of_another_form_are_refused(bank_path, tensors, message):
    write_tensors(bank_path / rows_name(12), tensors)
    rewrite_manifest(bank_path, lambda identity: None)
    with pytest.raises(BankFormatError, match=message):
        open_bank(bank_path)


def test_the_digest_tells_banks_apart(tmp_path):
    digests = {
        make_bank(tmp_path / "a", COUNTS).digest,
        make_bank(tmp_path / "b", COUNTS).digest,
        make_bank(tmp_path / "c", COUNTS, seed=1).digest,
        make_bank(tmp_path / "d", {**COUNTS, (4, 4): 2}).digest,
        make_bank(tmp_path / "e", COUNTS, eod=30).digest,
    }
    assert len(digests) == 4  # a and b are the same bank
    manifests = [Manifest.from_json(json.loads((tmp_path / n / MANIFEST_NAME).read_text())) for n in "ab"]
    assert manifests[0] == manifests[1]
