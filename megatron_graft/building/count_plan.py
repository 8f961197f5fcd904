"""How counting is cut into tasks and into memory: fixed before anything is counted, the same for every worker.

None of it decides what is counted: the result is the same however the corpus and the memory are cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.building.data_set import DataSet
from megatron_graft.building.documents import MegatronDocuments
from megatron_graft.errors import ConfigError, DataError

MIN_ORDER, MAX_ORDER = 2, 8
MAX_VOCAB_SIZE = 1 << 20
COUNT_BY = ("occurrences", "documents")
UNITS_OF_COUNT = 1 << 16
"""Units that a count of 1 is where data sets have weights. Units are whole, so sums do not depend on their order."""
MIN_MEMORY_BYTES = 256_000_000
INTERPRETER_BYTES = 80_000_000
"""Set aside for Python, NumPy and the code; measured at 36 MB in a worker of a pool."""
BUFFER_BYTES = 24_000_000
"""Set aside for buffers, tables in cache and the ends of runs."""
MAX_TASKS = 4096

_LEAST_SLICE_TOKENS, _SLICE_TOKENS = 1 << 20, 1 << 28
_MANY_SLICES = 512
_PARTITION_TOKENS = 1 << 28
_SHARES = 1024
_DOCUMENT_SHARE = 4  # of memory, 1 to so many parts, may go to the keys of one document
_BYTES_OF_DOCUMENT_TOKEN = 48  # at most: two slots of 12 bytes, rounded up to a power of two


@dataclass(frozen=True, kw_only=True)
class CountedSet:
    """A data set as counting reads it.

    Attributes:
        prefix: absolute path without ``.bin``/``.idx``.
        id_bytes: 2 (unsigned) or 4 (signed).
        units: what an occurrence counts.
    """

    prefix: str
    id_bytes: int
    units: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Entries of one data set, end to end: numbers of the first entry and token, and how many of both."""

    data_set: int
    first_entry: int
    num_entries: int
    first_token: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class CountPlan:
    """What to count and how it is cut; see :func:`plan_counts`.

    Attributes:
        data_sets: in the order of their flags.
        slices: a map task reads one: whole entries.
        orders: ascending, without a gap. Lower ones are counted too, since higher ones need them.
        eod: token that is in no n-gram, or None.
        vocab_size: ids are below.
        min_count: rarer n-grams are not kept.
        units_of_count: units of a count of 1.
        longest_document: 0 counts occurrences; otherwise a document counts an n-gram once, and has at most so
            many tokens.
        num_partitions: reduce tasks of an order.
        shares_of_partition: parts of a partition that can be read apart.
        memory_bytes: of a worker, the interpreter included.
        most_pool_blocks: limits the 4 KiB blocks of keys in memory, whatever the memory; None does not.
        most_table_entries: limits the kept n-grams in memory likewise.
        block_tokens: of the corpus in memory at a time.
    """

    data_sets: tuple[CountedSet, ...]
    slices: tuple[tuple[Piece, ...], ...]
    orders: tuple[int, ...]
    eod: int | None
    vocab_size: int
    min_count: int
    units_of_count: int
    longest_document: int
    num_partitions: int
    shares_of_partition: int
    memory_bytes: int
    most_pool_blocks: int | None = None
    most_table_entries: int | None = None
    block_tokens: int = 32768

    @property
    def shares(self) -> int:
        """Shares of all partitions."""
        return self.num_partitions * self.shares_of_partition

    @property
    def working_bytes(self) -> int:
        """What is left of a worker's memory for keys and tables."""
        return self.memory_bytes - INTERPRETER_BYTES - BUFFER_BYTES - _document_bytes(self.longest_document)

    @property
    def split_runs(self) -> bool:
        """Whether data sets count differently, so that what was found in them must stay apart."""
        return len({data.units for data in self.data_sets}) > 1

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CountPlan:
        """Read what :meth:`to_json` wrote."""
        fields = dict(value)
        return cls(
            **fields
            | {
                "data_sets": tuple(CountedSet(**data) for data in fields["data_sets"]),
                "slices": tuple(tuple(Piece(**piece) for piece in pieces) for pieces in fields["slices"]),
                "orders": tuple(fields["orders"]),
            }
        )


