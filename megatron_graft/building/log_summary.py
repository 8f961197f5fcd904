"""Reading the log of a build: what every stage took and said.

The log is a file of JSON objects, one a line: ``{"event": "task", "stage": "count-2-map", "task": 3, "seconds": 1.2,
"cpu_seconds": 1.1, "facts": {...}, ...}`` for every task that ended, and ``{"event": "stage", "stage": ..., "seconds":
..., "tasks": ...}`` for every stage that a process saw through. A build that was resumed may hold a task twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_graft.building.tasks import BuildLog
from megatron_graft.errors import DataError
from megatron_graft.files import beside

LogRecord = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class StageSummary:
    """What a stage took, over its tasks.

    Attributes:
        tasks: how many ended.
        task_seconds: sum of their wall seconds.
        cpu_seconds: sum of their CPU seconds.
        wall_seconds: of the stage as a whole, summed over the runs that saw it through; None if none did.
        facts: the sums of the numbers that its tasks stated.
    """

    tasks: int
    task_seconds: float
    cpu_seconds: float
    wall_seconds: float | None
    facts: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of this summary."""
        return {
            "tasks": self.tasks,
            "task_seconds": round(self.task_seconds, 3),
            "cpu_seconds": round(self.cpu_seconds, 3),
            "wall_seconds": None if self.wall_seconds is None else round(self.wall_seconds, 3),
            "facts": dict(self.facts),
        }


def build_log_path(bank: Path) -> Path:
    """Where the log of a bank's build lies: beside it."""
    return beside(bank, ".build.jsonl")


def read_build_log(path: Path) -> list[dict[str, Any]]:
    """All records of a log that must be there.

    Raises:
        DataError: the file is missing or holds no record.
    """
    records = BuildLog(path).records()
    if not records:
        raise DataError(
            path, "is no log of a build", got="no record" if path.is_file() else "no such file",
            remedy="Give the .build.jsonl file beside a bank.",
        )  # fmt: skip
    return records


def summarise_stages(records: Iterable[LogRecord]) -> dict[str, StageSummary]:
    """Stage name -> what it took, in the order in which stages first appear; of a repeated task the last one counts."""
    tasks: dict[str, dict[int, LogRecord]] = {}
    walls: dict[str, float] = {}
    for record in records:
        if record.get("event") == "task":
            tasks.setdefault(record["stage"], {})[record["task"]] = record
        elif record.get("event") == "stage":
            tasks.setdefault(record["stage"], {})
            walls[record["stage"]] = walls.get(record["stage"], 0.0) + record["seconds"]
    return {stage: _summary(list(ended.values()), walls.get(stage)) for stage, ended in tasks.items()}


def _summary(ended: list[LogRecord], wall_seconds: float | None) -> StageSummary:
    facts: dict[str, float] = {}
    for record in ended:
        for name, value in record.get("facts", {}).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                facts[name] = facts.get(name, 0) + value
    return StageSummary(
        tasks=len(ended),
        task_seconds=sum(record.get("seconds", 0.0) for record in ended),
        cpu_seconds=sum(record.get("cpu_seconds", 0.0) for record in ended),
        wall_seconds=wall_seconds,
        facts=facts,
    )
