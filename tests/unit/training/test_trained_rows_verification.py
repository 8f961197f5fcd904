"""``--graft-verify`` with trained rows: which rows each rank asks for is compared with the reference path."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

from megatron_graft.bank.reader import Bank
from megatron_graft.data.memory_layout import SiteReading
from megatron_graft.data.partition import Partition
from megatron_graft.errors import VerificationError
from megatron_graft.ngram.oracle import brute_force_lookup
from megatron_graft.training.verification import Verifier
from tests.helpers.banks import EOD
from tests.helpers.memories import (
    engram_reading,
    graft_reading,
    layout_of,
    positions_of,
    random_tokens,
    small_bank,
    small_memory,
    small_tables,
)

PLACES = {
    "one rank": Partition(),
    "second of three": Partition(rank=1, size=3, sequence_parallel=True),
    "second of two, context parallel": Partition(rank=1, size=2, sequence_parallel=True, context_size=2),
}
NUMBER = 1  # of the exchange: that of the hashed table is 0


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return small_bank(tmp_path_factory.mktemp("verification") / "bank")


class Checked:
    """A micro-batch of a site that has trained rows and a table, on one rank, and its verifier."""

    def __init__(self, bank: Bank, place: Partition) -> None:
        self.bank, self.place, self.tokens = bank, place, random_tokens(7, 2, 12)
        engram = small_tables()
        graft = dataclasses.replace(graft_reading(bank), trained_rows=bank.num_rows)
        site = SiteReading(layer_number=2, graft=graft, engram=engram_reading(engram), exclusive=True)
        memory = small_memory(site, banks=[bank], engram=engram)
        layout = layout_of(memory, place)
        self.memory = memory.fetcher(layout).fetch(self.tokens, 3).memory
        self.verifier = Verifier(memory.reference_fetcher(layout), every=2, rank=place.rank)

    def check(self, packed: torch.Tensor | None = None, exchange: torch.Tensor | None = None) -> str | None:
        """What is found of the micro-batch, or of an altered one, in step 4."""
        packed = self.memory.packed if packed is None else packed
        try:
            self.verifier.check(4, self.tokens, packed, self.memory.exchange if exchange is None else exchange)
        except VerificationError as error:
            return str(error)
        return None

    def altered(self, name: str, element: int) -> torch.Tensor:
        """The packed tensor with the lowest bit of an int32 of a section changed."""
        packed, section = self.memory.packed.clone(), self.memory.section(name)
        packed[section.data_ptr() - self.memory.packed.data_ptr() + 4 * element] ^= 1
        return packed

    def places_of(self, row: int, asker: int) -> set[tuple[int, int]]:
        """(sequence, position of the whole sequence) at which a rank reads a row."""
        bank, tokens = self.bank, self.tokens.numpy()
        rows, _ = brute_force_lookup(bank.rows_of_keys(), tokens, EOD, bank.min_order, bank.max_order)
        mine = positions_of(self.place, tokens.shape[1], asker)
        return {(int(b), int(mine[s])) for b, s in np.argwhere(rows[:, mine] == row)}


@pytest.fixture(params=PLACES)
def checked(request: pytest.FixtureRequest, bank: Bank) -> Checked:
    return Checked(bank, PLACES[request.param])


def test_what_was_fetched_passes(checked: Checked) -> None:
    assert checked.check() is None


def test_whichever_request_is_altered_is_found_with_a_position_that_reads_the_row(checked: Checked) -> None:
    asked = checked.memory.used(f"requests.{NUMBER}")
    assert asked > 0
    sent = checked.memory.exchange[NUMBER, 0].tolist()
    first, _ = checked.place.table_rows(checked.bank.num_rows)
    for request in range(asked):
        message = checked.check(checked.altered(f"requests.{NUMBER}", request))
        assert message is not None
        found = re.match(
            r"--graft-verify: step 4, rank \d, sequence (\d+) of the micro-batch, position (\d+): the number of a "
            r"trained row is not what the reference path finds \(got (\d+); expected (\d+)\)", message,
        )  # fmt: skip
        assert found, message
        row = first + int(checked.memory.requests(NUMBER)[request])
        assert (int(found[3]), int(found[4])) == (first + ((row - first) ^ 1), row)
        asker = int(np.searchsorted(np.cumsum(sent), request, side="right"))
        assert (int(found[1]), int(found[2])) in checked.places_of(row, asker)


def test_an_altered_place_is_found(checked: Checked) -> None:
    message = checked.check(checked.altered("inverse.0", 3))
    assert message is not None and "the place of the bank's row is not what" in message


@pytest.mark.parametrize("side", [0, 1])
def test_sizes_of_the_exchange_are_compared(checked: Checked, side: int) -> None:
    for rank in range(checked.place.size):
        exchange = checked.memory.exchange.clone()
        exchange[NUMBER, side, rank] += 1
        message = checked.check(exchange=exchange)
        assert message is not None
        assert f"the number of rows {('sent to', 'received from')[side]} rank {rank} is not what" in message
