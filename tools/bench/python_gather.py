"""Gathering rows: the bank's own beside torch's, from the same mapped file into the same buffer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron_graft.bank.reader import Bank

_GATHERS_PER_ROUND = 8


def measure_gather(path: Any, open_bank: Callable[..., Bank], rows_wanted: int, rounds: int) -> dict[str, Any]:
    """Bytes a second (wall time) of gathering ``rows_wanted`` uniformly drawn rows, with one and with two threads.

    The ratio is the median over pairs of gathers, one of each way, one after the other.
    """
    result: dict[str, Any] = {"rows": rows_wanted}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        result[f"threads_{threads}"] = _measure(open_bank(path, threads=threads), rows_wanted, rounds)
    torch.set_num_threads(1)
    return result


def _measure(bank: Bank, rows_wanted: int, rounds: int) -> dict[str, Any]:
    rows = np.random.default_rng(1).integers(0, bank.num_rows, rows_wanted)
    out = np.empty((rows_wanted, bank.row_bytes), dtype=np.uint8)
    (layer,) = bank.rows_by_layer.values()
    (shard,) = layer.shards
    with warnings.catch_warnings():  # torch dislikes memory that it may not write; it is only read here
        warnings.simplefilter("ignore", UserWarning)
        source = torch.from_numpy(shard.view(np.int16))
    torch_out = torch.from_numpy(out.view(np.int16))
    torch_rows = torch.from_numpy(rows)

    ways: dict[str, Callable[[], object]] = {
        "bank": lambda: bank.gather(rows, out),
        "index_select": lambda: torch.index_select(source, 0, torch_rows, out=torch_out),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    copies = {}
    for name, gather in ways.items():  # touches every page; not counted
        out[:] = 0
        gather()
        copies[name] = out.copy()
    for _ in range(_GATHERS_PER_ROUND * rounds):  # each takes some 15 ms, and machines change their pace
        for name, gather in ways.items():
            start = time.perf_counter()
            gather()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    return {
        "row_bytes": bank.row_bytes,
        "mismatches": int((copies["bank"] != copies["index_select"]).sum()),
        **{f"{name}_gb_per_s": out.nbytes / taken / 1e9 for name, taken in medians.items()},
        "ratio": float(np.median(np.divide(seconds["index_select"], seconds["bank"]))),
    }
