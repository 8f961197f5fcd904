"""Comparing with the reference path: every bit that the model reads is compared, and a difference is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from megatron_graft.bank.reader import Bank
from megatron_graft.data.memory_layout import SiteReading
from megatron_graft.data.microbatch import MicroBatchMemory
from megatron_graft.data.partition import Partition
from megatron_graft.errors import VerificationError
from megatron_graft.ngram.oracle import brute_force_lookup
from megatron_graft.training.verification import Verifier
from tests.helpers.banks import EOD
from tests.helpers.memories import (
    engram_reading,
    graft_reading,
    layout_of,
    oracle_rows,
    positions_of,
    random_tokens,
    section_names,
    small_bank,
    small_memory,
    small_tables,
)

LAYERS = (2, 5)
PLACES = {
    "one rank": Partition(),
    "second of two, columns": Partition(rank=1, size=2),
    "second of three, sequence parallel": Partition(rank=1, size=3, sequence_parallel=True),
    "second of three, context parallel": Partition(context_rank=1, context_size=3),
}
SECTIONS = [
    "position", "order.0", "inverse.0", "reads.0", "reads.1", "rows.0", "rows.1", "requests.0", "requests.1"
]  # fmt: skip
WHAT = {
    "position": "position in the document", "order": "length of match", "inverse": "place of the bank's row",
    "rows": "byte of the bank's row", "reads": "place of a hashed row", "requests": "hash id",
}  # fmt: skip


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return small_bank(tmp_path_factory.mktemp("verification") / "bank", row_dtype="int8")


@dataclass
class Fault:
    """What the verifier says of a micro-batch."""

    step: int
    rank: int
    place: tuple[int, int] | None
    what: str


@dataclass
class Checked:
    """A micro-batch on one rank, and its verifier."""

    bank: Bank
    place: Partition
    tokens: torch.Tensor = field(default_factory=lambda: random_tokens(7, 2, 12))

    def __post_init__(self) -> None:
        self.engram = small_tables(LAYERS)
        first, second = (engram_reading(self.engram, layer) for layer in LAYERS)
        readings = [
            SiteReading(layer_number=2, graft=graft_reading(self.bank), engram=first, exclusive=True),
            SiteReading(layer_number=5, graft=graft_reading(self.bank, 0, (2, 9)), engram=second),
        ]
        memory = small_memory(*readings, banks=[self.bank], engram=self.engram)
        layout = layout_of(memory, self.place)
        self.memory: MicroBatchMemory = memory.fetcher(layout).fetch(self.tokens, 3).memory
        self.verifier = Verifier(memory.reference_fetcher(layout), every=2, rank=self.place.rank)

    def check(self, packed: torch.Tensor | None = None, exchange: torch.Tensor | None = None) -> Fault | None:
        """What is found of the micro-batch, or of an altered one, in step 4."""
        packed = self.memory.packed if packed is None else packed
        try:
            self.verifier.check(4, self.tokens, packed, self.memory.exchange if exchange is None else exchange)
        except VerificationError as error:
            place = r"(?:sequence (\d+) of the micro-batch, position (\d+)|the whole micro-batch)"
            pattern = (
                rf"--graft-verify: step (\d+), rank (\d+), {place}: the (.+) is not what the reference path finds "
            )
            found = re.match(pattern, str(error))
            assert found, error
            where = None if found[3] is None else (int(found[3]), int(found[4]))
            return Fault(int(found[1]), int(found[2]), where, found[5])
        return None

    def used(self, name: str) -> int:
        """How many first bytes of a section are read."""
        section = self.memory.section(name)
        if not name.startswith(("rows", "requests")):
            return section.numel() * section.itemsize
        return self.memory.used(name) * section[0].numel() * section.itemsize

    def flipped(self, name: str, byte: int, bit: int) -> torch.Tensor:
        """The packed tensor with one bit of a section changed."""
        packed = self.memory.packed.clone()
        start = self.memory.section(name).data_ptr() - self.memory.packed.data_ptr()
        packed[start + byte] ^= 1 << bit
        return packed

    def places_of(self, name: str, byte: int) -> set[tuple[int, int]]:
        """(sequence, position of the whole sequence) of those that read a byte of a section."""
        mine = positions_of(self.place, self.tokens.shape[1])
        section, number = self.memory.section(name), int((name.split(".") + ["0"])[1])
        if name.startswith("requests"):
            return self._askers_of(number, byte // 4)
        if name.startswith("rows"):
            row = byte // section.shape[1]
            places = np.argwhere(self.memory.inverse_BS(0).numpy() == row)
        else:
            here = byte // (section.itemsize * section[0, 0].numel())
            places = np.array([np.unravel_index(here, section.shape[:2])])
        return {(int(b), int(mine[s])) for b, s in places}

    def _askers_of(self, number: int, request: int) -> set[tuple[int, int]]:
        """Of the rank that sent a request: its positions that read the row."""
        sent = self.memory.exchange[number, 0].tolist()
        asker = int(np.searchsorted(np.cumsum(sent), request, side="right"))
        first, _ = self.place.table_rows(self.memory.layout.engrams[number].reading.num_rows)
        row = first + int(self.memory.requests(number)[request])
        positions = positions_of(self.place, self.tokens.shape[1], asker)
        heads = slice(*self.place.heads(6, asker))
        rows_BSK = oracle_rows(self.engram, LAYERS[number], self.tokens)
        if number == 0:  # exclusive
            keys, tokens = self.bank.rows_of_keys(), self.tokens.numpy()
            _, orders_BS = brute_force_lookup(keys, tokens, EOD, self.bank.min_order, self.bank.max_order)
            rows_BSK[orders_BS > 0] = -1
        rows = rows_BSK[:, positions, heads]
        return {(int(b), int(positions[s])) for b, s, _ in np.argwhere(rows == row)}


@pytest.fixture(params=PLACES)
def checked(request: pytest.FixtureRequest, bank: Bank) -> Checked:
    return Checked(bank, PLACES[request.param])


def bits_of(checked: Checked, name: str) -> Iterator[tuple[int, int]]:
    """(byte, bit) to flip: two bits of the first byte, of the last, and of some between."""
    size = checked.used(name)
    for byte in sorted({0, 1, size // 3, size // 2, size - 2, size - 1}):
        yield from ((byte, 0), (byte, 7))


def test_what_was_fetched_passes(checked: Checked) -> None:
    assert section_names(checked.memory.layout) == sorted(SECTIONS, key=section_names(checked.memory.layout).index)
    assert checked.check() is None


def test_what_lies_behind_the_used_fronts_is_not_compared(checked: Checked) -> None:
    packed = torch.full_like(checked.memory.packed, 0xA5)
    for first, end in checked.memory.used_ranges():
        packed[first:end] = checked.memory.packed[first:end]
    assert checked.check(packed) is None


@pytest.mark.parametrize("name", SECTIONS)
def test_a_flipped_bit_is_found_and_placed(checked: Checked, name: str) -> None:
    for byte, bit in bits_of(checked, name):
        found = checked.check(checked.flipped(name, byte, bit))
        assert found is not None, (byte, bit)
        assert (found.step, found.rank, found.what) == (4, checked.place.rank, WHAT[name.split(".")[0]])
        assert found.place in checked.places_of(name, byte), (byte, bit)


def test_a_place_far_beyond_the_rows_is_found_whatever_lies_there(bank: Bank) -> None:
    checked = Checked(bank, PLACES["one rank"])
    misses = (checked.memory.inverse_BS(0).flatten() == 0).nonzero().flatten().tolist()
    assert misses
    packed = checked.flipped("inverse.0", 4 * misses[0] + 2, 3)
    for graft in range(2):
        rows = MicroBatchMemory.unpack(checked.memory.layout, packed, checked.memory.exchange, 2, 12).rows_PR(graft)
        rows[checked.memory.used(f"rows.{graft}") :] = 0  # the model would read a zero row, or crash
    found = checked.check(packed)
    assert found is not None
    assert found.place == divmod(misses[0], 12)


@pytest.mark.parametrize("number", [0, 1])
def test_whichever_request_is_altered_its_asker_is_named(checked: Checked, number: int) -> None:
    """And a position that reads the row: not one where a match of the bank keeps an exclusive site from reading."""
    name = f"requests.{number}"
    for request in range(checked.memory.used(name)):
        found = checked.check(checked.flipped(name, 4 * request, 1))
        assert found is not None
        assert found.place in checked.places_of(name, 4 * request), request


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("number", [0, 1])
def test_sizes_of_the_exchange_are_compared(checked: Checked, number: int, side: int) -> None:
    for rank in range(checked.place.size):
        for bit in (0, 3, 40):
            exchange = checked.memory.exchange.clone()
            exchange[number, side, rank] ^= 1 << bit
            found = checked.check(exchange=exchange)
            assert found is not None
            assert (found.step, found.rank, found.place) == (4, checked.place.rank, None)
            assert found.what == f"number of rows {('sent to', 'received from')[side]} rank {rank}"


def test_memory_of_other_tokens_is_found(checked: Checked) -> None:
    checked.tokens = checked.tokens.clone()
    checked.tokens[1, 6] = checked.tokens[1, 6] % 11 + 1
    assert checked.check() is not None


def test_steps_are_due_at_multiples(bank: Bank) -> None:
    reference = Checked(bank, PLACES["one rank"]).verifier.reference
    assert [step for step in range(1, 10) if Verifier(reference, 3, 0).is_due(step)] == [3, 6, 9]
    assert all(Verifier(reference, 1, 0).is_due(step) for step in range(1, 10))
