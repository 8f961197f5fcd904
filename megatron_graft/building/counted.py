"""Reading what was counted: keys of an order, their counts, and the n-grams they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_graft.building.count_plan import MIN_ORDER, CountPlan
from megatron_graft.building.tasks import task_directory
from megatron_graft.errors import BankIncompleteError, ConfigError, DataError

KEYS_NAME, COUNTS_NAME, HISTOGRAM_NAME = "keys.u64", "counts.u64", "histogram.npy"
_MAX_NODES = (1 << 32) - 1
_TOKEN_BITS = np.uint64(20)
_TOKEN_MASK = np.uint64((1 << 20) - 1)
_KEYS_AT_ONCE = 1 << 20


class KeptOrder:
    """The kept n-grams of one order, in the files of its reduce tasks.

    Attributes:
        order: their length.
        total: how many they are; their nodes are 0 to ``total`` - 1.

    Raises:
        BankIncompleteError: a reduce task is not done.
        ConfigError: they are more than can be numbered.
    """

    def __init__(self, plan: CountPlan, work: Path, order: int) -> None:
        self.order = order
        self._plan, self._work = plan, work
        stage = f"count-{order}-reduce"
        self._directories = [task_directory(work, stage, task) for task in range(plan.num_partitions)]
        for directory in self._directories:
            if not directory.is_dir():
                raise BankIncompleteError(directory, "is not there yet", remedy=f"Run stage {stage} first.")
        sizes = [(directory / KEYS_NAME).stat().st_size // 8 for directory in self._directories]
        self._begins = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        self.total = int(self._begins[-1])
        if self.total >= _MAX_NODES:
            raise ConfigError(
                "--min-count",
                f"leaves more n-grams of order {order} than can be numbered",
                got=f"{self.total:,}",
                expected=f"fewer than {_MAX_NODES:,}",
                remedy="Raise it.",
            )

    @property
    def files(self) -> list[tuple[str, int]]:
        """The files of keys, in the order of nodes, and how many keys each has."""
        return [(str(d / KEYS_NAME), int(n)) for d, n in zip(self._directories, np.diff(self._begins), strict=True)]

    @cached_property
    def parents(self) -> int:
        """How many nodes are below: n-grams kept of the order before, or tokens."""
        if self.order == MIN_ORDER:
            return self._plan.vocab_size
        return KeptOrder(self._plan, self._work, self.order - 1).total

    def partitions(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Keys and counts (uint64, mapped) of every partition, one after the other: no more files are open than two."""
        for directory in self._directories:
            yield _map(directory / KEYS_NAME), _map(directory / COUNTS_NAME)

    def keys_of(self, nodes: np.ndarray) -> np.ndarray:
        """uint64 keys of nodes (integers ``[N]``)."""
        keys = np.empty(len(nodes), dtype=np.uint64)
        by_node = np.argsort(nodes)  # so that files are read from front to back
        ascending = nodes[by_node]
        borders = np.searchsorted(ascending, self._begins)
        for number, directory in enumerate(self._directories):
            inside = slice(int(borders[number]), int(borders[number + 1]))
            if inside.start < inside.stop:
                keys[by_node[inside]] = _map(directory / KEYS_NAME)[ascending[inside] - self._begins[number]]
        return keys

    def histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts (int64, ascending) and how many n-grams have each (int64)."""
        parts = np.concatenate([np.load(directory / HISTOGRAM_NAME) for directory in self._directories], axis=1)
        counts, places = np.unique(parts[0], return_inverse=True)
        how_many = np.zeros(len(counts), dtype=np.int64)
        np.add.at(how_many, places, parts[1])
        return counts, how_many


class CountedNgrams:
    """The n-grams that were counted, read from the work directory.

    Args:
        plan: of the counting.
        work: the work directory, in which all counting stages are done.

    Raises:
        BankIncompleteError: they are not.
        ConfigError: more n-grams of an order were kept than can be numbered.
    """

    def __init__(self, plan: CountPlan, work: Path) -> None:
        self.orders = plan.orders
        self._kept = {order: KeptOrder(plan, work, order) for order in range(MIN_ORDER, plan.orders[-1] + 1)}

    def candidates(self, order: int) -> int:
        """How many n-grams of an order were frequent enough."""
        return self._kept[order].total

    def count_histogram(self, order: int) -> tuple[np.ndarray, np.ndarray]:
        """Counts that occur, int64, ascending, and how many n-grams have each, int64."""
        return self._kept[order].histogram()

    def ngrams_with_at_least(self, order: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 ``[N, order]``, oldest token first, and counts int64 ``[N]``, in lexicographic order of ids.

        Memory beyond the answer and its sorting does not grow with what was counted: files are mapped.
        """
        counts, how_many = self.count_histogram(order)
        ids = np.empty((int(how_many[counts >= count].sum()), order), dtype=np.int32)
        found = np.empty(len(ids), dtype=np.int64)
        done = 0
        for keys, key_counts in self._kept[order].partitions():
            for start in range(0, len(keys), _KEYS_AT_ONCE):
                block = slice(start, start + _KEYS_AT_ONCE)
                chosen = np.flatnonzero(key_counts[block] >= count)
                end = done + len(chosen)
                self._fill_ids(keys[block][chosen], ids[done:end])
                found[done:end] = key_counts[block][chosen]
                done = end
        by_ids = np.lexsort(ids.T[::-1])
        return ids[by_ids], found[by_ids]

    def _fill_ids(self, keys: np.ndarray, ids: np.ndarray) -> None:
        """Walk from keys of one order down to single tokens; ``ids`` is ``[N, order]``."""
        order = ids.shape[1]
        for column in range(order - 2):
            ids[:, column] = keys & _TOKEN_MASK
            keys = self._kept[order - column - 1].keys_of((keys >> _TOKEN_BITS).astype(np.int64))
        ids[:, order - 2] = keys & _TOKEN_MASK
        ids[:, order - 1] = keys >> _TOKEN_BITS


def _map(path: Path) -> np.ndarray:
    if path.stat().st_size == 0:  # cannot be mapped
        return np.empty(0, dtype=np.uint64)
    if path.stat().st_size % 8:
        raise DataError(path, "is truncated", got=f"{path.stat().st_size} bytes", expected="whole 8-byte numbers")
    return np.memmap(path, dtype=np.uint64, mode="r")
