"""``docs/format.md`` against the package: a reader written from the page alone gives the same answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_graft.bank.reader import open_bank
from megatron_graft.lookup.index import open_index
from megatron_graft.ngram.oracle import brute_force_lookup
from tests.helpers.banks import EOD, make_bank
from tests.helpers.independent_reader import IndependentIndex, read_keys, read_manifest, read_rows

COMMITTED = Path(__file__).parents[2] / "compat" / "bank-v2"


def random_bank(path: Path, seed: int, orders: list[int], vocab_size: int, keys: int) -> None:
    rng = np.random.default_rng(seed)
    used = rng.integers(1, vocab_size, 6)
    counts = {tuple(rng.choice(used, rng.choice(orders)).tolist()): int(rng.integers(1, 9)) for _ in range(keys)}
    make_bank(path, counts, vocab_size=vocab_size, layers=(3, 7), width=5)


@pytest.mark.parametrize(
    ("orders", "vocab_size", "keys"),
    [([2, 3, 4], 50, 300), ([1, 2], 7, 30), ([1, 5, 8], 1000, 200), ([3], 2**20, 100), ([1], 3, 2)],
)
def test_a_reader_written_from_the_page_gives_the_same_answers(tmp_path, orders, vocab_size, keys):
    random_bank(tmp_path / "bank", 0, orders, vocab_size, keys)
    bank = open_bank(tmp_path / "bank", "full")
    manifest, index = read_manifest(bank.path), IndependentIndex(bank.path / "index.qbt")
    assert {key: row for row, (key, _) in enumerate(read_keys(bank.path))} == bank.rows_of_keys()
    assert index.keys_sha256.hex() == manifest["identity"]["files"][0]["sha256"]
    assert index.tokenizer_sha256.hex() == bank.tokenizer_fingerprint

    rng = np.random.default_rng(1)
    pieces = [key[: rng.integers(1, len(key) + 1)] for key in bank.rows_of_keys() for _ in range(2)]
    rng.shuffle(pieces := [*pieces, (EOD,), (-1,), (vocab_size,)])
    document = [token for piece in pieces for token in piece]
    for limit in (bank.num_rows, bank.num_rows // 2 + 1):
        rows, found = open_index(open_bank(bank.path, rows=limit)).lookup(np.array([document]), eod=EOD)
        assert index.lookup(document, EOD, limit) == list(zip(rows[0].tolist(), found[0].tolist(), strict=True))
    expected, _ = brute_force_lookup(bank.rows_of_keys(), np.array([document]), EOD, bank.min_order, bank.max_order)
    assert [row for row, _ in index.lookup(document, EOD)] == expected[0].tolist()
    assert {-1} < set(expected[0].tolist())


def test_the_committed_bank_is_what_the_page_says():
    bank = open_bank(COMMITTED)
    manifest = read_manifest(COMMITTED)
    gathered = np.empty((bank.num_rows, bank.row_bytes), np.uint8)
    bank.gather(np.arange(bank.num_rows), gathered)
    assert read_rows(COMMITTED, manifest) == [row.tobytes() for row in gathered]
    assert manifest["index"]["phantoms"] == IndependentIndex(COMMITTED / "index.qbt").phantoms
