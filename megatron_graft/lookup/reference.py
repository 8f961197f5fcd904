"""Lookup in NumPy: for machines without the extension, and to hold the native one to account.

The keys form a trie walked from the newest token to the oldest. A level's nodes are the distinct suffixes of
that many tokens over all keys; a node's code is the exact integer ``node of the shorter suffix * vocab_size +
next older token``. Sorted codes make one step of the walk one binary search for all positions at once. No
hash, so no collision; a suffix that is no key itself is a node without a row, so a bank need not be closed
under suffixes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_graft.bank.keys import UNUSED
from megatron_graft.bank.manifest import KEYS_NAME
from megatron_graft.bank.reader import Bank
from megatron_graft.errors import BankFormatError
from megatron_graft.lookup.arguments import check_arguments, check_parents, check_step_arguments
from megatron_graft.ngram.oracle import MISS

_NO_NODE = -1


@dataclass(frozen=True, kw_only=True)
class _Level:
    """One length of suffix: int64 sorted ``codes [nodes]`` and each node's row, or MISS."""

    codes: np.ndarray
    rows: np.ndarray


class ReferenceState:
    """What :class:`ReferenceIndex` remembers of B sequences: int64 ``[B, max_order]``, newest token last."""

    def __init__(self, index: ReferenceIndex, sequences: int) -> None:
        self.index = index
        self._newest_BN = np.full((sequences, index.max_order), UNUSED, dtype=np.int64)

    @property
    def sequences(self) -> int:
        """B."""
        return len(self._newest_BN)

    def reorder(self, parents_B: np.ndarray) -> None:
        """See ``SuffixState.reorder``."""
        parents_B = check_parents(parents_B)
        if ((parents_B < 0) | (parents_B >= self.sequences)).any():
            raise IndexError(f"sequence {parents_B.tolist()} of {self.sequences}")
        self._newest_BN = self._newest_BN[parents_B]

    def restart(self, sequence: int) -> None:
        """See ``SuffixState.restart``."""
        if not 0 <= sequence < self.sequences:
            raise IndexError(f"sequence {sequence} of {self.sequences}")
        self._newest_BN[sequence] = UNUSED

    def append(self, tokens_B: np.ndarray) -> np.ndarray:
        """Take in one token a sequence and return all that is remembered."""
        self._newest_BN[:, :-1] = self._newest_BN[:, 1:].copy()
        self._newest_BN[:, -1] = tokens_B
        return self._newest_BN


class ReferenceIndex:
    """A :class:`~megatron_graft.lookup.index.SuffixIndex` in NumPy."""

    def __init__(self, bank: Bank) -> None:
        self.min_order, self.max_order = bank.min_order, bank.max_order
        self._vocab_size = bank.vocab_size
        self._levels = _build_levels(bank)

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
        rows_BS.fill(MISS)
        orders_BS.fill(0)
        reach_BS = _reach(tokens_BS, eod, self._vocab_size, document_starts_BS)
        nodes_BS = np.zeros(tokens_BS.shape, dtype=np.int64)
        for order, level in enumerate(self._levels, start=1):
            older_BS = _shift_right(tokens_BS, order - 1)
            walks_BS = (nodes_BS != _NO_NODE) & (reach_BS >= order)
            codes = nodes_BS[walks_BS] * self._vocab_size + older_BS[walks_BS]
            nodes_BS.fill(_NO_NODE)
            nodes_BS[walks_BS] = _find(level.codes, codes)
            found_BS = nodes_BS != _NO_NODE
            level_rows_BS = np.where(found_BS, level.rows[nodes_BS], MISS)
            np.copyto(rows_BS, level_rows_BS, where=level_rows_BS != MISS)
            np.copyto(orders_BS, np.uint8(order), where=level_rows_BS != MISS)
        return rows_BS, orders_BS

    def start(self, sequences: int) -> ReferenceState:
        """See :meth:`megatron_graft.lookup.index.SuffixIndex.start`."""
        return ReferenceState(self, sequences)

    def step(
        self,
        state: ReferenceState,
        tokens_B: np.ndarray,
        *,
        eod: int | None,
        rows_out: np.ndarray | None = None,
        orders_out: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`megatron_graft.lookup.index.SuffixIndex.step`."""
        rows_B, orders_B = check_step_arguments(self, state, tokens_B, rows_out, orders_out)
        # No n-gram is longer than what is remembered, so the last position has the whole sequence's answer.
        rows_BN, orders_BN = self.lookup(state.append(tokens_B), eod=eod)
        rows_B[:], orders_B[:] = rows_BN[:, -1], orders_BN[:, -1]
        return rows_B, orders_B


def _build_levels(bank: Bank) -> list[_Level]:
    levels = []
    nodes = np.zeros(bank.num_rows, dtype=np.int64)
    for order in range(1, bank.max_order + 1):
        has_token = bank.key_orders >= order
        if not has_token.any():  # the first rows of a bank may all be shorter than its longest key
            break
        # Fits: nodes < 2^32 and vocab_size <= 2^20, both bounded by the manifest.
        codes = nodes[has_token] * bank.vocab_size + bank.key_ids[has_token, -order]
        distinct, nodes[has_token] = np.unique(codes, return_inverse=True)
        ending = np.flatnonzero(bank.key_orders == order)
        rows = np.full(len(distinct), MISS, dtype=np.int64)
        rows[nodes[ending]] = ending
        repeated = ending[rows[nodes[ending]] != ending]
        if len(repeated):
            raise BankFormatError(bank.path / KEYS_NAME, f"row {repeated[0]} has a key that another row has too")
        levels.append(_Level(codes=distinct, rows=rows))
    return levels


def _reach(
    tokens_BS: np.ndarray, eod: int | None, vocab_size: int, document_starts_BS: np.ndarray | None
) -> np.ndarray:
    """How many tokens (int64 ``[B, S]``), its own included, an n-gram that ends at a position may have."""
    positions_S = np.arange(tokens_BS.shape[1])
    unusable_BS = (tokens_BS < 0) | (tokens_BS >= vocab_size)
    if eod is not None:
        unusable_BS |= tokens_BS == eod
    oldest_BS = np.where(unusable_BS, positions_S + 1, 0)
    if document_starts_BS is not None:
        oldest_BS = np.maximum(oldest_BS, np.where(document_starts_BS, positions_S, 0))
    return positions_S + 1 - np.maximum.accumulate(oldest_BS, axis=1)


def _shift_right(tokens_BS: np.ndarray, steps: int) -> np.ndarray:
    """The token ``steps`` positions earlier; :data:`UNUSED` where the sequence has none."""
    shifted_BS = np.full(tokens_BS.shape, UNUSED, dtype=np.int64)
    length = max(0, tokens_BS.shape[1] - steps)
    shifted_BS[:, tokens_BS.shape[1] - length :] = tokens_BS[:, :length]
    return shifted_BS


def _find(sorted_codes: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Index of each code among the sorted ones, or -1."""
    index = np.minimum(np.searchsorted(sorted_codes, codes), len(sorted_codes) - 1)
    return np.where(sorted_codes[index] == codes, index, _NO_NODE)
