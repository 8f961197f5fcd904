"""Counting n-grams: its rate, its rate beside KenLM's, and the memory it takes. Each figure is a plain JSON value.

Everything is measured in processes of their own, so that CPU seconds and peak memory are those of counting alone.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from megatron_graft.building.count import CountedNgrams, count_stages
from megatron_graft.building.count_plan import CountPlan, plan_counts
from megatron_graft.building.data_set import write_data_set
from megatron_graft.building.documents import MegatronDocuments
from megatron_graft.building.tasks import Stage, task_directory
from megatron_graft.errors import PlatformError

ORDERS = (2, 3, 4, 5)
MIN_COUNT = 2
GIB = 1 << 30
_MIB = 1 << 20


def measure_rate(
    prefix: str, vocab_size: int, eod: int | None, work: Path, *, memory_gb: float = 2.0, tokens: int | None = None
) -> dict[str, Any]:
    """Count orders 2 to 5 of a data set, kept from a count of 2 on, in one process after the other.

    Args:
        prefix: the data set, without ``.bin``/``.idx``.
        vocab_size: of its tokenizer.
        eod: its end-of-document token.
        work: a directory that is emptied first and holds the counts afterwards.
        memory_gb: GiB for the process.
        tokens: about how many tokens, whole documents from the first on; None takes all.

    Returns:
        ``tokens``, ``cpu_seconds`` (user and system), ``wall_seconds``, ``mtok_per_cpu_s``, ``mtok_per_s``,
        ``peak_mib`` and ``kept`` by order.
    """
    _empty(work)
    if tokens is not None:
        prefix = _front(prefix, vocab_size, tokens, work / "front")
    plan = _plan(prefix, vocab_size, eod, memory_gb)
    return _run(plan, work)


def compare_with_lmplz(
    prefix: str,
    vocab_size: int,
    eod: int | None,
    work: Path,
    lmplz: Path | None,
    *,
    memory_gb: float = 2.0,
    tokens: int | None = None,
) -> dict[str, Any]:
    """Count the same ids with KenLM's ``lmplz -o 5 --prune 0 1 1 1 1``, a word an id and a line a document.

    It prunes and counts as we do, but also counts the marks of a line's two ends, and goes on to estimate a model,
    which it cannot be asked to leave out.

    Returns:
        ``ours`` and ``lmplz`` with their CPU seconds, ``ratio`` of these, kept ``ngrams`` by order as both find
        them and as we do where each line has marks as tokens, and whether the last two are ``equal_with_marks``;
        only ``not_measured`` if there is no ``lmplz``.
    """
    if lmplz is None or not lmplz.is_file():
        return {"not_measured": f"no program {lmplz}"}
    ours = measure_rate(prefix, vocab_size, eod, work, memory_gb=memory_gb, tokens=tokens)
    if tokens is not None:
        prefix = str(work / "front")
    text = work / "text"
    _write_words(prefix, vocab_size, eod, text)
    command = [
        str(lmplz), "-o", str(ORDERS[-1]), "--prune", "0", "1", "1", "1", "1", "-S", f"{int(memory_gb * 1024)}M",
        "-T", str(work / "lmplz"), "--text", str(text), "--arpa", "/dev/null", "--discount_fallback",
    ]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    wall = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    theirs = _counts_of_lmplz(finished.stderr)
    marked = _run(
        _plan(_marked(prefix, vocab_size, eod, work / "marked"), vocab_size + 2, None, memory_gb), work / "with"
    )
    return {
        "ours": ours,
        "lmplz": {"cpu_seconds": round(cpu, 2), "wall_seconds": round(wall, 2)},
        "ratio": round(cpu / ours["cpu_seconds"], 2),
        "ngrams": {"ours": ours["kept"], "ours_with_marks": marked["kept"], "lmplz": theirs},
        "equal_with_marks": all(theirs.get(order) == number for order, number in marked["kept"].items()),
    }


def measure_memory(work: Path, *, memory_gb: float = 0.5, tokens: int = 640_000_000, seed: int = 1) -> dict[str, Any]:
    """Count a corpus of synthetic int32 ids in one worker whose memory is far smaller.

    Args:
        work: a directory that is emptied first.
        memory_gb: GiB that the worker may take, interpreter included.
        tokens: of the corpus; 4 bytes each.
        seed: of the ids.

    Returns:
        as :func:`measure_rate`, with ``memory_mib``, ``corpus_mib`` and ``within``.
    """
    _empty(work)
    vocab_size = 100_000
    prefix = str(work / "ids")
    write_data_set(prefix, synthetic_documents(tokens, vocab_size, seed))
    plan = _plan(prefix, vocab_size, 0, memory_gb)
    measured = _run(plan, work)
    measured["memory_mib"] = round(memory_gb * 1024)
    measured["corpus_mib"] = round(tokens * 4 / _MIB)
    measured["within"] = measured["peak_mib"] <= measured["memory_mib"]
    return measured


def synthetic_documents(tokens: int, vocab_size: int, seed: int) -> Iterator[np.ndarray]:
    """int32 documents of 5,000 tokens: Zipf-distributed ids, half of them in phrases that come again."""
    generator = np.random.default_rng(seed)
    # Drawn once and drawn from: a Zipf distribution takes longer to draw from than to count.
    ids = (generator.zipf(1.2, size=1 << 20) % (vocab_size - 1) + 1).astype(np.int32)
    phrases = ids[generator.integers(0, len(ids), size=(1 << 20, 5))]
    for _ in range(tokens // 5000):
        document = ids[generator.integers(0, len(ids), size=(1000, 5))]
        chosen = np.flatnonzero(generator.random(1000) < 0.5)
        document[chosen] = phrases[(len(phrases) * generator.random(len(chosen)) ** 3).astype(np.int64)]
        yield document.reshape(-1)


def _plan(prefix: str, vocab_size: int, eod: int | None, memory_gb: float) -> CountPlan:
    return plan_counts(
        MegatronDocuments([prefix], split=None, vocab_size=vocab_size), weights=None, orders=ORDERS, eod=eod,
        min_count=MIN_COUNT, count_by="occurrences", memory_bytes=int(memory_gb * GIB),
    )  # fmt: skip


def _run(plan: CountPlan, work: Path) -> dict[str, Any]:
    """Count in a process of its own; what it measured, and what it found."""
    work.mkdir(parents=True, exist_ok=True)
    plan_path = work / "plan.json"
    plan_path.write_text(json.dumps(plan.to_json()))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, __file__, str(plan_path)]
    started = time.monotonic()
    finished = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    wall = time.monotonic() - started
    measured: dict[str, Any] = json.loads(finished.stdout)
    tokens = sum(piece.num_tokens for pieces in plan.slices for piece in pieces)
    counted = CountedNgrams(plan, work)
    return {
        "tokens": tokens,
        "mtok_per_cpu_s": round(tokens / measured["cpu_seconds"] / 1e6, 2),
        "mtok_per_s": round(tokens / wall / 1e6, 2),
        "wall_seconds": round(wall, 2),
        **measured,
        "kept": {str(order): counted.candidates(order) for order in ORDERS},
    }


def _count(plan_path: Path) -> dict[str, Any]:
    """What the process does whose figures are taken: from its start to its end, interpreter included."""
    plan = CountPlan.from_json(json.loads(plan_path.read_text()))
    stages: dict[str, float] = {}
    passes = 0
    for stage in count_stages(plan, plan_path.parent):
        before = time.process_time()
        facts = [_run_task(stage, plan_path.parent, task) for task in range(stage.num_tasks)]
        stages[stage.name] = round(time.process_time() - before, 2)
        passes = max(passes, *(fact.get("passes", 0) for fact in facts))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mib": round(_peak_bytes() / _MIB, 1),
        "most_passes": passes,
        "cpu_seconds_by_stage": stages,
    }


def _peak_bytes() -> int:
    """Most resident bytes of this process. Not ru_maxrss, which begins at that of the process it was started from."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise PlatformError("/proc/self/status", "does not tell the peak of memory", expected="a line VmHWM")


