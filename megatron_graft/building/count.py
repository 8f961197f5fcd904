"""Exact n-gram counts, order by order, as stages that speak through files. The work itself is in ``csrc/``.

An n-gram of order n is only formed where both of its (n-1)-grams were frequent enough; none other can be. Its key
is ``(node of the (n-1)-gram that ends where it ends) << 20 | oldest token``, where nodes number the kept n-grams
of the order below. So keys never collide at any order.

``count-<n>-map``, a task a slice of the corpus, leaves

* ``nodes.u32``: for every token of the slice the node of the (n-1)-gram that ends there, 0xFFFFFFFF where none was
  kept (orders 3 and up; not for the last order),
* ``runs.u64``: runs of mixed keys with their numbers of occurrences (``csrc/ngram_count.hpp``),
* ``begins.npy``: uint64 ``[R, shares + 1]``, where in ``runs.u64`` the shares of each run begin, and
  ``run_sets.npy``: int64 ``[R]``, the data set of each.

``count-<n>-reduce``, a task a partition of the keys, leaves ``keys.u64``, ``counts.u64`` of the n-grams that are
kept, in an order that depends on the keys alone, and ``histogram.npy``: int64 ``[2, K]``, counts, ascending, and
how many n-grams have each. The node of an n-gram is its place in all partitions together.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.bank.extension import load_extension
from megatron_graft.building.count_plan import (
    MAX_ORDER,
    MIN_MEMORY_BYTES,
    MIN_ORDER,
    CountPlan,
    check_orders,
    plan_counts,
)
from megatron_graft.building.counted import COUNTS_NAME, HISTOGRAM_NAME, KEYS_NAME, CountedNgrams, KeptOrder
from megatron_graft.building.data_set import DataSet, open_data_set, write_data_set
from megatron_graft.building.documents import MegatronDocuments, token_out_of_range
from megatron_graft.building.tasks import Stage, task_directory
from megatron_graft.errors import BankIncompleteError, DataError

__all__ = ["MAX_ORDER", "MIN_ORDER", "CountedNgrams", "OrderCounts", "check_orders", "count_ngrams", "count_stages"]

_NODES, _RUNS, _BEGINS, _RUN_SETS = "nodes.u32", "runs.u64", "begins.npy", "run_sets.npy"
_MOST_POOL_BYTES = 1 << 29  # more would make runs hardly better


def map_stage(order: int) -> str:
    """Name of the stage that counts an order slice by slice."""
    return f"count-{order}-map"


def reduce_stage(order: int) -> str:
    """Name of the stage that sums an order up, partition by partition."""
    return f"count-{order}-reduce"


def count_stages(plan: CountPlan, work: Path) -> list[Stage]:
    """The stages that count, in order: for every order one over the slices and one over the partitions.

    The last stage's output, and those of all reduce stages, are read by :class:`CountedNgrams`. Their tasks raise

    * ``DataError``: a token id is outside the vocabulary, or a data set is not what it was when it was planned;
    * ``ConfigError``: more n-grams of an order are kept than can be numbered;
    * ``BankIncompleteError``: an earlier stage is not done.
    """
    stages = []
    for order in range(MIN_ORDER, plan.orders[-1] + 1):
        count = partial(_count_slice, plan, work, order)
        stages.append(Stage(name=map_stage(order), num_tasks=len(plan.slices), run=count, in_pool=True))
        sum_up = partial(_sum_partition, plan, work, order)
        stages.append(Stage(name=reduce_stage(order), num_tasks=plan.num_partitions, run=sum_up, in_pool=True))
    return stages


def _count_slice(plan: CountPlan, work: Path, order: int, task: int, scratch: Path) -> Mapping[str, Any]:
    kept = None if order == MIN_ORDER else KeptOrder(plan, work, order - 1)
    nodes = "" if kept is None else str(scratch / _NODES)
    lower_nodes = ""
    if order > MIN_ORDER + 1:
        lower_nodes = str(_done(work, map_stage(order - 1), task) / _NODES)
    pool_blocks, table_entries = _divide_memory(plan, kept)
    found = _call(
        "count_slice",
        work,
        order=order,
        pieces=_pieces(plan, task),
        vocab_size=plan.vocab_size,
        eod=plan.eod,
        kept=[] if kept is None else kept.files,
        kept_parents=0 if kept is None else kept.parents,
        lower_nodes=lower_nodes,
        nodes=nodes,
        keep_nodes=order < plan.orders[-1],
        runs=str(scratch / _RUNS),
        shares=plan.shares,
        split_runs=plan.split_runs,
        longest_document=plan.longest_document,
        pool_blocks=pool_blocks,
        table_entries=table_entries,
        block_tokens=plan.block_tokens,
    )
    if "bad_token" in found:
        raise _bad_token(plan, *found["bad_token"])
    if order == plan.orders[-1]:
        (scratch / _NODES).unlink(missing_ok=True)  # passes over parts of the kept n-grams needed it
    runs = found.pop("runs")
    begins = [begins for _, begins in runs]
    np.save(scratch / _BEGINS, np.array(begins, dtype=np.uint64).reshape(len(runs), plan.shares + 1))
    np.save(scratch / _RUN_SETS, np.array([data_set for data_set, _ in runs], dtype=np.int64))
    return {**_rounded(found), "runs": len(runs), "bytes_written": _bytes_in(scratch)}


def _sum_partition(plan: CountPlan, work: Path, order: int, partition: int, scratch: Path) -> Mapping[str, Any]:
    parents = plan.vocab_size if order == MIN_ORDER else KeptOrder(plan, work, order - 1).total
    first_share = partition * plan.shares_of_partition
    parts = []
    for task in range(len(plan.slices)):
        directory = _done(work, map_stage(order), task)
        begins = np.load(directory / _BEGINS, mmap_mode="r")[
            :, first_share : first_share + plan.shares_of_partition + 1
        ]
        for run_begins, data_set in zip(begins, np.load(directory / _RUN_SETS), strict=True):
            if run_begins[0] < run_begins[-1]:
                units = plan.data_sets[data_set].units
                parts.append((str(directory / _RUNS), units, np.array(run_begins)))
    block_bytes = load_extension().POOL_BLOCK_BYTES
    begins_bytes = 2 * sum(begins.nbytes + 200 for _, _, begins in parts)
    found = _call(
        "sum_partition",
        work,
        parents=parents,
        parts=parts,
        shares=plan.shares,
        first_share=first_share,
        min_units=plan.min_count * plan.units_of_count,
        units_of_count=plan.units_of_count,
        keys=str(scratch / KEYS_NAME),
        counts=str(scratch / COUNTS_NAME),
        pool_blocks=_at_most((plan.working_bytes - begins_bytes) // block_bytes, plan.most_pool_blocks),
    )
    np.save(scratch / HISTOGRAM_NAME, np.array(found.pop("histogram"), dtype=np.int64))
    return {**_rounded(found), "bytes_written": _bytes_in(scratch)}


def _pieces(plan: CountPlan, task: int) -> list[tuple[Any, ...]]:
    pieces = []
    for piece in plan.slices[task]:
        data = plan.data_sets[piece.data_set]
        lengths_offset = DataSet.LENGTHS_OFFSET + piece.first_entry * 4
        pieces.append(
            (
                piece.data_set, f"{data.prefix}.bin", data.id_bytes, piece.first_token, piece.num_tokens,
                f"{data.prefix}.idx", lengths_offset, piece.num_entries,
            )
        )  # fmt: skip
    return pieces


def _divide_memory(plan: CountPlan, kept: KeptOrder | None) -> tuple[int, int]:
    """Blocks for keys that wait to be counted, and kept n-grams in memory at a time."""
    extension = load_extension()
    working = plan.working_bytes
    entries, table_bytes = 0, 0
    if kept is not None:
        # All of them if they leave half of the memory to the keys; otherwise what half of the memory holds.
        entries = _at_most(kept.total, plan.most_table_entries)
        table_bytes = extension.kept_table_bytes(entries, kept.total, kept.parents)
        if table_bytes > working // 2:
            entries = max(1, entries * (working // 2) // table_bytes)
            table_bytes = working // 2
    pool_bytes = min(working - table_bytes, _MOST_POOL_BYTES)
    return _at_most(pool_bytes // extension.POOL_BLOCK_BYTES, plan.most_pool_blocks), entries


def _at_most(number: int, limit: int | None) -> int:
    return max(1, number if limit is None else min(number, limit))


def _call(function: str, work: Path, **arguments: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = getattr(load_extension(), function)(**arguments)
    except ValueError as error:
        raise DataError(
            work,
            f"holds counts that do not fit each other or the data sets: {error}",
            remedy="Put the data sets back as they were, or remove the directory and build again.",
        ) from error
    return found


def _done(work: Path, stage: str, task: int) -> Path:
    directory = task_directory(work, stage, task)
    if not directory.is_dir():
        raise BankIncompleteError(directory, "is not there yet", remedy=f"Run stage {stage} first.")
    return directory


def _bad_token(plan: CountPlan, data_set: int, place: int, value: int) -> DataError:
    data = open_data_set(plan.data_sets[data_set].prefix)
    return token_out_of_range(data.prefix, data.entry_at(place), value, plan.vocab_size)


def _rounded(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in facts.items()}


def _bytes_in(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


@dataclass(frozen=True, kw_only=True)
class OrderCounts:
    """All n-grams of one order that are frequent enough.

    ``ids``: int32 ``[N, order]``, oldest token first, rows in lexicographic order. ``counts``: int64 ``[N]``.
    """

    order: int
    ids: np.ndarray
    counts: np.ndarray


def count_ngrams(
    documents: Iterable[np.ndarray], *, orders: Sequence[int], eod: int | None, min_count: int = 1
) -> list[OrderCounts]:
    """Count the n-grams of a small corpus in one call: the stages, run in a directory that is removed again.

    Args:
        documents: integer arrays of token ids, one per document; or data sets.
        orders: see :func:`check_orders`.
        eod: id of the end-of-document token, which ends a document and is in no n-gram; or None.
        min_count: rarer n-grams are dropped.

    Returns:
        one :class:`OrderCounts` per order, ascending.

    Raises:
        ConfigError: ``orders`` or ``min_count`` is unusable.
        DataError: there are no tokens, or ids are not those of a vocabulary of at most 2^20.
    """
    with tempfile.TemporaryDirectory(prefix="graft-count-") as directory:
        if not isinstance(documents, MegatronDocuments):
            vocab_size = write_data_set(str(Path(directory) / "data"), documents)
            documents = MegatronDocuments([Path(directory) / "data"], split=None, vocab_size=vocab_size)
        plan = plan_counts(
            documents, weights=None, orders=orders, eod=eod, min_count=min_count, count_by="occurrences",
            memory_bytes=2 * MIN_MEMORY_BYTES,
        )  # fmt: skip
        for stage in count_stages(plan, Path(directory)):
            for task in range(stage.num_tasks):
                target = task_directory(Path(directory), stage.name, task)
                target.mkdir(parents=True)
                stage.run(task, target)
        counted = CountedNgrams(plan, Path(directory))
        found = [(order, counted.ngrams_with_at_least(order, 1)) for order in plan.orders]
    return [OrderCounts(order=order, ids=ids, counts=counts) for order, (ids, counts) in found]