def check_orders(orders: Sequence[int]) -> tuple[int, ...]:
    """Return ``orders`` as a tuple if they are ascending, without a gap, and within 2 to 8.

    Raises:
        ConfigError: they are not.
    """
    wanted = tuple(orders)
    contiguous = wanted == tuple(range(wanted[0], wanted[0] + len(wanted))) if wanted else False
    if not contiguous or wanted[0] < MIN_ORDER or wanted[-1] > MAX_ORDER:
        raise ConfigError(
            "--orders",
            "is not a range of orders that can be counted",
            got=" ".join(map(str, wanted)) or "none",
            expected=f"ascending, without a gap, within {MIN_ORDER} to {MAX_ORDER}, such as 2 3 4",
        )
    return wanted


def plan_counts(
    documents: MegatronDocuments,
    *,
    weights: Sequence[float] | None,
    orders: Sequence[int],
    eod: int | None,
    min_count: int,
    count_by: str,
    memory_bytes: int,
    num_slices: int | None = None,
    num_partitions: int | None = None,
    workers: int = 1,
) -> CountPlan:
    """Cut the counting of a corpus into tasks.

    With ``weights``, as in Megatron's ``--data-path``, data set d is to be the share w_d / sum(w) of what is
    trained on, so an occurrence in it counts ``w_d / sum(w) * T / tokens_d`` times, where T is the number of all
    tokens: in units of 1/65536, rounded to the nearest; a data set whose occurrences round to no unit is refused.
    ``min_count`` is compared with the sum of units, and the count that is published is that sum rounded to the
    nearest whole number (half upwards), at least 1. Without weights an occurrence counts 1.

    Args:
        documents: the corpus.
        weights: one for every data set, all above 0; or None.
        orders: see :func:`check_orders`.
        eod: id of the end-of-document token, which ends a document and is in no n-gram; or None.
        min_count: rarer n-grams are dropped.
        count_by: ``occurrences``, or ``documents``: a document counts an n-gram once.
        memory_bytes: most memory of a worker, the interpreter included.
        num_slices: map tasks of an order; None: as fits the corpus and the workers.
        num_partitions: reduce tasks of an order; None: likewise.
        workers: processes that will work at a time.

    Raises:
        ConfigError: naming the flag whose value is unusable.
        DataError: the vocabulary is too large, or the index of a data set cannot be read.
    """
    if min_count < 1:
        raise ConfigError("--min-count", "is not a count", got=min_count, expected="at least 1")
    if count_by not in COUNT_BY:
        raise ConfigError("--count-by", "is unknown", got=count_by, expected=" or ".join(COUNT_BY))
    if documents.vocab_size > MAX_VOCAB_SIZE:
        raise DataError(
            "--tokenizer-model", "has too many tokens", got=documents.vocab_size, expected=f"at most {MAX_VOCAB_SIZE}"
        )
    _check_memory(memory_bytes)
    longest = documents.longest if count_by == "documents" else 0
    _check_longest(longest, memory_bytes)
    slices = _tasks("--count-slices", num_slices, _slices_for(documents.num_tokens, workers))
    partitions = _tasks("--count-partitions", num_partitions, _partitions_for(documents.num_tokens, workers))
    units = [1] * len(documents.data_sets) if weights is None else _units(documents, weights)
    return CountPlan(
        data_sets=tuple(
            CountedSet(prefix=str(Path(data.prefix).absolute()), id_bytes=data.id_dtype.itemsize, units=unit)
            for data, unit in zip(documents.data_sets, units, strict=True)
        ),
        slices=tuple(tuple(pieces) for pieces in _cut(documents, slices)),
        orders=check_orders(orders),
        eod=eod,
        vocab_size=documents.vocab_size,
        min_count=min_count,
        units_of_count=1 if weights is None else UNITS_OF_COUNT,
        longest_document=longest,
        num_partitions=partitions,
        shares_of_partition=-(-_SHARES // partitions),
        memory_bytes=memory_bytes,
    )


def _check_memory(memory_bytes: int) -> None:
    if memory_bytes < MIN_MEMORY_BYTES:
        raise ConfigError(
            "--memory-gb",
            "is too little for a worker",
            got=f"{memory_bytes:,} bytes for each",
            expected=f"at least {MIN_MEMORY_BYTES:,} for each",
            remedy="Raise it, or lower --workers.",
        )


def _check_longest(longest: int, memory_bytes: int) -> None:
    most = memory_bytes // _DOCUMENT_SHARE // _BYTES_OF_DOCUMENT_TOKEN
    if longest > most:
        raise ConfigError(
            "--memory-gb",
            "is too little to count by documents: the keys of a document must fit in memory",
            got=f"a document of {longest:,} tokens",
            expected=f"at most {most:,} tokens",
            remedy="Raise it, lower --workers, or count by occurrences.",
        )


def _document_bytes(longest: int) -> int:
    return longest * _BYTES_OF_DOCUMENT_TOKEN


def _tasks(flag: str, given: int | None, derived: int) -> int:
    number = derived if given is None else given
    if not 1 <= number <= MAX_TASKS:
        raise ConfigError(flag, "is no number of tasks", got=number, expected=f"1 to {MAX_TASKS}")
    return number


def _slices_for(num_tokens: int, workers: int) -> int:
    """As few as keep all workers busy: every map task reads all kept n-grams once."""
    if num_tokens < workers * _LEAST_SLICE_TOKENS:
        return max(1, num_tokens // _LEAST_SLICE_TOKENS)
    rounds = math.ceil(num_tokens / (workers * max(_SLICE_TOKENS, num_tokens // _MANY_SLICES)))
    return min(MAX_TASKS, workers * rounds)


def _partitions_for(num_tokens: int, workers: int) -> int:
    if num_tokens < workers * _LEAST_SLICE_TOKENS:
        return max(1, num_tokens // _LEAST_SLICE_TOKENS)
    return min(_SHARES, workers * math.ceil(num_tokens / (workers * _PARTITION_TOKENS)))


def _units(documents: MegatronDocuments, weights: Sequence[float]) -> list[int]:
    """What an occurrence in each data set counts, in units."""
    if len(weights) != len(documents.data_sets) or not all(0 < weight < math.inf for weight in weights):
        raise ConfigError(
            "--data-prefix",
            "is not one weight above 0 for every data set",
            got=" ".join(map(str, weights)) or "none",
            expected=f"{len(documents.data_sets)} numbers",
        )
    total = math.fsum(weights)
    factors = [
        weight / total * documents.num_tokens / max(1, tokens)
        for weight, tokens in zip(weights, documents.tokens_by_set, strict=True)
    ]
    units = [round(UNITS_OF_COUNT * factor) for factor in factors]
    if 0 in units:
        raise ConfigError(
            "--data-prefix",
            "has a weight too small to count with",
            got=f"{weights[units.index(0)]:g}: an occurrence would count {factors[units.index(0)]:.1e}",
            expected=f"at least {0.5 / UNITS_OF_COUNT:.1e} an occurrence",
            remedy="Leave the data set out, or raise its weight.",
        )
    return units


def _cut(documents: MegatronDocuments, num_slices: int) -> Iterator[list[Piece]]:
    """Slices of whole entries, of about equally many bytes."""
    sizes = [tokens * data.id_dtype.itemsize for data, tokens in _with_tokens(documents)]
    borders = [sum(sizes) * number // num_slices for number in range(1, num_slices)]
    pieces: list[Piece] = []
    before = 0  # bytes of the data sets before
    for number, (data, stop, size) in enumerate(zip(documents.data_sets, documents.stops, sizes, strict=True)):
        # A border at 0, where there are more slices than bytes, is in the first data set.
        inside = [border - before for border in borders if before - (number == 0) < border <= before + size]
        entries, tokens = _entries_at(data, stop, [border // data.id_dtype.itemsize for border in inside])
        entries, tokens = [0, *entries, stop], [0, *tokens, documents.tokens_by_set[number]]
        for place in range(len(entries) - 1):
            if place > 0:
                yield pieces
                pieces = []
            if tokens[place + 1] > tokens[place]:
                pieces.append(
                    Piece(
                        data_set=number,
                        first_entry=entries[place],
                        num_entries=entries[place + 1] - entries[place],
                        first_token=tokens[place],
                        num_tokens=tokens[place + 1] - tokens[place],
                    )
                )
        before += size
    yield pieces


def _with_tokens(documents: MegatronDocuments) -> Iterator[tuple[DataSet, int]]:
    return zip(documents.data_sets, documents.tokens_by_set, strict=True)


def _entries_at(data: DataSet, stop: int, borders: Sequence[int]) -> tuple[list[int], list[int]]:
    """For ascending numbers of tokens, the entries that end there or next after, and their ends, in tokens."""
    entries: list[int] = []
    tokens: list[int] = []
    entry, done = 0, 0
    for lengths in data.lengths(0, stop):
        ends = done + np.cumsum(lengths, dtype=np.int64)
        while len(entries) < len(borders) and borders[len(entries)] <= ends[-1]:
            place = int(np.searchsorted(ends, borders[len(entries)], side="left"))
            entries.append(entry + place + 1)
            tokens.append(int(ends[place]))
        entry, done = entry + len(lengths), int(ends[-1])
    return entries, tokens
