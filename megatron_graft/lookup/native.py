"""Lookup in C++: the bank's index file, mapped (``csrc/suffix_index.hpp``). Whole sequences without the GIL."""

from __future__ import annotations

import os
from typing import Any, Literal

import numpy as np

from megatron_graft.bank.arrays import check_threads
from megatron_graft.bank.extension import load_extension
from megatron_graft.bank.index_file import check_index_header
from megatron_graft.bank.reader import Bank
from megatron_graft.errors import ConfigError
from megatron_graft.lookup.arguments import check_arguments, check_parents, check_step_arguments

Pages = Literal["file", "huge"]
Body = Literal["auto", "plain", "portable", "avx2", "avx512"]


class NativeState:
    """What :class:`NativeIndex` remembers of B sequences between tokens; see ``SuffixState``."""

    def __init__(self, index: NativeIndex, state: Any) -> None:
        self.index = index
        self._state = state

    @property
    def sequences(self) -> int:
        """B."""
        return int(self._state.sequences)

    def reorder(self, parents_B: np.ndarray) -> None:
        """See ``SuffixState.reorder``."""
        self._state.reorder(check_parents(parents_B))

    def restart(self, sequence: int) -> None:
        """See ``SuffixState.restart``."""
        self._state.restart(sequence)


class NativeIndex:
    """A :class:`~megatron_graft.lookup.index.SuffixIndex` over the compiled extension."""

    def __init__(self, bank: Bank, *, pages: Pages = "file", body: Body = "auto", threads: int = 1) -> None:
        self.min_order, self.max_order = bank.min_order, bank.max_order
        path = bank.index_path
        check_threads(threads)
        # Again, and against this bank: it may have been opened without a look into its index.
        check_index_header(path, bank.manifest.identity, bank.manifest.index)
        try:
            self._index = load_extension().SuffixIndex(os.fsencode(path), bank.num_rows, pages, body, threads)
        except (OSError, ValueError) as error:
            got = f"pages={pages!r}, body={body!r}, threads={threads}"
            raise ConfigError("lookup", f"cannot be had as asked: {error}", got=got) from error

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
        self._index.lookup(tokens_BS, eod, document_starts_BS, rows_BS, orders_BS)
        return rows_BS, orders_BS

    def start(self, sequences: int) -> NativeState:
        """See :meth:`megatron_graft.lookup.index.SuffixIndex.start`."""
        return NativeState(self, self._index.start(sequences))

    def step(
        self,
        state: NativeState,
        tokens_B: np.ndarray,
        *,
        eod: int | None,
        rows_out: np.ndarray | None = None,
        orders_out: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`megatron_graft.lookup.index.SuffixIndex.step`."""
        rows_B, orders_B = check_step_arguments(self, state, tokens_B, rows_out, orders_out)
        self._index.step(state._state, tokens_B, eod, rows_B, orders_B)
        return rows_B, orders_B
