"""Lookup in C++: a hash table of whole keys (``csrc/suffix_table.hpp``), called without the GIL."""

from __future__ import annotations

import numpy as np

from megatron_graft.bank.extension import load_extension
from megatron_graft.bank.manifest import KEYS_NAME
from megatron_graft.bank.reader import Bank
from megatron_graft.errors import BankFormatError
from megatron_graft.lookup.arguments import check_arguments


class NativeIndex:
    """A :class:`~megatron_graft.lookup.index.SuffixIndex` over the compiled extension."""

    def __init__(self, bank: Bank) -> None:
        self.min_order, self.max_order = bank.min_order, bank.max_order
        extension = load_extension()
        try:
            self._table = extension.SuffixTable(bank.key_ids, bank.key_orders, bank.vocab_size)
        except ValueError as error:
            raise BankFormatError(bank.path / KEYS_NAME, str(error)) from error

    def lookup(
        self,
        tokens_BS: np.ndarray,
        *,
        eod: int | None,
        document_starts_BS: np.ndarray | None = None,
        rows_out: np.ndarray | None = None,
        orders_out: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`megatron_graft.lookup.index.SuffixIndex.lookup`."""
        arguments = check_arguments(tokens_BS, document_starts_BS, rows_out, orders_out)
        rows_BS, orders_BS = arguments.rows_BS, arguments.orders_BS
        self._table.lookup(tokens_BS, eod, document_starts_BS, rows_BS, orders_BS)
        return rows_BS, orders_BS
