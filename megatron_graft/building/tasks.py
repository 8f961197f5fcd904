"""Stages of a build, and how their tasks are run: independent pieces of work that speak through files alone.

A stage has a fixed number of tasks, known before anything runs. A task writes one directory,
``<work>/<stage>/<task>``, which appears by one rename: when it is there, the task is done and is not done again. So a
build can be killed at any moment and started again, and tasks of a stage can run in any process on any node.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_graft.errors import BankError, ConfigError
from megatron_graft.files import directory_in_one_step, make_directory, storage_errors, take_lock
from megatron_graft.log import format_seconds, get_logger

LOCK_NAME = ".lock"
PLANNED = "plan"
"""The log's record of a new plan: what stands before it is of another build."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a build."""

    name: str
    num_tasks: int
    run: Callable[[int, Path], Mapping[str, Any]]
    """``run(task, scratch)`` fills the directory ``scratch``, which becomes the task's own, and returns what the log
    is to say of it: values that JSON can hold."""
    in_pool: bool = False
    """Whether tasks may run side by side in a pool of local processes; others use all processors by themselves."""
    obsolete: tuple[str, ...] = ()
    """Stages whose outputs nobody reads once this one is complete. Only a stage of one task may have any."""


def task_directory(work: Path, stage: str, task: int) -> Path:
    """Where a task's output lies."""
    return work / stage / f"{task:05d}"


def is_complete(stage: Stage, work: Path) -> bool:
    """Whether every task of a stage is done."""
    return all(task_directory(work, stage.name, task).is_dir() for task in range(stage.num_tasks))


def remaining_stages(stages: Sequence[Stage], work: Path) -> list[Stage]:
    """The stages that are not done: neither complete, nor made obsolete by one that is."""
    complete = [stage for stage in stages if is_complete(stage, work)]
    past = {stage.name for stage in complete} | {name for stage in complete for name in stage.obsolete}
    return [stage for stage in stages if stage.name not in past]


def remove_obsolete(stages: Sequence[Stage], work: Path) -> None:
    """Remove what complete stages made obsolete and what a kill kept them from removing."""
    for stage in stages:
        if stage.obsolete and is_complete(stage, work):
            for name in stage.obsolete:
                shutil.rmtree(work / name, ignore_errors=True)


def tasks_of_rank(stage: Stage, work: Path, *, rank: int, world_size: int) -> list[int]:
    """The tasks that fall to one of ``world_size`` workers and are not done: every ``world_size``-th.

    Raises:
        ConfigError: there is no such rank.
    """
    if not 0 <= rank < world_size:
        raise ConfigError("--rank", "is no rank of so many workers", got=rank, expected=f"0 to {world_size - 1}")
    mine = range(rank, stage.num_tasks, world_size)
    return [task for task in mine if not task_directory(work, stage.name, task).is_dir()]


def run_task(stage: Stage, work: Path, task: int, log: BuildLog) -> None:
    """Run one task, unless it is done, and note it in the log. On any exception nothing of it is left.

    While another process runs the same task (a node that its scheduler thinks dead, say), this one waits for it.

    Raises:
        StorageError: its output cannot be written.
        GraftError: whatever the stage finds wrong.
    """
    target = task_directory(work, stage.name, task)
    make_directory(target.parent)
    lock = target.with_name(f".{target.name}.lock")
    with _locked(lock, wait=True):
        if target.is_dir():
            return
        _remove_scratch(target)
        started, wall, processor = _now(), time.monotonic(), time.process_time()
        try:
            with directory_in_one_step(target) as scratch:
                facts = stage.run(task, scratch)
        except OSError as error:
            # On a file system without locks the other process may have been first.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not target.is_dir():
                raise
            return
        lock.unlink(missing_ok=True)  # whoever waits for it finds the task done
    log.write(
        event="task", stage=stage.name, task=task, started=started, seconds=round(time.monotonic() - wall, 3),
        cpu_seconds=round(time.process_time() - processor, 3), host=socket.gethostname(), facts=dict(facts),
    )  # fmt: skip
    remove_obsolete([stage], work)


def run_stage(stage: Stage, work: Path, log: BuildLog, *, rank: int = 0, world_size: int = 1) -> None:
    """Run what is left of one worker's tasks of a stage.

    Raises:
        ConfigError: there is no such rank.
        GraftError, StorageError: a task failed; those before it are kept.
    """
    tasks = tasks_of_rank(stage, work, rank=rank, world_size=world_size)
    progress = StageProgress(stage, len(tasks))
    for task in tasks:
        run_task(stage, work, task, log)
        progress.advance()


class StageProgress:
    """One line for every finished task of several, with the time that the rest will take."""

    def __init__(self, stage: Stage, num_tasks: int) -> None:
        self._name, self._total, self._done = stage.name, num_tasks, 0
        self._start = time.monotonic()

    def advance(self) -> None:
        """Count one task more."""
        self._done += 1
        if self._total == 1:  # the stage's own line says all
            return
        elapsed = time.monotonic() - self._start
        remaining = elapsed / self._done * (self._total - self._done)
        get_logger().info(
            "%s: %d/%d tasks, %s, ETA %s", self._name, self._done, self._total,
            format_seconds(elapsed), format_seconds(remaining),
        )  # fmt: skip


class BuildLog:
    """The structured log of a build: one JSON object a line, appended as the plan is made and tasks and stages end.

    Every line is one write to a file opened for appending, so processes of a node may share it. Over a network file
    system two nodes that write in the same moment may spoil a line; what depends on the log are times alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **record: Any) -> None:
        """Append one record."""
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as stream:
                stream.write(line.encode())

    def stage(self, name: str, tasks: int, seconds: float) -> None:
        """Note that a stage has ended."""
        self.write(event="stage", stage=name, tasks=tasks, seconds=round(seconds, 3), ended=_now())

    def records(self) -> list[dict[str, Any]]:
        """The records since the last plan was made; a line that is cut short or spoilt is passed over."""
        if not self.path.is_file():
            return []
        records: list[dict[str, Any]] = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    records = [] if record.get("event") == PLANNED else records
                    records.append(record)
        return records


@contextlib.contextmanager
def work_lock(work: Path, *, alone: bool) -> Iterator[None]:
    """Hold a work directory: alone, as a whole build does, or beside others, as tasks of a stage do.

    The lock dies with its process, so a killed build never stands in the way. File systems without locks are let
    through: there, the plan still refuses a build of other settings.

    Raises:
        BankError: another process builds there.
        StorageError: the directory cannot be made or written.
    """
    make_directory(work)
    with _locked(work / LOCK_NAME, alone=alone) as held:
        if not held:
            raise BankError(
                work,
                "is the work directory of a build that is running",
                remedy="Wait for it, stop it, or give another --work-dir.",
            )
        yield


@contextlib.contextmanager
def _locked(path: Path, *, alone: bool = True, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file while the block runs; yields False if another process has it and ``wait`` is not set."""
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield take_lock(descriptor, path, alone=alone, wait=wait)
    finally:
        os.close(descriptor)


def _remove_scratch(target: Path) -> None:
    """Clear away what a killed process left of this task; whoever runs one holds its lock."""
    for scratch in target.parent.glob(f".{target.name}.*"):
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
