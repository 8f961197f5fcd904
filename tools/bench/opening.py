"""How long it takes to open a bank and its index: `python opening.py BANK` prints JSON, from a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
if str(CHECKOUT) not in sys.path:
    sys.path.insert(0, str(CHECKOUT))

import numpy as np  # noqa: E402

from megatron_graft.bank.reader import open_bank  # noqa: E402
from megatron_graft.lookup.index import open_index  # noqa: E402


def measure_opening(bank: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds, medians over fresh processes: from disk, from the page cache, and again in the same process."""
    times: dict[str, list[float]] = {"from_disk_ms": [], "in_page_cache_ms": [], "again_ms": []}
    for _ in range(rounds):
        _drop_from_page_cache(bank)
        times["from_disk_ms"].append(_open_in_new_process(bank)["first_ms"])
        cached = _open_in_new_process(bank)
        times["in_page_cache_ms"].append(cached["first_ms"])
        times["again_ms"].append(cached["again_ms"])
    result: dict[str, Any] = {name: float(np.median(values)) for name, values in times.items()}
    result["bytes"] = sum(file.stat().st_size for file in bank.iterdir())
    result["entries"] = open_bank(bank).num_rows
    return result


def _open_in_new_process(bank: Path) -> dict[str, float]:
    finished = subprocess.run([sys.executable, __file__, bank], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(finished.stdout)
    return result


def _drop_from_page_cache(directory: Path) -> None:
    """Ask the kernel to forget the files' pages; what it does not forget is read from memory again."""
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _milliseconds(bank: Path) -> float:
    start = time.perf_counter()
    open_index(open_bank(bank), "native")
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    path = Path(sys.argv[1])
    print(json.dumps({"first_ms": _milliseconds(path), "again_ms": _milliseconds(path)}))
