from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_graft.bank.index_file import build_index_file
from megatron_graft.bank.keys import BankKeys
from megatron_graft.bank.manifest import INDEX_NAME, KEYS_NAME, rows_name
from megatron_graft.bank.reader import open_bank
from megatron_graft.bank.verify import _sample_spans
from megatron_graft.errors import BankFormatError
from megatron_graft.files import sha256_of_file
from tests.helpers.banks import keys_of, make_bank, overwrite_keys, random_counts, refit_manifest

COUNTS = {(1, 2): 9, (2, 3): 8, (7, 1, 2): 5, (3, 3, 3, 3): 2, (4, 4): 1}
LAYERS = (20, 12)
EMPTY_LANE = 0x7FFFFFFF


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("banks") / "bank"
    make_bank(path, COUNTS, layers=LAYERS, row_dtype="int8", shard_rows=4)
    return path


@pytest.fixture
def bank_path(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bank"))


def edited(name: str, row: int, value: object) -> BankKeys:
    keys = keys_of(COUNTS)
    array = getattr(keys, name).copy()
    array[row] = value
    return dataclasses.replace(keys, **{name: array})


ALTERED_KEYS = [
    (edited("key_ids", 0, [-1, -1, 1, 50]), "row 0 has a token outside the vocabulary"),
    (edited("key_ids", 0, [-1, -1, -1, 2]), "row 0 has a token outside the vocabulary"),
    (edited("key_ids", 0, [-1, 9, 1, 2]), "row 0 has ids to the left of its tokens"),
    (edited("key_ids", 0, [-1, -1, 1, 0]), "row 0 contains the end-of-document token"),
    (edited("key_orders", 3, 5), "row 3 has an unlisted order"),
    (edited("key_orders", 3, 0), "row 3 has an unlisted order"),
    (edited("key_orders", 0, 3), "row 0 has a token outside the vocabulary"),
    (edited("key_counts", 4, 0), "row 4 has a count below 1"),
    (edited("key_counts", 4, 3), "row 4 is out of place"),
]


@pytest.mark.parametrize(("keys", "message"), ALTERED_KEYS)
def test_keys_altered_in_place_are_found_by_a_sample_and_not_by_the_headers(bank_path, keys, message):
    overwrite_keys(bank_path, keys)
    open_bank(bank_path)
    for gather in ("native", "reference"):
        with pytest.raises(BankFormatError, match=f"{KEYS_NAME}: {message}"):
            open_bank(bank_path, "sample", gather=gather)
        with pytest.raises(BankFormatError, match=f"{KEYS_NAME}: was altered"):
            open_bank(bank_path, "full", gather=gather)


@pytest.mark.parametrize(("keys", "message"), ALTERED_KEYS)
def test_keys_that_were_wrong_from_the_start_are_found_in_full(bank_path, keys, message):
    overwrite_keys(bank_path, keys)
    refit_manifest(bank_path)
    with pytest.raises(BankFormatError, match=f"{KEYS_NAME}: {message}"):
        open_bank(bank_path, "full", gather="reference")
    with pytest.raises(BankFormatError, match=f"{INDEX_NAME}: is the index of another bank"):
        open_bank(bank_path)


def test_another_key_in_the_same_place_is_found_through_the_index(bank_path):
    overwrite_keys(bank_path, edited("key_ids", 0, [-1, -1, 1, 3]))  # sound by itself
    open_bank(bank_path, "sample", gather="reference")
    with pytest.raises(BankFormatError, match=f"{INDEX_NAME}: does not lead to row 0 from its key"):
        open_bank(bank_path, "sample")


def test_an_altered_count_is_found_by_its_digest_alone(bank_path):
    overwrite_keys(bank_path, edited("key_counts", 0, 10))
    open_bank(bank_path, "sample")
    with pytest.raises(BankFormatError, match=f"{KEYS_NAME}: was altered"):
        open_bank(bank_path, "full")


@pytest.mark.parametrize("gather", ["native", "reference"])
def test_a_key_in_two_rows_is_found_in_full(bank_path, gather):
    index = (bank_path / INDEX_NAME).read_bytes()
    overwrite_keys(bank_path, edited("key_ids", 4, [-1, -1, 1, 2]))
    if gather == "native":  # an index that claims to be that of these keys
        (bank_path / INDEX_NAME).unlink()
        build_index_file(
            bank_path, keys_of(COUNTS), 50,
            fingerprint="f0" * 32, keys_sha256=sha256_of_file(bank_path / KEYS_NAME), threads=1, where="keys",
        )  # fmt: skip
        assert len(index) == (bank_path / INDEX_NAME).stat().st_size
    refit_manifest(bank_path)
    open_bank(bank_path, gather=gather)
    expected = "does not lead to row 4" if gather == "native" else "row [04] has a key that another row has too"
    with pytest.raises(BankFormatError, match=expected):
        open_bank(bank_path, "full", gather=gather)


FILES = [KEYS_NAME, INDEX_NAME, *(rows_name(layer, shard, 2) for layer in LAYERS for shard in range(2))]


@pytest.mark.parametrize("gather", ["native", "reference"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("offset", [4096, -1])
def test_full_verification_finds_one_altered_bit_anywhere(bank_path, name, offset, gather):
    data = bytearray((bank_path / name).read_bytes())
    data[offset] ^= 1
    (bank_path / name).write_bytes(data)
    open_bank(bank_path, gather=gather)
    with pytest.raises(BankFormatError, match=f"{name}: was altered"):
        open_bank(bank_path, "full", gather=gather)


def test_an_index_body_at_odds_with_the_keys_is_found_by_a_sample(bank_path):
    data = bytearray((bank_path / INDEX_NAME).read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    (bank_path / INDEX_NAME).write_bytes(data)
    open_bank(bank_path)
    with pytest.raises(BankFormatError, match=f"{INDEX_NAME}: does not lead to row 0"):
        open_bank(bank_path, "sample")


def test_an_entry_that_no_key_asks_for_is_found_in_full(tmp_path):
    path = make_bank(tmp_path / "bank", {(1,): 9, (5, 2): 8, (6, 1, 2): 5}).path
    open_bank(path, "full")
    data = (path / INDEX_NAME).read_bytes()
    empty = data.index(np.uint32(EMPTY_LANE).tobytes(), 8192)  # behind the header and the unigrams
    (path / INDEX_NAME).write_bytes(data[:empty] + np.uint32(1).tobytes() + data[empty + 4 :])
    refit_manifest(path)
    open_bank(path, "sample")
    with pytest.raises(BankFormatError, match=f"{INDEX_NAME}: has a wrong number of entries .got 5; expected 4"):
        open_bank(path, "full")


def test_a_large_bank_passes_and_its_sample_is_always_the_same(tmp_path):
    bank = make_bank(tmp_path / "bank", random_counts(20_000, seed=2))
    for verify in ("sample", "full"):
        assert open_bank(bank.path, verify, threads=2).digest == bank.digest
    spans = list(_sample_spans(20_000, 5))
    assert spans == list(_sample_spans(20_000, 5)) != list(_sample_spans(20_000, 6))
    assert spans[0] == (0, 64) and spans[-1] == (20_000 - 64, 20_000)
    assert len(spans) > 50 and all(end - begin == 64 for begin, end in spans)


@pytest.mark.parametrize("num_rows", [1, 2, 63, 64, 65, 200])
def test_a_sample_of_a_small_bank_is_all_of_it(num_rows):
    seen = {row for span in _sample_spans(num_rows, 1) for row in range(*span)}
    assert max(seen) == num_rows - 1
    if num_rows <= 65:
        assert seen == set(range(num_rows))


def test_every_row_is_checked_in_full_and_few_of_many_in_a_sample(tmp_path):
    bank = make_bank(tmp_path / "bank", random_counts(20_000, seed=2))
    sampled = np.zeros(20_000, dtype=bool)
    for begin, end in _sample_spans(20_000, int(bank.digest[:16], 16)):
        sampled[begin:end] = True
    assert 0.1 < sampled.mean() < 0.3
    for row, found in ((int(np.flatnonzero(sampled)[40]), True), (int(np.flatnonzero(~sampled)[40]), False)):
        path = Path(shutil.copytree(bank.path, tmp_path / str(row)))
        ids = np.array(bank.key_ids)
        ids[row, -1] = 60  # outside the vocabulary
        overwrite_keys(path, BankKeys(key_ids=ids, key_orders=bank.key_orders, key_counts=bank.key_counts))
        if not found:
            open_bank(path, "sample")
            refit_manifest(path)  # so that full verification gets as far as the keys
        with pytest.raises(BankFormatError, match=f"row {row} has a token outside"):
            open_bank(path, "sample" if found else "full", gather="reference")


def test_a_row_given_to_another_token_is_found_even_if_the_digest_was_fitted(tmp_path):
    make_bank(tmp_path / "bank", {(3,): 2, (3, 4): 1}, vocab_size=10)
    index = tmp_path / "bank" / "index.qbt"
    data = bytearray(index.read_bytes())
    data[4096 + 9 * 4 : 4096 + 10 * 4] = (0).to_bytes(4, "little")
    index.write_bytes(data)
    manifest = json.loads((tmp_path / "bank" / "bank.json").read_text())
    manifest["index"]["sha256"] = hashlib.sha256(data).hexdigest()
    (tmp_path / "bank" / "bank.json").write_text(json.dumps(manifest))
    with pytest.raises(BankFormatError, match="has a wrong number of entries .got 3; expected 2"):
        open_bank(tmp_path / "bank", "full")
