"""What the figures were measured on, and whether anyone else was using it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

_PROC_STAT = Path("/proc/stat")
_IDLE_SHARE = 0.1  # of the machine's cores that others may use before figures are called doubtful


def describe_machine() -> dict[str, Any]:
    """CPU, caches, memory, kernel, huge pages, compiler and versions, as plain JSON values."""
    import torch

    return {
        "cpu": _first_match(Path("/proc/cpuinfo"), r"model name\s*:\s*(.+)") or platform.processor(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "huge_pages": _first_match(Path("/sys/kernel/mm/transparent_hugepage/enabled"), r"\[(\w+)\]") or "unknown",
        "compiler": _compiler(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "instructions": [name for name in ("avx2", "avx512f") if _has_instructions(name)],
    }


def commit() -> str:
    """The checkout's commit, marked if files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    return finished.stdout.strip() or "unknown"


class OtherLoad:
    """Watches what others take of the machine: at first alone for a second, then over the whole run."""

    def __init__(self) -> None:
        self.load_average_at_start = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
        before = _cpu_times()
        time.sleep(1.0)
        self._start = _cpu_times()
        self.busy_share_at_start = _share_not(before, self._start, "idle", "iowait")

    @property
    def idle(self) -> bool:
        """Whether the machine was free when this began to watch."""
        return self.busy_share_at_start <= _IDLE_SHARE

    def report(self) -> dict[str, Any]:
        """Load at the start, and the share of time that the hypervisor gave to others until now."""
        now = _cpu_times()
        total = sum(now.values()) - sum(self._start.values())
        stolen = now.get("steal", 0) - self._start.get("steal", 0)
        return {
            "load_average_at_start": self.load_average_at_start,
            "busy_share_at_start": round(self.busy_share_at_start, 3),
            "idle_at_start": self.idle,
            "stolen_share": round(stolen / total, 4) if total else 0.0,
        }


def _cpu_times() -> dict[str, int]:
    if not _PROC_STAT.is_file():
        return {}
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    fields = _PROC_STAT.read_text().split("\n", 1)[0].split()[1:]
    return dict(zip(names, map(int, fields), strict=False))


def _share_not(before: dict[str, int], after: dict[str, int], *names: str) -> float:
    total = sum(after.values()) - sum(before.values())
    resting = sum(after.get(name, 0) - before.get(name, 0) for name in names)
    return (total - resting) / total if total else 0.0


def _first_match(path: Path, pattern: str) -> str | None:
    if not path.is_file():
        return None
    found = re.search(pattern, path.read_text())
    return found[1].strip() if found else None


def _has_instructions(name: str) -> bool:
    return _first_match(Path("/proc/cpuinfo"), rf"flags\s*:.*\b({name})\b") is not None


def _caches() -> dict[str, str]:
    caches = {}
    for directory in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((directory / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            caches[f"L{level}"] = size
    return caches


def _compiler() -> str:
    compiler = os.environ.get("CXX") or "g++"
    finished = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=False)
    return finished.stdout.split("\n", 1)[0]
