"""Any bytes in any file of a bank end in an open bank or a BankError, and an open bank can be used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_graft.bank.keys import UNUSED
from megatron_graft.bank.manifest import INDEX_NAME, KEYS_NAME, MANIFEST_NAME, rows_name
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.errors import BankError
from tests.helpers.banks import make_bank, random_counts, refit_manifest

FILES = [MANIFEST_NAME, KEYS_NAME, INDEX_NAME, rows_name(12, 0, 2), rows_name(12, 1, 2)]
TRIES = 150


@pytest.fixture
def bank(tmp_path) -> Bank:
    return make_bank(tmp_path / "bank", random_counts(40, seed=4), row_dtype="int8", shard_rows=30, width=3)


def mutations(data: bytes, generator: np.random.Generator) -> Iterator[bytes]:
    """Bytes changed, cut out, put in or moved; half of the time among the first few hundred, where headers are."""
    for _ in range(TRIES):
        changed = bytearray(data)
        for _ in range(int(generator.integers(1, 4))):
            reach = min(len(changed), int(generator.choice([16, 400, len(data)])))
            place, length = int(generator.integers(reach)), int(generator.integers(1, 9))
            piece = generator.bytes(length)
            kind = generator.integers(5)
            if kind == 0:
                changed[place] = int(generator.integers(256))
            elif kind == 1:
                changed[place] = ord(generator.choice(list('0123456789[]{}",:-')))
            elif kind == 2:
                changed[place : place + length] = piece
            elif kind == 3:
                del changed[place : place + length]
            else:
                changed[place:place] = bytes(changed[:length]) if generator.random() < 0.5 else piece
        yield bytes(changed)


def use(path: Path) -> bool:
    """Open a bank in every way and gather all of its rows; tell whether any way was refused."""
    refused = False
    for verify in ("header", "sample", "full"):
        for gather in ("native", "reference"):
            try:
                bank = open_bank(path, verify, gather=gather)
            except BankError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                refused = True
                continue
            assert bank.float_rows(np.arange(UNUSED, bank.num_rows)).shape == (bank.num_rows + 1, bank.row_dim)
    return refused


@pytest.mark.parametrize("refit", [False, True], ids=["copied badly", "built badly"])
@pytest.mark.parametrize("name", FILES)
def test_no_mutation_of_a_file_does_worse_than_a_bank_error(bank, name, refit):
    path, data = bank.path / name, (bank.path / name).read_bytes()
    manifest = (bank.path / MANIFEST_NAME).read_bytes()
    seen = {use(bank.path)}
    for changed in mutations(data, np.random.default_rng(FILES.index(name))):
        path.write_bytes(changed)
        if refit and name != MANIFEST_NAME:
            refit_manifest(bank.path)
        seen.add(use(bank.path))
        (bank.path / MANIFEST_NAME).write_bytes(manifest)
    assert seen == {False, True}
