"""An index file that is not what it claims to be: refused by name, or harmless. docs/format.md has the places."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_graft.bank.manifest import INDEX_NAME
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.errors import BankFormatError
from megatron_graft.lookup.index import open_index
from tests.helpers.banks import make_bank, random_counts

HEADER_BYTES = 4096
CHECKSUM_AT = 4092
ALL_ONES = 2**64 - 1
NUM_KEYS = 60
VOCAB_SIZE = 50
MAX_ORDER = 4


def section(order: int, field: int) -> int:
    """Place of a field in the section table of a bank whose shortest keys have one token."""
    return 128 + 64 * (order - 1) + field


# (what a reader has to name, place, bytes, wrong values)
FIELDS = [
    ("magic", 0, 8, [0, ALL_ONES]),
    ("version", 8, 4, [0, 2, 2**32 - 1]),
    ("byte order", 12, 4, [0x04030201, 0]),
    ("header size", 16, 4, [0, 64, 8192, 2**32 - 1]),
    ("section count", 20, 4, [0, 3, 5, 2**32 - 1]),
    ("shortest order", 24, 4, [0, 9, 2**32 - 1]),
    ("longest order", 28, 4, [0, 9, 2**32 - 1]),
    ("rows", 32, 8, [0, 2**32, ALL_ONES]),
    ("phantoms", 40, 8, [2**32, ALL_ONES]),
    ("vocabulary", 48, 8, [0, 2**20 + 1, ALL_ONES]),
    ("file size", 56, 8, [0, 2**63, ALL_ONES]),
    *((f"section of order {order}: order", section(order, 0), 4, [0, 8, 2**32 - 1]) for order in (1, 2, 4)),
    *((f"section of order {order}: key bits", section(order, 4), 4, [1, 64, 2**32 - 1]) for order in (1, 2, 4)),
    *((f"section of order {order}: offset", section(order, 8), 8, [0, 4095, 2**63, ALL_ONES]) for order in (1, 2, 4)),
    *((f"section of order {order}: size", section(order, 16), 8, [0, 2**63, ALL_ONES]) for order in (1, 2, 4)),
    *((f"section of order {order}: entries", section(order, 24), 8, [2**40, ALL_ONES]) for order in (1, 2, 4)),
    *((f"section of order {order}: buckets", section(order, 32), 8, [2**32, ALL_ONES]) for order in (1, 2, 4)),
    ("section of order 2: buckets", section(2, 32), 8, [0]),
    ("header", 3000, 4, [1]),
]
FAULTS = [
    pytest.param(name, offset, width, value, id=f"{name.replace(' ', '_')}@{offset}={value:#x}")
    for name, offset, width, values in FIELDS
    for value in values
]


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    counts = random_counts(NUM_KEYS, 3, vocab_size=VOCAB_SIZE, max_order=MAX_ORDER)
    assert {len(key) for key in counts} == {1, 2, 3, 4}
    return make_bank(tmp_path / "bank", counts, vocab_size=VOCAB_SIZE)


def alter(bank: Bank, change: Callable[[bytearray], None], *, repair: bool = True) -> Path:
    """Change the index file in place; its checksum is made right again, so that what lies behind it is looked at."""
    path = bank.path / INDEX_NAME
    content = bytearray(path.read_bytes())
    change(content)
    if repair and len(content) >= HEADER_BYTES:
        content[CHECKSUM_AT:HEADER_BYTES] = struct.pack("<I", zlib.crc32(content[:CHECKSUM_AT]))
    path.write_bytes(content)
    return path


def assert_refused(bank: Bank, path: Path, name: str) -> None:
    """Both ways in name the file, and the field."""
    for entrance in (lambda: open_bank(bank.path), lambda: open_index(bank)):
        with pytest.raises(BankFormatError) as caught:
            entrance()
        assert caught.value.subject == str(path)
        assert name in str(caught.value)


def random_text(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(-2, VOCAB_SIZE + 2, (8, 50), dtype=np.int32)


def test_the_specification_says_where_the_checksum_is(bank: Bank) -> None:
    content = (bank.path / INDEX_NAME).read_bytes()
    assert struct.unpack_from("<I", content, CHECKSUM_AT)[0] == zlib.crc32(content[:CHECKSUM_AT])
    before = open_index(bank).lookup(random_text(1), eod=0)
    alter(bank, lambda content: None)
    after = open_index(open_bank(bank.path)).lookup(random_text(1), eod=0)
    np.testing.assert_array_equal(before[0], after[0])


@pytest.mark.parametrize(("name", "offset", "width", "value"), FAULTS)
def test_a_wrong_field_of_the_header_is_refused_by_name(
    bank: Bank, name: str, offset: int, width: int, value: int
) -> None:
    wrong = (value & (2 ** (8 * width) - 1)).to_bytes(width, "little")

    def change(content: bytearray) -> None:
        assert content[offset : offset + width] != wrong
        content[offset : offset + width] = wrong

    assert_refused(bank, alter(bank, change), name)


def test_a_wrong_checksum_is_refused(bank: Bank) -> None:
    def change(content: bytearray) -> None:
        content[CHECKSUM_AT] ^= 1

    assert_refused(bank, alter(bank, change, repair=False), "checksum")


@pytest.mark.parametrize(("offset", "name"), [(64, "tokenizer_sha256"), (95, "tokenizer_sha256"), (96, "keys_sha256")])
def test_an_index_of_other_keys_or_another_tokenizer_is_refused(bank: Bank, offset: int, name: str) -> None:
    def change(content: bytearray) -> None:
        content[offset] ^= 0x40

    path = alter(bank, change)
    with pytest.raises(BankFormatError, match=name) as caught:
        open_bank(bank.path)
    assert caught.value.subject == str(path)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 4095, 4096, 4097, -64, -1])
def test_a_truncated_file_is_refused(bank: Bank, length: int) -> None:
    path = bank.path / INDEX_NAME
    content = path.read_bytes()
    path.write_bytes(content[:length])
    for entrance in (lambda: open_bank(bank.path), lambda: open_index(bank)):
        with pytest.raises(BankFormatError) as caught:
            entrance()
        assert INDEX_NAME in str(caught.value)


def test_bytes_behind_the_end_are_refused(bank: Bank) -> None:
    path = alter(bank, lambda content: content.extend(bytes(64)))
    with pytest.raises(BankFormatError, match=INDEX_NAME):
        open_bank(bank.path)
    with pytest.raises(BankFormatError, match="size"):
        open_index(bank)
    assert path.exists()


def test_a_missing_file_and_a_directory_in_its_place_are_refused(bank: Bank) -> None:
    path = bank.path / INDEX_NAME
    path.unlink()
    with pytest.raises(BankFormatError, match=INDEX_NAME):
        open_index(bank)
    path.mkdir()
    with pytest.raises(BankFormatError, match=INDEX_NAME):
        open_index(bank)


@pytest.mark.parametrize("fill", [0x00, 0x7F, 0x80, 0xFF])
def test_a_body_of_one_byte_only_does_no_harm(bank: Bank, fill: int) -> None:
    def change(content: bytearray) -> None:
        content[HEADER_BYTES:] = bytes([fill]) * (len(content) - HEADER_BYTES)

    alter(bank, change)
    check_harmless(bank)


@pytest.mark.parametrize("seed", range(12))
def test_random_changes_of_the_body_do_no_harm(bank: Bank, seed: int) -> None:
    generator = np.random.default_rng(seed)

    def change(content: bytearray) -> None:
        body = np.frombuffer(content, dtype=np.uint8)[HEADER_BYTES:]
        # From a few bytes to all of them.
        count = max(1, int(len(body) * generator.random() ** 3))
        body[generator.integers(0, len(body), count)] = generator.integers(0, 256, count)

    alter(bank, change)
    check_harmless(bank)


def check_harmless(bank: Bank) -> None:
    """Lookups in an altered index end, with rows that the bank has, and in every body with the same ones."""
    tokens_BS = random_text(5)
    rows_of_bodies = []
    for body in ("plain", "portable", "auto"):
        index = open_index(open_bank(bank.path), body=body)  # type: ignore[arg-type]
        rows_BS, orders_BS = index.lookup(tokens_BS, eod=0)
        assert ((rows_BS >= -1) & (rows_BS < NUM_KEYS)).all()
        assert ((rows_BS >= 0) == (orders_BS > 0)).all()
        assert (orders_BS <= MAX_ORDER).all()
        state = index.start(len(tokens_BS))
        for position in range(tokens_BS.shape[1]):
            rows_B, _ = index.step(state, np.ascontiguousarray(tokens_BS[:, position]), eod=0)
            np.testing.assert_array_equal(rows_B, rows_BS[:, position])
        rows_of_bodies.append(rows_BS)
    np.testing.assert_array_equal(rows_of_bodies[0], rows_of_bodies[1])
    np.testing.assert_array_equal(rows_of_bodies[0], rows_of_bodies[2])


@pytest.mark.parametrize("depth", ["sample", "full"])
def test_an_altered_body_is_found_where_that_is_asked_for(bank: Bank, depth: str) -> None:
    def change(content: bytearray) -> None:
        content[HEADER_BYTES:] = bytes(len(content) - HEADER_BYTES)

    alter(bank, change)
    open_bank(bank.path)
    with pytest.raises(BankFormatError, match=INDEX_NAME):
        open_bank(bank.path, verify=depth)  # type: ignore[arg-type]
