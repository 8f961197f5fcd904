"""An experiment as a Slurm array, a task a run: one is told to stop, saves, requeues itself, and all are recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.arms_job import NAMES, STEPS, miniature
from tests.helpers.main_job import REPOSITORY, read_records
from tests.helpers.slurm import Slurm, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.functional]

BATCH_SCRIPT = REPOSITORY / "examples/slurm/run_arms.sbatch"
# As many as run at once: while a task of an array waits, Slurm 22.05 calls another's signal a failure and repeats it.
RUNS = NAMES[:2]
# Saves when it is told to stop, and ends as the real one does.
RUNNER = """
import os, signal, sys, time
from pathlib import Path
def stop(*_):
    Path(os.environ["BEGUN"]).write_text("begun, saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
Path(os.environ["BEGUN"]).write_text("begun")
time.sleep(60)
"""
STOPPED = 1  # the number of the task that is told to stop


def test_tasks_take_a_run_each_and_go_on_after_a_requeue(slurm: Slurm, tmp_path: Path) -> None:
    experiment, runs, log = miniature(tmp_path), tmp_path / "runs", tmp_path / "log"
    places = ("--work-dir", tmp_path / "work", "--runs-dir", runs)
    subprocess.run(
        [sys.executable, REPOSITORY / "tools/run_arms.py", experiment, *places, "--prepare-only"],
        check=True, capture_output=True,
    )  # fmt: skip
    job = slurm.submit(
        f"--array=0-{len(RUNS) - 1}", f"--output={log}-%a", BATCH_SCRIPT, experiment, *places, "--keep-checkpoints",
        cwd=REPOSITORY, PATH=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", DEVICE="cpu",
    )  # fmt: skip
    saved = runs / RUNS[STOPPED] / "checkpoints" / "latest_checkpointed_iteration.txt"
    wait_until(saved.exists, "a checkpoint of the task", 300)
    slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_{STOPPED}")  # what Slurm sends before the time limit
    states = slurm.wait(job, 400)
    output = Path(f"{log}-{STOPPED}").read_text()
    assert states == ["COMPLETED"] * len(RUNS), output[-4000:]
    assert output.count(f"stopped before the time limit; requeueing task {job}_{STOPPED}") == 1
    restarts = {fields["ArrayTaskId"]: fields["Restarts"] for fields in slurm.show(job)}
    assert restarts == {str(task): str(int(task == STOPPED)) for task in range(len(RUNS))}
    assert "successfully loaded checkpoint" in (runs / RUNS[STOPPED] / "log.txt").read_text(errors="replace")

    recorded = [json.loads(line)["name"] for line in (runs / "records.jsonl").read_text().splitlines()]
    assert sorted(recorded) == sorted(RUNS)
    for name in RUNS:
        steps = [record["iteration"] for record in read_records(runs / name)]
        assert steps[-1] == STEPS and steps == sorted(set(steps))


def test_a_task_that_is_cancelled_stays_cancelled(slurm: Slurm, tmp_path: Path) -> None:
    tools, begun = tmp_path / "checkout" / "tools", tmp_path / "begun"
    tools.mkdir(parents=True)
    (tools / "run_arms.py").write_text(RUNNER)
    job = slurm.submit(
        "--array=0-0", f"--output={tmp_path}/log", BATCH_SCRIPT, "arms.yaml",
        cwd=tmp_path, PATH=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", 
        GRAFT_CHECKOUT=str(tools.parent), BEGUN=str(begun),
    )  # fmt: skip
    wait_until(begun.exists, "the runner", 60)
    slurm.run("scancel", job)
    assert slurm.wait(job, 60) == ["CANCELLED"], (tmp_path / "log").read_text()
    assert [fields["Restarts"] for fields in slurm.show(job)] == ["0"]
    assert begun.read_text() == "begun, saved"
