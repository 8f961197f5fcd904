from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.building.tasks import (
    BuildLog,
    Stage,
    is_complete,
    remaining_stages,
    run_stage,
    task_directory,
    tasks_of_rank,
    work_lock,
)
from megatron_graft.errors import BankError, ConfigError, GraftError


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
    assert sorted(path.name for path in (tmp_path / "count").iterdir()) == ["00000", "00001"]
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