def _run_task(stage: Stage, work: Path, task: int) -> dict[str, Any]:
    target = task_directory(work, stage.name, task)
    target.mkdir(parents=True)
    return dict(stage.run(task, target))


def _front(prefix: str, vocab_size: int, tokens: int, target: Path) -> str:
    def documents() -> Iterator[np.ndarray]:
        taken = 0
        for document in MegatronDocuments([prefix], split=None, vocab_size=vocab_size):
            if taken >= tokens:
                return
            taken += len(document)
            yield document

    write_data_set(str(target), documents())
    return str(target)


def _lines(prefix: str, vocab_size: int, eod: int | None) -> Iterator[np.ndarray]:
    """Documents, or what EODs leave of them, without the empty ones."""
    for document in MegatronDocuments([prefix], split=None, vocab_size=vocab_size):
        ends = np.flatnonzero(document == eod) if eod is not None else []
        for part in np.split(document, ends):
            line = part[part != eod] if eod is not None else part
            if len(line):
                yield line


def _write_words(prefix: str, vocab_size: int, eod: int | None, path: Path) -> None:
    with path.open("w") as stream:
        for line in _lines(prefix, vocab_size, eod):
            stream.write(" ".join(map(str, line.tolist())) + "\n")


def _marked(prefix: str, vocab_size: int, eod: int | None, target: Path) -> str:
    """The same lines as a data set, between tokens of their own for the start and the end of a line."""
    start, end = np.array([vocab_size], dtype=np.int32), np.array([vocab_size + 1], dtype=np.int32)
    lines = (np.concatenate((start, line, end)) for line in _lines(prefix, vocab_size, eod))
    write_data_set(str(target), lines)
    return str(target)


def _counts_of_lmplz(log: str) -> dict[str, int]:
    """Kept n-grams by order, from its table "n D1 D2 D3+" of statistics: lines such as "2 819645/1200000 D1=..."."""
    counts = {}
    for line in log.split("Statistics:")[-1].splitlines():
        fields = line.split()
        if len(fields) > 1 and fields[0].isdigit() and int(fields[0]) <= ORDERS[-1]:
            counts[fields[0]] = int(fields[1].split("/")[0])
    return counts


def _empty(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)


def main(argv: Sequence[str]) -> int:
    """Count by the plan whose path is the only argument; print what it took as JSON."""
    print(json.dumps(_count(Path(argv[0]))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
