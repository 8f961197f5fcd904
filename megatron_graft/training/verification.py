"""Finding and reading a micro-batch's memory a second time, by the reference path, and comparing (``--graft-verify``).

What is compared is what the model got: the packed tensor on its device and the sizes of the exchange. Both paths are
exact, so equal means equal in every byte.

Shapes: B sequences, S positions of the whole sequence, s positions of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_graft.data.memory_fetcher import MemoryFetcher
from megatron_graft.data.microbatch import MicroBatchMemory
from megatron_graft.errors import VerificationError


class Verifier:
    """Compares micro-batches with the reference path.

    Args:
        reference: fetches for the same layout, by the reference implementations.
        every: in which steps, counted from 1.
        rank: of this process, for the message.
    """

    def __init__(self, reference: MemoryFetcher, every: int, rank: int) -> None:
        self.reference, self.every, self.rank = reference, every, rank

    def is_due(self, step: int) -> bool:
        """Whether micro-batches of a step are compared."""
        return step % self.every == 0

    def check(self, step: int, tokens_BS: torch.Tensor, packed: torch.Tensor, exchange: torch.Tensor) -> None:
        """Compare one micro-batch. Waits for the device.

        Raises:
            VerificationError: with step and rank, and sequence and position where what differs has them.
        """
        layout, wanted = self.reference.layout, self.reference.fetch(tokens_BS, 0).memory
        got = MicroBatchMemory.unpack(layout, packed.cpu(), exchange, wanted.sequences, wanted.positions)
        comparison = _Comparison(self, step, tokens_BS)
        comparison.arrays("position in the document", got.position_BS, wanted.position_BS)
        for bank in layout.banks:
            comparison.arrays("length of match", got.order_BS(bank), wanted.order_BS(bank))
            comparison.arrays("place of the bank's row", got.inverse_BS(bank), wanted.inverse_BS(bank))
        for number, graft in enumerate(layout.grafts):
            rows = (_rows_by_position(memory, number, graft.bank) for memory in (got, wanted))
            comparison.arrays("byte of the bank's row", *rows)
        for number in range(len(layout.exchanged_rows)):
            comparison.sizes(got.exchange[number], wanted.exchange[number])
            comparison.requests(number, got, wanted)
        for number in range(len(layout.engrams)):
            comparison.arrays("place of a hashed row", got.reads_BSh(number), wanted.reads_BSh(number))


@dataclass(frozen=True)
class _Comparison:
    """Comparisons of one micro-batch, each of which raises ``VerificationError`` at the first difference."""

    verifier: Verifier
    step: int
    tokens_BS: torch.Tensor

    def arrays(self, what: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
        """Arrays ``[B, s, ...]``."""
        if torch.equal(got, wanted):
            return
        place = tuple((got != wanted).nonzero()[0].tolist())
        position = self.verifier.reference.layout.partition.position(self.tokens_BS.shape[1], place[1])
        self._fail(what, (place[0], position), got[place].item(), wanted[place].item())

    def sizes(self, got: torch.Tensor, wanted: torch.Tensor) -> None:
        """Sizes ``[2, T]`` of the exchange of one table."""
        for direction, of_got, of_wanted in zip(
            ("sent to", "received from"), got.tolist(), wanted.tolist(), strict=True
        ):
            for rank, sizes in enumerate(zip(of_got, of_wanted, strict=True)):
                if sizes[0] != sizes[1]:
                    self._fail(f"number of rows {direction} rank {rank}", None, *sizes)

    def requests(self, number: int, got: MicroBatchMemory, wanted: MicroBatchMemory) -> None:
        """Row ids travel as requests for rows of this rank's share, by asking rank; their number is the same here."""
        in_use = wanted.used(f"requests.{number}")
        found, right = (memory.requests(number)[:in_use].numpy() for memory in (got, wanted))
        if np.array_equal(found, right):
            return
        request = int(np.flatnonzero(found != right)[0])
        asker = int(np.searchsorted(np.cumsum(wanted.exchange[number, 0].numpy()), request, side="right"))
        layout = self.verifier.reference.layout
        first, _ = layout.partition.table_rows(layout.exchanged_rows[number])
        row, wrong = first + int(right[request]), first + int(found[request])
        what = "hash id" if number < len(layout.engrams) else "number of a trained row"
        self._fail(what, self._first_reader(number, row, asker), wrong, row)

    def _first_reader(self, number: int, row: int, asker: int) -> tuple[int, int]:
        """The first (sequence, position of the whole sequence) at which a rank reads a row of a table."""
        partition, rows_BSK = self.verifier.reference.layout.partition, self._rows(number)
        heads = slice(*partition.heads(rows_BSK.shape[2], asker))
        sequence, place, _ = np.argwhere(partition.part(rows_BSK[..., heads], asker) == row)[0].tolist()
        return sequence, partition.position(rows_BSK.shape[1], place, asker)

    def _rows(self, number: int) -> np.ndarray:
        """int64 ``[B, S, K]``, the rows of a table that whole sequences read, -1 where nothing is read."""
        sources, layout = self.verifier.reference.sources, self.verifier.reference.layout
        tokens = np.ascontiguousarray(self.tokens_BS.numpy())
        if number >= len(layout.engrams):
            bank = layout.trained[number - len(layout.engrams)].bank
            return sources.banks[bank][1].lookup(tokens, eod=sources.eod)[0][..., np.newaxis]
        engram = layout.engrams[number]
        rows_BSK = sources.hashers[engram.layer_number].rows(tokens)
        if engram.skip_hits_of is not None:
            _, orders_BS = sources.banks[engram.skip_hits_of][1].lookup(tokens, eod=sources.eod)
            rows_BSK[orders_BS > 0] = -1
        return rows_BSK

    def _fail(self, what: str, place: tuple[int, int] | None, got: Any, wanted: Any) -> None:
        where = "the whole micro-batch"
        if place is not None:
            where = f"sequence {place[0]} of the micro-batch, position {place[1]}"
        raise VerificationError(
            f"--graft-verify: step {self.step}, rank {self.verifier.rank}, {where}",
            f"the {what} is not what the reference path finds", got=got, expected=wanted,
            remedy="A bank's files or this machine's memory may be damaged: run tools/verify_bank.py --depth full, and "
            "go on from the last checkpoint.",
        )  # fmt: skip


def _rows_by_position(memory: MicroBatchMemory, number: int, bank: int) -> torch.Tensor:
    """uint8 ``[B, s, R]``; the places of the rows have been compared."""
    return memory.rows_PR(number)[memory.inverse_BS(bank).long()]
