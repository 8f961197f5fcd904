"""The interface of longest-suffix lookup, and the choice of who answers.

Shapes: B sequences, S positions.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np

from megatron_graft.bank.reader import Bank
from megatron_graft.errors import ConfigError
from megatron_graft.lookup.native import Body, NativeIndex, Pages
from megatron_graft.lookup.reference import ReferenceIndex

Implementation = Literal["auto", "native", "reference"]


class SuffixState(Protocol):
    """What generation remembers of B sequences between tokens: a few tokens each. Not safe to share."""

    @property
    def sequences(self) -> int:
        """B."""
        ...

    def reorder(self, parents_B: np.ndarray) -> None:
        """Let sequence i become what sequence ``parents_B[i]`` was (beam search); B may change.

        Args:
            parents_B: int32 or int64 ``[B]``, for the new B.

        Raises:
            IndexError: there is no such sequence; nothing has changed then.
            ArrayError: the array has the wrong dtype, shape or layout.
        """
        ...

    def restart(self, sequence: int) -> None:
        """Forget a sequence: its next token starts a document. Raises ``IndexError`` if it is not there."""
        ...


class SuffixIndex(Protocol):
    """Finds, for every position, the row of the longest key that ends there.

    It owns the keys and nothing else: no rows, no tokenizer, no state between calls. An index does not change
    once built, and any number of threads may call it at once.
    """

    min_order: int
    max_order: int

    def lookup(
        self,
        tokens_BS: np.ndarray,
        *,
        eod: int | None,
        document_starts_BS: np.ndarray | None = None,
        rows_out: np.ndarray | None = None,
        orders_out: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Look up every position of a batch.

        Args:
            tokens_BS: int32 or int64 ``[B, S]``, C-contiguous. An id below 0 or outside the vocabulary is
                part of no n-gram.
            eod: id of the end-of-document token, or None. It is part of no n-gram and the next token starts a
                document.
            document_starts_BS: bool ``[B, S]``; true where a document starts, beyond position 0 and what
                ``eod`` says.
            rows_out: int64 ``[B, S]`` to write into; with ``orders_out`` given too, a call allocates nothing
                (``native``).
            orders_out: uint8 ``[B, S]`` to write into.

        Returns:
            rows int64 ``[B, S]``, -1 at a miss, and orders uint8 ``[B, S]``, 0 at a miss.

        Raises:
            ArrayError: an array has the wrong dtype, shape or layout, or an output overlaps an input.
        """
        ...

    def start(self, sequences: int) -> Any:
        """A :class:`SuffixState` of ``sequences`` sequences without a token, for :meth:`step` of this index."""
        ...

    def step(
        self,
        state: Any,
        tokens_B: np.ndarray,
        *,
        eod: int | None,
        rows_out: np.ndarray | None = None,
        orders_out: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Append one token to every sequence and look it up: the answers of :meth:`lookup` on the whole sequences.

        Args:
            state: from :meth:`start` of this very index; changed in place.
            tokens_B: int32 or int64 ``[B]``.
            eod: as in :meth:`lookup`.
            rows_out: int64 ``[B]`` to write into.
            orders_out: uint8 ``[B]`` to write into.

        Returns:
            rows int64 ``[B]``, -1 at a miss, and orders uint8 ``[B]``, 0 at a miss.

        Raises:
            ArrayError: the state is of another index, an array has the wrong dtype, shape or layout, or an output
                overlaps another array.
        """
        ...


def open_index(
    bank: Bank,
    implementation: Implementation = "auto",
    *,
    pages: Pages = "file",
    body: Body = "auto",
    threads: int = 1,
) -> SuffixIndex:
    """Open the index of a bank.

    Args:
        bank: the open bank.
        implementation: ``"native"``, ``"reference"``, or ``"auto"``, which is ``"native"``: the slow one has
            to be asked for.
        pages: native only. ``"file"`` maps the index file: nothing is read until it is used, and all processes of a
            machine share it. ``"huge"`` copies it into huge pages of this process, which about doubles the rate of
            a large index.
        body: native only. The instructions to use; ``"auto"`` takes the widest that the machine has.
        threads: native only. Positions of one call are split over so many threads.

    Raises:
        NativeExtensionError: the native one is wanted and the extension is not built.
        BankFormatError: the index file is malformed; for the reference, the bank has a key twice.
        ConfigError: there is no such implementation, or the machine cannot do what is asked.
    """
    if implementation == "reference":
        return ReferenceIndex(bank)
    if implementation in ("auto", "native"):
        return NativeIndex(bank, pages=pages, body=body, threads=threads)
    raise ConfigError("lookup implementation", "is unknown", got=implementation, expected="auto, native or reference")
