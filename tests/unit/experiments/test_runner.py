"""The runner of an experiment: what a killed one leaves behind, and which runs it goes on with."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.arm_records import YAML, write_experiment

# The runner with a script of ours in the place of training.
PROGRAM = """
import sys
from pathlib import Path
from megatron_graft.experiments import runner
from megatron_graft.experiments.experiment import load_experiment
from megatron_graft.experiments.runs import Places, plan_runs

root = Path(sys.argv[1])
runner.training_script = lambda: root / "train.sh"
experiment = load_experiment(root / "arms.yaml")
places = Places(work=root / "work", runs=root / "runs", records=root / "records.jsonl")
resources = runner.Resources(jobs=1, processes=1, threads=1)
print(*runner.Runner(experiment, places, [], resources).work_on(plan_runs(experiment, [sys.argv[2]])))
"""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    write_experiment(tmp_path)
    (tmp_path / "train.sh").write_text(
        f"echo $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; sleep 600\n"
    )
    yield tmp_path
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.killpg(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def start(root: Path, run: str = "engram-seed1") -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(root), run], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def begin_and_kill(root: Path) -> None:
    process = start(root)
    deadline = time.monotonic() + 60
    while not (root / "pid").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)


def test_what_a_killed_runner_leaves_running_is_not_begun_a_second_time(root: Path) -> None:
    begin_and_kill(root)
    assert "engram-seed1: another process works on it" in start(root).communicate(timeout=60)[0]
    os.killpg(int((root / "pid").read_text()), signal.SIGKILL)
    with (root / "runs" / "engram-seed1" / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # on a busy machine a killed process dies late
    (root / "train.sh").write_text("exit 3\n")
    assert "its training ended with exit code 3" in start(root).communicate(timeout=60)[0]


def test_a_run_that_was_begun_with_other_flags_is_not_gone_on_with(root: Path) -> None:
    (root / "train.sh").write_text("exit 3\n")
    assert "exit code 3" in start(root).communicate(timeout=60)[0]
    write_experiment(root, YAML.replace("flags: {engram-layers: 2}", "flags: {engram-layers: 3}"))
    output = start(root).communicate(timeout=60)[0]
    assert "was begun with other flags than the experiment asks for: --engram-layers" in output
    assert "Remove the directory to train the run anew" in output
    assert "exit code 3" not in output


def test_a_run_whose_directory_cannot_be_made_stops_no_other(root: Path) -> None:
    (root / "train.sh").write_text("exit 3\n")
    (root / "runs").mkdir()
    (root / "runs" / "engram-seed1").write_text("in the way")
    output = start(root, "engram").communicate(timeout=60)[0]
    assert "engram-seed1: is not a directory" in output and "Traceback" not in output
    assert "engram-seed2: its training ended with exit code 3" in output


def test_nor_is_one_whose_bank_was_made_otherwise_whatever_it_was_called(root: Path) -> None:
    (root / "train.sh").write_text("exit 3\n")
    for text in (YAML, YAML.replace("real", "genuine")):
        write_experiment(root, text)
        assert "exit code 3" in start(root, "sum-seed1").communicate(timeout=60)[0]
    write_experiment(root, YAML.replace("num-rows: 1000", "num-rows: 2000"))
    output = start(root, "sum-seed1").communicate(timeout=60)[0]
    assert "was begun with a bank made otherwise than the experiment asks for" in output
    assert "exit code 3" not in output
