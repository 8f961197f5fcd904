"""How much of a text a bank knows: the share of positions that match, by the order of the match.

Large data sets are sampled: whole documents, evenly spread, always the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.files import beside, write_json_atomically
from megatron_graft.lookup.index import SuffixIndex, open_index

MOST_POSITIONS = 2_000_000
"""About how many positions of a data set are looked up, if it has more."""
NUM_SIZES = 10
_CHUNK_TOKENS = 1 << 20


class Documents(Protocol):
    """What coverage needs of a data set: ``building.documents.MegatronDocuments`` is one."""

    num_tokens: int
    num_documents: int

    def chosen(self, wanted: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
        """Token ids of the documents whose numbers (int64) are wanted (bool)."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Positions looked up, and how many matched at each order. End-of-document tokens count as misses."""

    positions: int
    hits_by_order: dict[int, int]

    @property
    def hit_rate(self) -> float:
        """Share of positions that match at any order."""
        return sum(self.hits_by_order.values()) / max(1, self.positions)

    def share(self, order: int) -> float:
        """Share of positions whose longest match has this order."""
        return self.hits_by_order[order] / max(1, self.positions)

    def to_json(self) -> dict[str, Any]:
        """The JSON object of this coverage."""
        shares = {str(order): self.share(order) for order in self.hits_by_order}
        return {"positions": self.positions, "hit_rate": self.hit_rate, "share_by_order": shares}


def measure_coverage(
    index: SuffixIndex, documents: Iterable[np.ndarray], *, orders: Iterable[int], eod: int | None
) -> Coverage:
    """Look up every position of ``documents`` (integer arrays of token ids), each document by itself.

    Args:
        index: of the bank.
        documents: one token array per document.
        orders: the bank's orders.
        eod: id of the end-of-document token.
    """
    hits = np.zeros(256, dtype=np.int64)
    positions = 0
    for tokens_BS, starts_BS in _packed(documents):
        _, orders_BS = index.lookup(tokens_BS, eod=eod, document_starts_BS=starts_BS)
        hits += np.bincount(orders_BS.reshape(-1), minlength=256)
        positions += tokens_BS.size
    return Coverage(positions=positions, hits_by_order={order: int(hits[order]) for order in orders})


def sample_documents(
    documents: Documents, most_positions: int = MOST_POSITIONS, phase: float = 0.0
) -> Iterator[np.ndarray]:
    """Whole documents with about ``most_positions`` tokens in all, evenly spread; all of them if there are no more.

    Document i is taken where ``i * share + phase`` passes a whole number, so that neither length nor place is
    favoured and the same call always gives the same documents.

    Args:
        documents: the data set.
        most_positions: about how many tokens are wanted.
        phase: 0 to below 1; another one gives other documents.
    """
    share = min(1.0, most_positions / max(1, documents.num_tokens))

    def wanted(numbers: np.ndarray) -> np.ndarray:
        passes: np.ndarray = np.floor((numbers + 1) * share + phase) > np.floor(numbers * share + phase)
        return passes

    return documents.chosen(wanted)


def bank_sizes(num_rows: int, number: int = NUM_SIZES) -> tuple[int, ...]:
    """Sizes to open a bank with: ``num_rows`` halved again and again, at most ``number`` of them, ascending."""
    sizes = {max(1, num_rows >> halvings) for halvings in range(number)}
    return tuple(sorted(sizes))


def coverage_by_rows(
    path: Path, documents: Sequence[np.ndarray], sizes: Iterable[int], *, threads: int = 1
) -> dict[int, Coverage]:
    """Coverage of the banks of the K most frequent keys, for every K.

    Args:
        path: the bank.
        documents: one token array per document.
        sizes: values of K, 1 to the number of rows.
        threads: of the lookups.

    Raises:
        ConfigError: a size is out of range.
    """
    coverages = {}
    for rows in sizes:
        bank = open_bank(path, rows=rows)
        index = open_index(bank, threads=threads)
        coverages[rows] = measure_coverage(index, documents, orders=bank.orders, eod=bank.eod)
    return coverages


def coverage_path(bank: Path) -> Path:
    """Where a bank's coverage lies: beside it, since it is no part of what the bank is."""
    return beside(bank, ".coverage.json")


def write_coverage(bank: Bank, coverages: Mapping[str, Coverage]) -> None:
    """Write ``<bank>.coverage.json``."""
    data_sets = {name: coverage.to_json() for name, coverage in coverages.items()}
    write_json_atomically(coverage_path(bank.path), {"bank": bank.digest, "data_sets": data_sets})


def _packed(documents: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Whole documents end to end: int64 ``[1, S]`` tokens and boolean ``[1, S]`` document starts."""
    parts: list[np.ndarray] = []
    size = 0
    for document in documents:
        if not len(document):
            continue
        parts.append(document)
        size += len(document)
        if size >= _CHUNK_TOKENS:
            yield _pack(parts)
            parts, size = [], 0
    if parts:
        yield _pack(parts)


def _pack(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.concatenate(parts).astype(np.int64)
    starts = np.zeros(len(tokens), dtype=bool)
    starts[np.cumsum([0] + [len(part) for part in parts[:-1]])] = True
    return tokens[None], starts[None]
