"""The definition of what counting finds, by dictionary; and stages run one after the other in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.building.count import CountedNgrams, count_stages
from megatron_graft.building.count_plan import MIN_MEMORY_BYTES, CountPlan, plan_counts
from megatron_graft.building.documents import MegatronDocuments
from megatron_graft.building.tasks import task_directory
from tests.helpers.building import write_data_set

Documents = list[list[int]]


def ngrams_of(document: Sequence[int], order: int, eod: int | None) -> Iterator[tuple[int, ...]]:
    for start in range(len(document) - order + 1):
        ngram = tuple(document[start : start + order])
        if eod not in ngram:
            yield ngram


def oracle(
    sets: Sequence[Documents],
    order: int,
    *,
    eod: int | None,
    min_count: int,
    weights: Sequence[float] | None = None,
    by_documents: bool = False,
) -> list[tuple[tuple[int, ...], int]]:
    """Every n-gram that is frequent enough and its published count, ascending by ids."""
    sizes = [sum(map(len, documents)) for documents in sets]
    units, scale = [1] * len(sets), 1
    if weights is not None:
        scale = 1024
        shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
        factors = [share * sum(sizes) / max(1, size) for share, size in zip(shares, sizes, strict=True)]
        units = [max(1, round(scale * factor)) for factor in factors]
    found: Counter[tuple[int, ...]] = Counter()
    for documents, unit in zip(sets, units, strict=True):
        for document in documents:
            ngrams = list(ngrams_of(document, order, eod))
            for ngram in set(ngrams) if by_documents else ngrams:
                found[ngram] += unit
    kept = {ngram: total for ngram, total in found.items() if total >= min_count * scale}
    return sorted((ngram, max(1, (total + scale // 2) // scale)) for ngram, total in kept.items())


def open_sets(
    directory: Path, sets: Sequence[Documents], vocab_size: int, dtypes: Sequence[Any] = (np.uint16, np.int32)
) -> MegatronDocuments:
    """Data sets on disk, their types in turn."""
    prefixes = [
        write_data_set(directory / f"set{number}", documents, dtypes[number % len(dtypes)])
        for number, documents in enumerate(sets)
    ]
    return MegatronDocuments(prefixes, split=None, vocab_size=vocab_size)


def plan_of(documents: MegatronDocuments, **options: Any) -> CountPlan:
    given = {"weights": None, "eod": None, "min_count": 1, "count_by": "occurrences", "memory_bytes": MIN_MEMORY_BYTES}
    return plan_counts(documents, **given | options)


def run_stages(plan: CountPlan, work: Path, *, backwards: bool = False) -> list[dict[str, Any]]:
    """Run all tasks of all stages in this process; return their facts."""
    facts = []
    for stage in count_stages(plan, work):
        tasks = range(stage.num_tasks)
        for task in reversed(tasks) if backwards else tasks:
            target = task_directory(work, stage.name, task)
            target.mkdir(parents=True)
            facts.append({"stage": stage.name, **stage.run(task, target)})
    return facts


def pairs_of(counted: CountedNgrams, order: int, count: int = 1) -> list[tuple[tuple[int, ...], int]]:
    ids, counts = counted.ngrams_with_at_least(order, count)
    assert (ids.dtype, counts.dtype, ids.shape[1]) == (np.int32, np.int64, order)
    return list(zip(map(tuple, ids.tolist()), counts.tolist(), strict=True))
