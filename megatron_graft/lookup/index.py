"""The interface of longest-suffix lookup, and the choice of who answers.

Shapes: B sequences, S positions.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from megatron_graft.bank.reader import Bank
from megatron_graft.errors import ConfigError
from megatron_graft.lookup.native import NativeIndex
from megatron_graft.lookup.reference import ReferenceIndex

Implementation = Literal["auto", "native", "reference"]


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


def open_index(bank: Bank, implementation: Implementation = "auto") -> SuffixIndex:
    """Build the index of a bank's keys in memory.

    Args:
        bank: the open bank.
        implementation: ``"native"``, ``"reference"``, or ``"auto"``, which is ``"native"``: the slow one has
            to be asked for.

    Raises:
        NativeExtensionError: the native one is wanted and the extension is not built.
        BankFormatError: the bank has a key twice.
        ConfigError: there is no such implementation.
    """
    if implementation == "reference":
        return ReferenceIndex(bank)
    if implementation in ("auto", "native"):
        return NativeIndex(bank)
    raise ConfigError("lookup implementation", "is unknown", got=implementation, expected="auto, native or reference")
