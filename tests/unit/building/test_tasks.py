from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.building.tasks import (
    PLANNED,
    BuildLog,
    Stage,
    is_complete,
    remaining_stages,
    remove_obsolete,
    run_stage,
    run_task,
    task_directory,
    tasks_of_rank,
    work_lock,
)
from megatron_graft.errors import BankError, ConfigError, GraftError, StorageError


class Recorder:
    """A stage's function that notes its calls and fails at one task."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[int] = []
        self.fail_at = fail_at

    def __call__(self, task: int, scratch: Path) -> Mapping[str, Any]:
        self.calls.append(task)
        (scratch / "half").write_text("half")
        if task == self.fail_at:
            raise GraftError("task", "failed")
        (scratch / "whole").write_text(str(task))
        return {"squared": task**2}


def stage(name: str = "count", tasks: int = 5, run: Recorder | None = None, **options: Any) -> Stage:
    return Stage(name=name, num_tasks=tasks, run=run or Recorder(), **options)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_task_falls_to_one_worker(tmp_path: Path, world_size: int) -> None:
    shares = [tasks_of_rank(stage(), tmp_path, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(sum(shares, [])) == [0, 1, 2, 3, 4]
    for rank in range(world_size):
        run_stage(stage(), tmp_path, BuildLog(tmp_path / "log"), rank=rank, world_size=world_size)
    assert is_complete(stage(), tmp_path)
    assert [(task_directory(tmp_path, "count", task) / "whole").read_text() for task in range(5)] == list("01234")


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 3), (0, 0)])
def test_a_rank_that_there_is_not_is_refused(tmp_path: Path, rank: int, world_size: int) -> None:
    with pytest.raises(ConfigError, match="--rank: is no rank of so many workers"):
        tasks_of_rank(stage(), tmp_path, rank=rank, world_size=world_size)


def test_a_failed_task_leaves_nothing_and_those_before_it_are_kept(tmp_path: Path) -> None:
    log = BuildLog(tmp_path / "log")
    with pytest.raises(GraftError, match="failed"):
        run_stage(stage(run=Recorder(fail_at=2)), tmp_path, log)
    assert sorted(path.name for path in (tmp_path / "count").iterdir()) == [".00002.lock", "00000", "00001"]
    again = Recorder()
    run_stage(stage(run=again), tmp_path, log)
    assert again.calls == [2, 3, 4]


def test_what_a_killed_process_left_of_a_task_is_cleared_away(tmp_path: Path) -> None:
    left = tmp_path / "count" / ".00003.abcdef"
    left.mkdir(parents=True)
    run_stage(stage(), tmp_path, BuildLog(tmp_path / "log"))
    assert not left.exists() and is_complete(stage(), tmp_path)


def test_the_log_tells_of_every_task_and_survives_a_line_cut_short(tmp_path: Path) -> None:
    log = BuildLog(tmp_path / "beside" / "log.jsonl")
    run_stage(stage(tasks=2), tmp_path, log)
    log.stage("count", 2, 1.5)
    with log.path.open("a") as stream:
        stream.write('{"event": "ta')
    first, second, last = log.records()
    assert (first["task"], second["task"]) == (0, 1) and second["facts"] == {"squared": 1}
    assert {"event", "stage", "started", "seconds", "cpu_seconds", "host"} <= first.keys()
    assert (last["event"], last["tasks"], last["seconds"]) == ("stage", 2, 1.5)


def test_obsolete_outputs_go_and_their_stages_are_not_run_again(tmp_path: Path) -> None:
    log = BuildLog(tmp_path / "log")
    stages = [stage("a", 2), stage("b", 2), stage("c", 1, obsolete=("a", "b")), stage("d", 1)]
    assert remaining_stages(stages, tmp_path) == stages
    for each in stages[:2]:
        run_stage(each, tmp_path, log)
    assert remaining_stages(stages, tmp_path) == stages[2:]
    run_stage(stages[2], tmp_path, log)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    assert remaining_stages(stages, tmp_path) == stages[3:]


def test_an_output_that_was_removed_is_made_again_unless_it_is_obsolete(tmp_path: Path) -> None:
    log = BuildLog(tmp_path / "log")
    stages = [stage("a", 1), stage("b", 1), stage("c", 1, obsolete=("a",))]
    for each in stages:
        run_stage(each, tmp_path, log)
    assert remaining_stages(stages, tmp_path) == []
    shutil.rmtree(tmp_path / "b")
    assert remaining_stages(stages, tmp_path) == [stages[1]]


def test_what_a_kill_kept_from_being_removed_is_removed_later(tmp_path: Path) -> None:
    stages = [stage("a", 2), stage("b", 1, obsolete=("a",))]
    for task in range(2):
        task_directory(tmp_path, "a", task).mkdir(parents=True)
    remove_obsolete(stages, tmp_path)
    assert is_complete(stages[0], tmp_path)
    task_directory(tmp_path, "b", 0).mkdir(parents=True)
    remove_obsolete(stages, tmp_path)
    assert not (tmp_path / "a").exists()


def slow(task: int, scratch: Path) -> Mapping[str, Any]:
    time.sleep(0.5)
    (scratch / "whole").write_text(str(task))
    return {}


def run_slowly(work: Path, start: Any) -> None:
    start.wait(30)
    run_task(Stage(name="slow", num_tasks=1, run=slow), work, 0, BuildLog(work / "log"))


def test_two_processes_on_one_task_take_turns(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    both = [context.Process(target=run_slowly, args=(tmp_path, start)) for _ in range(2)]
    for process in both:
        process.start()
    start.set()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert len(BuildLog(tmp_path / "log").records()) == 1


def test_the_log_forgets_what_stood_before_a_new_plan(tmp_path: Path) -> None:
    log = BuildLog(tmp_path / "log")
    run_stage(stage(tasks=2), tmp_path / "one", log)
    log.write(event=PLANNED)
    run_stage(stage(tasks=1), tmp_path / "two", log)
    with log.path.open("ab") as stream:
        stream.write(b'\xff\xfe broken\n"a text"\n')
    assert [record["event"] for record in log.records()] == [PLANNED, "task"]


def test_a_work_directory_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for work in (tmp_path / "file", tmp_path / "file" / "below"):
        with (
            pytest.raises(StorageError, match="file.*: is not a directory .expected a directory"),
            work_lock(work, alone=True),
        ):
            pass


def hold(work: Path, alone: bool, ready: Any, done: Any) -> None:
    with work_lock(work, alone=alone):
        ready.set()
        done.wait(30)


@pytest.mark.parametrize(("first", "second", "refused"), [(True, True, True), (True, False, True),
                                                          (False, True, True), (False, False, False)])  # fmt: skip
def test_a_build_has_its_work_directory_alone_and_tasks_share_it(
    tmp_path: Path, first: bool, second: bool, refused: bool
) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, first, ready, done))
    other.start()
    try:
        assert ready.wait(30)
        if refused:
            expected = pytest.raises(BankError, match="is the work directory of a build that is running.*--work-dir")
            with expected, work_lock(tmp_path, alone=second):
                pass
        else:
            with work_lock(tmp_path, alone=second):
                pass
    finally:
        done.set()
        other.join()
    with work_lock(tmp_path, alone=True):
        assert os.listdir(tmp_path) == [".lock"]
