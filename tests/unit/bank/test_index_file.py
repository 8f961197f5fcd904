from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_graft.bank.index_file import KeyFinder, build_index_file, read_index_header
from megatron_graft.bank.manifest import INDEX_NAME
from megatron_graft.bank.reader import open_bank
from megatron_graft.errors import BankFormatError
from tests.helpers.banks import keys_of, make_bank, random_counts, refit_manifest

COUNTS = {(1, 2): 9, (2, 3): 8, (7, 1, 2): 5, (3, 3, 3, 3): 2, (4, 4): 1}


@pytest.fixture
def bank_path(tmp_path) -> Path:
    return make_bank(tmp_path / "bank", COUNTS).path


def test_the_header_says_what_the_index_was_built_from(bank_path):
    identity = open_bank(bank_path).manifest.identity
    header = read_index_header(bank_path / INDEX_NAME)
    wanted = {"min_order": 2, "max_order": 4, "rows": 5, "phantoms": 2, "vocab_size": 50}
    assert {name: header[name] for name in wanted} == wanted
    assert header["keys_sha256"].hex() == identity.files[0].sha256
    assert header["tokenizer_sha256"].hex() == identity.tokenizer.fingerprint


@pytest.mark.parametrize("num_keys", [1, 30, 5000])
def test_the_bytes_do_not_depend_on_the_threads(tmp_path, num_keys):
    keys = keys_of(random_counts(num_keys, seed=3))
    found = []
    for threads in (1, 2, 5):
        (tmp_path / str(threads)).mkdir()
        index = build_index_file(
            tmp_path / str(threads), keys, 50,
            fingerprint="f0" * 32, keys_sha256="ab" * 32, threads=threads, where="the keys",
        )  # fmt: skip
        assert index.bytes == (tmp_path / str(threads) / INDEX_NAME).stat().st_size
        found.append(index)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"counts": {**COUNTS, (4, 4): 3}}, "keys_sha256"),
        ({"counts": {**COUNTS, (8, 8): 1}}, "keys_sha256"),
        ({"counts": COUNTS, "vocab_size": 60}, "vocab_size"),
    ],
)
def test_the_index_of_another_bank_is_refused_at_once(tmp_path, bank_path, other, field):
    another = make_bank(tmp_path / "other", **other)
    shutil.copy(another.index_path, bank_path / INDEX_NAME)
    refit_manifest(bank_path)
    with pytest.raises(BankFormatError, match=f"{INDEX_NAME}: is the index of another bank: its {field} differs"):
        open_bank(bank_path)


@pytest.mark.parametrize("phantoms", [0, 1, 3])
def test_a_wrong_number_of_phantoms_is_refused_at_once(bank_path, phantoms):
    refit_manifest(bank_path, lambda manifest: manifest["index"].update(phantoms=phantoms))
    with pytest.raises(BankFormatError, match=f"its phantoms differs .got 2; expected {phantoms}"):
        open_bank(bank_path)


@pytest.mark.parametrize("kept", [0, 1, 100, 4095, 4096, -64, -1])
def test_a_truncated_index_is_refused_at_once_whatever_the_manifest_says(bank_path, kept):
    data = (bank_path / INDEX_NAME).read_bytes()
    (bank_path / INDEX_NAME).write_bytes(data[:kept])
    with pytest.raises(BankFormatError, match=f"{INDEX_NAME}: is truncated"):
        open_bank(bank_path)
    refit_manifest(bank_path)
    with pytest.raises(BankFormatError, match=f"{INDEX_NAME}: is no sound index: ") as caught:
        open_bank(bank_path)
    assert str(caught.value).endswith("Copy or build the bank again.")


def test_an_index_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(BankFormatError, match="nothing: cannot be read"):
        read_index_header(tmp_path / "nothing")
    with pytest.raises(BankFormatError, match="nothing: cannot be read"):
        KeyFinder(tmp_path / "nothing", 1, threads=1)


def test_a_key_that_is_there_twice_cannot_be_indexed(tmp_path):
    keys = keys_of(COUNTS)
    keys.key_ids[4] = keys.key_ids[0]
    with pytest.raises(BankFormatError, match=r"^the keys: .*row 4 .* row 0.*keep fewer: a higher --min-count"):
        build_index_file(tmp_path, keys, 50, fingerprint="f0" * 32, keys_sha256="ab" * 32, threads=1, where="the keys")
    assert not list(tmp_path.iterdir())


def test_every_key_is_found_and_an_altered_one_is_not(tmp_path):
    bank = make_bank(tmp_path / "bank", random_counts(300, seed=1))
    finder = KeyFinder(bank.index_path, 300, threads=2)
    finder.check(bank.keys, (0, 300))
    finder.check(bank.keys, (7, 8))
    ids = np.array(bank.key_ids)
    ids[123, -1] = 49 if ids[123, -1] != 49 else 48
    altered = dataclasses.replace(bank.keys, key_ids=ids)
    finder.check(altered, (0, 123))
    with pytest.raises(BankFormatError, match=f"{INDEX_NAME}: does not lead to row 123 from its key"):
        finder.check(altered, (100, 300))


def test_a_key_that_leads_to_the_row_of_another_is_refused(tmp_path):
    bank = make_bank(tmp_path / "bank", random_counts(300, seed=1))
    first, second = np.flatnonzero(bank.key_orders == 3)[:2].tolist()
    ids = np.array(bank.key_ids)
    ids[[first, second]] = ids[[second, first]]  # of the same order
    swapped = dataclasses.replace(bank.keys, key_ids=ids)
    with pytest.raises(BankFormatError, match=f"to row {first} from its key.*got {second}"):
        KeyFinder(bank.index_path, 300, threads=1).check(swapped, (0, 300))
